"""Arguments of networks, as a plan yields them: small ones, and those of the presets."""

from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch.nn.modules.batchnorm import _NormBase

from hyspark_nnunet.architectures.presets import PRESETS
from tests.nnunet_plans import REQUIRING_IMPORT, network_arguments


def cubic(n_stages: int) -> dict[str, Any]:
    """Kernels of 3^3 and strides that halve every axis."""
    return {
        "n_stages": n_stages,
        "conv_op": torch.nn.Conv3d,
        "kernel_sizes": ((3, 3, 3),) * n_stages,
        "strides": ((1, 1, 1),) + ((2, 2, 2),) * (n_stages - 1),
    }


def small_arguments(n_stages: int = 3, **changes: Any) -> dict[str, Any]:
    """Arguments of a small network; any of them can be replaced."""
    return {
        "input_channels": 1,
        **cubic(n_stages),
        "features_per_stage": (4, 6, 8, 12, 16)[:n_stages],
        "n_blocks_per_stage": (1, 2, 1, 1, 1)[:n_stages],
        "expansion_per_stage": (2, 3, 2, 2, 2)[:n_stages],
        "vit_n_blocks": 2,
        "vit_num_heads": 2,
        **changes,
    }


def preset_arguments(preset: str, n_stages: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a preset's network with cubic strides; any of them can be replaced."""
    return {"input_channels": 1, **cubic(n_stages), **PRESETS[preset].encoder_sizes(n_stages), **changes}


# as nnU-Net's plans name them, and one that only a user's plan asks for
PLAN_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "with BottleneckD")


def plan_network(geometry: Any, kind: str, norm: str = "InstanceNorm", **changes: Any) -> torch.nn.Module:
    """nnU-Net's network for a geometry; all norm weights and biases are drawn at random.

    nnU-Net zeroes the last norm of each residual block, which would hide the block's convolutions from a comparison.
    """
    torch.manual_seed(0)
    dims, n = len(geometry.image_size), len(geometry.strides)
    arguments: dict[str, Any] = {
        "n_stages": n,
        "features_per_stage": geometry.arguments()["features_per_stage"],
        "kernel_sizes": geometry.kernel_sizes,
        "strides": geometry.strides,
        **network_arguments(dims, n, norm),
    }
    imported = [*REQUIRING_IMPORT]
    if kind == "PlainConvUNet":
        arguments["n_conv_per_stage"] = (2, 1, 2, 1, 1)[:n]
    else:
        arguments["n_blocks_per_stage"] = (1, 2, 1, 1, 1)[:n]
    if kind == "with BottleneckD":
        arguments |= {"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD"}
        arguments |= {"bottleneck_channels": 3}
        imported += ["block"]
    name = "PlainConvUNet" if kind == "PlainConvUNet" else "ResidualEncoderUNet"
    network = get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{name}",
        arguments | changes,
        imported,
        geometry.input_channels,
        3,
        deep_supervision=False,
    )
    for module in network.modules():
        if isinstance(module, _NormBase):
            torch.nn.init.normal_(module.weight, 1.0, 0.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.5)
    return network
