"""Weights of nnU-Net's own networks, as ``hyspark_nnunet checkpoint convert`` writes them for other programs.

These programs build nnU-Net's network and want all names of each tensor (``checkpoints.state_dicts.first_name``), which
share its storage in the file.
"""

from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.checkpoints import nnssl
from hyspark_nnunet.checkpoints.heads import HEADS
from hyspark_nnunet.checkpoints.network_plan import NetworkPlan, by_configuration, network_plan
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes
from hyspark_nnunet.checkpoints.state_dicts import stored_once
from hyspark_nnunet.checkpoints.storage import SourceWeights, write_atomically
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.commands.dataset_network import plans_of_dataset
from hyspark_nnunet.commands.equal_weights import differing

NNUNET_WEIGHTS, NNSSL = "nnunet-weights", "nnssl"
PLAN_KINDS = (NNUNET_WEIGHTS, NNSSL)


class _Target(NamedTuple):
    """The network to write, and where its plan is from."""

    plan: NetworkPlan
    input_channels: int
    configuration: str
    origin: str


def write_plan_network(
    weights: SourceWeights,
    sizes: PlanSizes,
    file: str,
    out: str,
    kind: str,
    dataset: str | None,
    configuration: str,
    plans_name: str,
) -> tuple[list[str], list[str]]:
    """Writes the encoder and decoder of nnU-Net's network with all names that nnU-Net gives to a tensor.

    Args:
        weights: of the file.
        sizes: of its network.
        file: its path.
        out: new file.
        kind: one of ``PLAN_KINDS``.
        dataset: number or name of the dataset whose plan is taken; None: the plan in the file.
        configuration: of the dataset's plans.
        plans_name: of the dataset's plans.

    Returns:
        what to print; names of the file's tensors that were not written.

    Raises:
        FileNotFoundError, ValueError: the plan is missing, or the encoder does not fit it without adaptation.
    """
    target = _target(weights, sizes, file, dataset, configuration, plans_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a fresh decoder is the same in every conversion
        network = target.plan.build(target.input_channels, num_classes=2, deep_supervision=True)
    state = {name: tensor for name, tensor in weights.state.items() if not name.startswith(HEADS)}
    ours = {"strides": target.plan.arguments.get("strides"), "patch_size": target.plan.patch_size}
    transfer_weights(network, state, file, weights.description, ours)
    full = {name: tensor for name, tensor in network.state_dict().items() if ".seg_layers." not in name}
    written = stored_once(full)
    has_decoder = sizes.n_conv_per_stage_decoder is not None
    parts = ("encoder.", "decoder.stages.", "decoder.transpconvs.") if has_decoder else ("encoder.",)
    expected = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    changed = differing(expected, written) + [n for n in written if n.startswith(parts) and n not in state]
    if changed:
        raise ValueError(
            f"{file} does not fit the network of {target.origin} without adaptation: {len(changed)} tensors would be "
            f"adapted or left out, first {changed[0]}. To adapt them, train with -pretrained_weights and "
            "SparKFinetuneTrainer."
        )
    content: dict[str, Any] = {"network_weights": full, "trainer_name": weights.origin}
    if kind == NNSSL:
        content[nnssl.KEY] = _adaptation_plan(target)
        if content[nnssl.KEY] is None:
            raise ValueError(
                f"{file} does not say the patch size and spacing of pre-training, which --to nnssl writes: name the "
                "dataset with -d (and -c, -p)"
            )
        content["citations"] = [nnssl.CITATION]
    write_atomically(content, out)
    left_out = sorted(set(weights.state) - set(expected))
    decoder = "as in the file" if has_decoder else "freshly initialised: the file has no decoder of nnU-Net's network"
    lines = [
        f"network: {sizes.network} of {target.origin}, {target.input_channels} input channels",
        "encoder: as in the file",
        f"decoder: {decoder}",
        "segmentation heads: not written, nnU-Net initialises them",
    ]
    if left_out:
        lines.append(f"not written: {len(left_out)} tensors that this network does not have: {', '.join(left_out)}")
    return lines, left_out


def plan_of_file(weights: SourceWeights, sizes: PlanSizes) -> dict[str, Any] | None:
    """The adaptation plan of nnssl for a file's network; None if the file does not say its patch size and spacing.

    Args:
        weights: of the file.
        sizes: of its network.
    """
    return _adaptation_plan(_target(weights, sizes, "", None, "3d_fullres", ""))


def _target(
    weights: SourceWeights, sizes: PlanSizes, file: str, dataset: str | None, configuration: str, plans_name: str
) -> _Target:
    if dataset is None:
        plan = network_plan(sizes, weights.rest, weights.description)
        name = str(weights.description.get("configuration", configuration))
        return _Target(plan, sizes.input_channels, name, file)
    plans, dataset_json = plans_of_dataset(dataset, configuration, plans_name)
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    origin = f"{manager.dataset_name}, {configuration}, {plans_name}"
    if not settings.network_arch_class_name.endswith(f".{sizes.network}"):
        raise ValueError(
            f"{file} holds a {sizes.network}, but {origin} names {settings.network_arch_class_name}: choose plans with "
            "the file's network (-p)"
        )
    channels = determine_num_input_channels(manager, settings, dataset_json)
    return _Target(by_configuration(settings), channels, configuration, origin)


def _adaptation_plan(target: _Target) -> dict[str, Any] | None:
    plan = target.plan
    if plan.patch_size is None or plan.spacing is None:
        return None
    return nnssl.adaptation_plan(
        plan.class_name, plan.arguments, target.input_channels, target.configuration, plan.spacing, plan.patch_size
    )
