"""Which memory format the depth-wise convolutions of a network take on a GPU.

torch has two kinds of kernels for them: cuDNN's for channels-last fields, and its own for channels-first ones, for
which a field is copied twice. Which is faster depends on the card, the versions and the sizes, so it is measured.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.layouts import DenseLayout
from hyspark_nnunet.building_blocks.mednext import LayoutConvolution

REPEATS = 3


def depthwise_convolutions(network: nn.Module) -> list[LayoutConvolution]:
    """Those of a network for which the memory format is chosen."""
    return [m for m in network.modules() if isinstance(m, LayoutConvolution) and m.groups > 1]


def choose_memory_formats(network: nn.Module, run: Callable[[], object]) -> list[str]:
    """Times every depth-wise convolution in both formats and keeps the faster one, forward and backward together.

    Args:
        network: not compiled yet.
        run: calls the network once, with a batch as in training.

    Returns:
        a line about each size: both times and the choice.
    """
    times: dict[tuple[int, ...], tuple[float, float]] = {}

    def measure(convolution: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(convolution, LayoutConvolution)
        field, layout = arguments
        size = tuple(field.shape)
        if size not in times:
            layout.prepare(convolution.weight.shape[2:])
            last, first = (seconds_of(convolution, layout, field, channels_first) for channels_first in (False, True))
            times[size] = last, first
        last, first = times[size]
        convolution.channels_first = first < last

    hooks = [convolution.register_forward_pre_hook(measure) for convolution in depthwise_convolutions(network)]
    try:
        # nnU-Net lets cuDNN choose its kernels by time, too, but only once the training begins
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        f"{' x '.join(map(str, size))}: {1e3 * last:.2f} ms channels-last, {1e3 * first:.2f} ms channels-first"
        for size, (last, first) in times.items()
    ]


@torch.enable_grad()
def seconds_of(convolution: LayoutConvolution, layout: DenseLayout, field: Tensor, channels_first: bool) -> float:
    """Median time of a forward and a backward pass; no gradient is kept."""
    field = field.detach().requires_grad_()
    inputs = [field, *convolution.parameters()]

    def once() -> float:
        begin = _now(field.device)
        result = convolution.compute(layout, channels_first, field)
        torch.autograd.grad(result, inputs, torch.ones_like(result))
        return _now(field.device) - begin

    once()  # libraries choose their kernels
    return statistics.median(once() for _ in range(REPEATS))


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
