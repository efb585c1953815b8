"""From an nnU-Net plan to the networks."""

from collections.abc import Sequence
from math import prod
from pydoc import locate
from typing import Any, cast

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from hyspark_nnunet.architectures.masked_autoencoder import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.plan_arguments import per_axis
from hyspark_nnunet.architectures.presets import PRESETS, decoder_width
from hyspark_nnunet.architectures.unet import HySparKUNet

MAX_STRIDE = 16
MAX_STAGES = 5
OWN_ARCHITECTURE = "hyspark_nnunet.architectures.HySparKUNet"


def n_stages_taken(strides: Sequence[Sequence[int]]) -> int:
    """How many of a plan's stages the encoder takes.

    Stages are taken until every axis that still divides has reached stride 16, five at most.

    Args:
        strides: of all stages of the plan, per axis.

    Raises:
        ValueError: the plan has no second stage.
    """
    if len(strides) < 2:
        raise ValueError(
            f"the plan has {len(strides)} stage with strides {strides}, but HySparK needs at least 2 stages"
        )
    taken = 1
    while taken < min(len(strides), MAX_STAGES):
        reached = [prod(axis) for axis in zip(*strides[:taken], strict=True)]
        still_divides = [any(s > 1 for s in axis) for axis in zip(*strides[taken:], strict=True)]
        if not any(more and stride < MAX_STRIDE for more, stride in zip(still_divides, reached, strict=True)):
            break
        taken += 1
    return max(taken, 2)


def check_preset(configuration: ConfigurationManager, preset: str) -> None:
    """Refuses a preset that is not the one of a plan's own architecture: the plan says the sizes then.

    Args:
        configuration: of a plan.
        preset: of the recipe.

    Raises:
        ValueError: the plan names HySparKUNet with the widths of another preset.
    """
    if configuration.network_arch_class_name != OWN_ARCHITECTURE:
        return
    widths = tuple(configuration.network_arch_init_kwargs["features_per_stage"])
    named = [name for name, sizes in PRESETS.items() if sizes.features_per_stage[: len(widths)] == widths]
    if named and preset not in named:
        raise ValueError(
            f"the plan names HySparKUNet with the stages {widths} of preset {named[0]}, but the recipe says preset "
            f"{preset}: plan again with hyspark_nnunet plan -preset {preset}, or set HYSPARK_PRESET={named[0]}"
        )


def encoder_arguments(configuration: ConfigurationManager, preset: str) -> dict[str, Any]:
    """Plan-shaped arguments that both networks share.

    A plan that names HySparKUNet says everything itself; of any other plan the strides and kernel sizes are taken, and
    channels, blocks and expansions from the preset.

    Args:
        configuration: of the plan.
        preset: "S", "B" or "L".

    Raises:
        ValueError: the plan has fewer than two stages.
    """
    plan = configuration.network_arch_init_kwargs
    conv_op = plan.get("conv_op", "torch.nn.modules.conv.Conv3d")
    conv_op = cast(type[nn.Module], locate(conv_op) if isinstance(conv_op, str) else conv_op)
    if configuration.network_arch_class_name == OWN_ARCHITECTURE:
        names = ["n_stages", "features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage"]
        names += ["expansion_per_stage", "vit_n_blocks", "vit_num_heads"]
        return {"conv_op": conv_op, **{name: plan[name] for name in names if name in plan}}
    dims = 2 if conv_op is nn.Conv2d else 3
    strides = [per_axis(s, dims) for s in plan["strides"]]
    kernel_sizes = [per_axis(k, dims) for k in plan["kernel_sizes"]]
    n = n_stages_taken(strides)
    return {
        "conv_op": conv_op,
        "n_stages": n,
        "kernel_sizes": kernel_sizes[:n],
        "strides": strides[:n],
        **PRESETS[preset].encoder_sizes(n),
    }


def pretraining_network(
    configuration: ConfigurationManager, input_channels: int, preset: str, width: int | None = None
) -> HySparKMaskedAutoencoder:
    """HySparK's network of pre-training for a plan.

    Args:
        configuration: of the plan.
        input_channels: channels of the image.
        preset: "S", "B" or "L".
        width: channels of the decoder at the coarsest level; None: those of the preset.

    Raises:
        ValueError: see ``encoder_arguments`` and ``check_width``.
    """
    arguments = encoder_arguments(configuration, preset)
    width = decoder_width(arguments["n_stages"], preset, width)
    return HySparKMaskedAutoencoder(input_channels=input_channels, decoder_width=width, **arguments)


def segmentation_network(
    configuration: ConfigurationManager,
    input_channels: int,
    num_classes: int,
    preset: str,
    deep_supervision: bool = True,
) -> HySparKUNet:
    """HySparK's network of fine-tuning and prediction for a plan.

    Args:
        configuration: of the plan; where it names HySparKUNet, it says every size and the preset is not used.
        input_channels: channels of the image.
        num_classes: segmentation heads.
        preset: "S", "B" or "L".
        deep_supervision: logits of every level in training.

    Raises:
        ValueError: see ``encoder_arguments``.
    """
    if configuration.network_arch_class_name == OWN_ARCHITECTURE:
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            input_channels,
            num_classes,
            deep_supervision=deep_supervision,
        )
        return cast(HySparKUNet, network)
    return HySparKUNet(
        input_channels=input_channels,
        num_classes=num_classes,
        deep_supervision=deep_supervision,
        **encoder_arguments(configuration, preset),
    )
