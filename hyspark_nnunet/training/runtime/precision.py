"""The number format of pre-training's forward pass."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where a CUDA device computes in it, else nnU-Net's float16; None: no autocast, as nnU-Net on a CPU.

    bfloat16 has float32's range: no gradient scaling, no skipped steps.

    Args:
        device: of the training.
    """
    if device.type != "cuda":
        return None
    native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16
