"""The layout of nnssl's checkpoints, which nnU-Net's development version fine-tunes.

Beside ``network_weights``, a file holds ``nnssl_adaptation_plan``: the network, the plan of its pre-training, and where
its tensors are. Source: nnU-Net's documentation/finetuning_from_nnssl_checkpoints.md.
"""

from collections.abc import Mapping
from typing import Any

from hyspark_nnunet.checkpoints.plan_sizes import (
    CLASSES,
    PLAIN,
    RESENC_L,
    RESIDUAL,
    is_resenc_l,
    requiring_import,
    resenc_l_arguments,
)

KEY = "nnssl_adaptation_plan"
CITATION: dict[str, Any] = {
    "type": "Pretraining Method",
    "name": "SparK",
    "apa_citations": [
        "Tian, K., Jiang, Y., Diao, Q., Lin, C., Wang, L., & Yuan, Z. (2023). Designing BERT for convolutional "
        "networks: Sparse and hierarchical masked modeling. ICLR. arXiv:2301.03580"
    ],
}


def adaptation_plan(
    class_name: str,
    arguments: Mapping[str, Any],
    input_channels: int,
    configuration: str,
    spacing: list[float],
    patch_size: list[int],
) -> dict[str, Any]:
    """The adaptation plan of a network, with numbers, strings, lists and tuples alone.

    Args:
        class_name: of the network, as a plan names it.
        arguments: of the network, as a plan has them.
        input_channels: of the network.
        configuration: name of the plan's configuration.
        spacing: of the configuration, in mm.
        patch_size: of pre-training, in voxels.
    """
    architecture: dict[str, Any]
    if is_resenc_l(class_name, arguments):
        architecture = {"arch_class_name": RESENC_L, "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    else:
        architecture = {
            "arch_class_name": class_name.rpartition(".")[2],
            "arch_kwargs": dict(arguments),
            "arch_kwargs_requiring_import": requiring_import(arguments),
        }
    stem, first = ("encoder.stem", "encoder.stem.convs.0")
    if class_name.endswith(PLAIN):
        stem, first = ("encoder.stages.0", "encoder.stages.0.0.convs.0")
    return {
        "architecture_plans": architecture,
        "pretrain_plan": {"configurations": {configuration: {"spacing": spacing, "patch_size": patch_size}}},
        "pretrain_num_input_channels": input_channels,
        "pretrain_patch_size": patch_size,
        "recommended_downstream_patchsize": patch_size,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": (f"{first}.conv", f"{first}.all_modules.0"),
        "key_to_lpe": None,
    }


def network_of(plan: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Class and arguments of the network in an adaptation plan; None if it is not one of nnU-Net's or not complete."""
    architecture = plan.get("architecture_plans")
    if not isinstance(architecture, Mapping):
        return None
    name, arguments = str(architecture.get("arch_class_name")).rpartition(".")[2], architecture.get("arch_kwargs")
    if name == RESENC_L:
        return f"{CLASSES}.{RESIDUAL}", resenc_l_arguments()
    if name not in (PLAIN, RESIDUAL) or not isinstance(arguments, Mapping):
        return None
    return f"{CLASSES}.{name}", dict(arguments)


def configuration_of(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first configuration of pre-training, the one that is read; {} without any."""
    pretraining = plan.get("pretrain_plan")
    configurations = pretraining.get("configurations") if isinstance(pretraining, Mapping) else None
    if not isinstance(configurations, Mapping) or not configurations:
        return {}
    configuration = next(iter(configurations.values()))
    return configuration if isinstance(configuration, Mapping) else {}


def describe(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What an adaptation plan says about its network, as ``description.describe_network`` names it."""
    network, configuration, pretraining = network_of(plan), configuration_of(plan), plan.get("pretrain_plan")
    architecture = plan.get("architecture_plans")
    found = {
        "network": architecture.get("arch_class_name") if isinstance(architecture, Mapping) else None,
        "input_channels": plan.get("pretrain_num_input_channels"),
        "strides": network and network[1].get("strides"),
        "patch_size": plan.get("pretrain_patch_size") or configuration.get("patch_size"),
        "spacing": configuration.get("spacing"),
        "dataset": pretraining.get("dataset_name") if isinstance(pretraining, Mapping) else None,
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v is not None}
