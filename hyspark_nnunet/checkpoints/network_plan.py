"""How a file's network is built, if it is one of nnU-Net's own: by the file's plan, or by the shapes of its tensors."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from hyspark_nnunet.checkpoints import nnssl
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, requiring_import

if TYPE_CHECKING:  # nnU-Net is imported in functions: reading other files does not wait for it
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


class NetworkPlan(NamedTuple):
    """A network as a plan has it.

    Attributes:
        class_name: of the network.
        arguments: of the network.
        requires_import: arguments that name a class.
        patch_size: in voxels; None if the file does not say it.
        spacing: in mm; None if the file does not say it.
    """

    class_name: str
    arguments: dict[str, Any]
    requires_import: Sequence[str]
    patch_size: list[int] | None
    spacing: list[float] | None

    def build(self, input_channels: int, num_classes: int, deep_supervision: bool) -> nn.Module:
        """The network with nnU-Net's initialisation."""
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        return get_network_from_plans(
            self.class_name,
            self.arguments,
            self.requires_import,
            input_channels,
            num_classes,
            deep_supervision=deep_supervision,
        )


def configuration_in(rest: Mapping[str, Any]) -> "ConfigurationManager | None":
    """The configuration of the plan in a checkpoint of nnU-Net; None for other files.

    Args:
        rest: everything in the file except the weights.
    """
    arguments = rest.get("init_args")
    plans = arguments.get("plans") if isinstance(arguments, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(plans, Mapping):
        return None
    if arguments.get("configuration") not in plans.get("configurations", {}):
        return None
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    # nnU-Net's managers change plans of earlier versions
    return PlansManager(copy.deepcopy(dict(plans))).get_configuration(arguments["configuration"])


def by_configuration(configuration: "ConfigurationManager") -> NetworkPlan:
    """The network of a plan's configuration."""
    return NetworkPlan(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        list(configuration.patch_size),
        list(configuration.spacing),
    )


def network_plan(sizes: PlanSizes, rest: Mapping[str, Any], description: Mapping[str, Any]) -> NetworkPlan:
    """The network of a file.

    Args:
        sizes: of its network.
        rest: everything in the file except the weights.
        description: of its network.
    """
    configuration = configuration_in(rest)
    if configuration is not None and configuration.network_arch_class_name.endswith(f".{sizes.network}"):
        return by_configuration(configuration)
    patch_size, spacing = description.get("patch_size"), description.get("spacing")
    plan = rest.get(nnssl.KEY)
    network = nnssl.network_of(plan) if isinstance(plan, Mapping) else None
    if network is not None and network[0] == sizes.class_name:
        return NetworkPlan(*network, requiring_import(network[1]), patch_size, spacing)
    arguments = sizes.arguments(description.get("strides"))
    return NetworkPlan(sizes.class_name, arguments, requiring_import(arguments), patch_size, spacing)
