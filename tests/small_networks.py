"""Arguments of networks, as a plan yields them: small ones, and those of the presets."""

from typing import Any

import torch

from hyspark_nnunet.architectures.presets import PRESETS


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
