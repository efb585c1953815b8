"""How a file's network is built, if it is one of nnU-Net's own: by the file's plan, or by the shapes of its tensors."""

import copy
import pydoc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from hyspark_nnunet.checkpoints import nnssl
from hyspark_nnunet.checkpoints.plan_sizes import CLASSES, PlanSizes, requiring_import

if TYPE_CHECKING:  # loading a network does not import nnU-Net
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


# of a plan's configuration, as nnU-Net names them
ARCHITECTURE = ("network_class_name", "arch_kwargs", "_kw_requires_import")


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
        """The network with nnU-Net's initialisation, as ``get_network_from_plans`` of nnU-Net builds it.

        Raises:
            ValueError: the network or a part of it is not installed, or is no module of torch.
        """
        arguments = dict(self.arguments)
        for name in self.requires_import:
            arguments[name] = arguments[name] and _module_class(name, arguments[name])
        # plans of earlier versions name modules that were moved
        moved = f"{CLASSES}.{self.class_name.rpartition('.')[2]}"
        network_class: Any = pydoc.locate(self.class_name) or pydoc.locate(moved)
        if network_class is None:
            raise ValueError(f"the plan names the network {self.class_name}, which is not installed")
        network = network_class(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=deep_supervision, **arguments
        )
        if hasattr(network, "initialize"):
            network.apply(network.initialize)
        return network


def _module_class(argument: str, name: str) -> type[nn.Module]:
    """The class that an argument names. Others are refused: the network would call any function that a file names."""
    found = pydoc.locate(name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"the plan names {name} as {argument} of its network, which is not installed or no module of torch, such "
            "as torch.nn.LeakyReLU: correct the plan, or do not use this file if you do not trust it"
        )
    return found


def plan_in(rest: Mapping[str, Any]) -> NetworkPlan | None:
    """The network of the plan in a checkpoint of nnU-Net; None for other files.

    Args:
        rest: everything in the file except the weights.
    """
    arguments = rest.get("init_args")
    plans = arguments.get("plans") if isinstance(arguments, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(plans, Mapping):
        return None
    name, configurations = arguments.get("configuration"), plans.get("configurations", {})
    if not isinstance(name, str) or name not in configurations:
        return None
    settings = _with_inherited(configurations, name)
    if "architecture" not in settings:
        # plans of nnU-Net before 2.5: its managers rewrite them, in place
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return by_configuration(PlansManager(copy.deepcopy(dict(plans))).get_configuration(name))
    architecture, patch_size, spacing = settings["architecture"], settings.get("patch_size"), settings.get("spacing")
    if not isinstance(architecture, Mapping) or not {*ARCHITECTURE} <= {*architecture}:
        return None
    class_name, arguments, requires_import = (architecture[key] for key in ARCHITECTURE)
    return NetworkPlan(
        class_name, arguments, requires_import, patch_size and list(patch_size), spacing and list(spacing)
    )


def _with_inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits from others; mirrors ``PlansManager.get_configuration`` of nnU-Net."""
    settings: dict[str, Any] = {}
    visited: list[str] = []
    while name in configurations and name not in visited:
        visited.append(name)
        settings = {**configurations[name], **settings}
        name = configurations[name].get("inherits_from")
    return settings


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
    found = plan_in(rest)
    if found is not None and found.class_name.endswith(f".{sizes.network}"):
        return found
    plan, network = rest.get(nnssl.KEY), None
    if isinstance(plan, Mapping):
        network, description = nnssl.network_of(plan), {**nnssl.describe(plan), **description}
    patch_size, spacing = description.get("patch_size"), description.get("spacing")
    if network is not None and network[0] == sizes.class_name:
        return NetworkPlan(*network, requiring_import(network[1]), patch_size, spacing)
    arguments = sizes.arguments(description.get("strides"))
    return NetworkPlan(sizes.class_name, arguments, requiring_import(arguments), patch_size, spacing)
