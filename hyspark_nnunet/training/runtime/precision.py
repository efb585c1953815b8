"""The number format of pre-training's forward pass."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 if the CUDA device supports it, else nnU-Net's float16; None: no autocast, as in nnU-Net on a CPU.

    bfloat16 has the range of float32: it needs no gradient scaling and skips no steps.

    Args:
        device: of the training.
    """
    if device.type != "cuda":
        return None
    native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16
