"""Comparing weights bit by bit."""

from collections.abc import Mapping

import torch
from torch import Tensor


def differing(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that the other state dict does not have, or has with other bits."""
    return [name for name, tensor in state.items() if name not in other or not _bit_equal(tensor, other[name])]


def _bit_equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # NaN differs from itself, its bits do not
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
