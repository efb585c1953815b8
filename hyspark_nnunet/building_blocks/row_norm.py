"""Normalisation of the columns of a matrix by their own mean and variance: InstanceNorm of a channels-last sample."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# rows whose squares are added up before they join the sum of all
PART = 2**13


def normalise_columns(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(N, C) less the mean of each column, divided by its standard deviation, times weight (C), plus bias (C).

    Args:
        rows: of one sample.
        weight: None: 1.
        bias: None: 0.
        eps: added to the variance.
    """
    # tensors without storage, of other types, stand for those of a GPU
    on_cpu = rows.device.type == "cpu" and type(rows) is Tensor and not torch.compiler.is_compiling()
    # of a single row torch's function says that it has no variance
    if on_cpu and rows.dtype.itemsize >= 4 and len(rows) > 1:
        return _ExactOnCPU.apply(rows, weight, bias, eps)
    return F.batch_norm(rows, None, None, weight, bias, True, 0.0, eps)


class _ExactOnCPU(torch.autograd.Function):
    """torch's batch norm with an accurate variance.

    On a CPU, torch adds up the squares of all rows one after the other. In float32, with 2^19 rows, the result is wrong
    by 1e-4, where nn.InstanceNorm3d on channels-first images is wrong by 1e-7. So is this, for one more pass over the
    rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        mean = rows.mean(0)
        squares = torch.zeros_like(mean)
        for part in rows.split(PART):
            squares += (part - mean).square_().sum(0)
        variance = squares / len(rows)
        ctx.save_for_backward(rows, weight, mean, torch.rsqrt(variance + eps))
        ctx.eps, ctx.wanted = eps, [True, weight is not None, bias is not None]
        return F.batch_norm(rows, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, scale = ctx.saved_tensors
        backward = torch.ops.aten.native_batch_norm_backward
        return *backward(gradient, rows, weight, None, None, mean, scale, True, ctx.eps, ctx.wanted), None
