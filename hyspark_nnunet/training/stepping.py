"""One optimizer step over several batches and all processes; skipped if a loss or a gradient is not finite."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.training.runtime.ranks import maximum_over_ranks


class NonFiniteLoss(RuntimeError):
    """Too many consecutive steps had a loss or a gradient that is not finite."""


class Step(NamedTuple):
    """What became of a step.

    Attributes:
        losses: of the batches of this process.
        taken: False: weights, moments and BatchNorm's statistics are unchanged, in all processes.
        scale_lowered: the step was skipped because gradients overflowed at a gradient scale above 1; the next step has
            a lower scale.
    """

    losses: list[float]
    taken: bool
    scale_lowered: bool = False


def take_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    loss_of: Callable[[dict], Tensor],
    batches: Sequence[dict],
    clip: float,
    drop: Callable[[], None] = lambda: None,
) -> Step:
    """One step with the mean gradient of the batches and, under DDP, of all processes.

    If the loss of any process or a gradient is not finite, no process steps: weights, moments and BatchNorm's
    statistics are unchanged. A gradient scaler then lowers its scale, unless a loss was not finite.

    The host waits for the device once: losses, their state in all processes, and the norm are read together.

    Args:
        network: possibly wrapped in DDP, which synchronises gradients only in the last batch.
        optimizer: of the network.
        scaler: torch's GradScaler, or None.
        loss_of: forward and loss of a batch.
        batches: one, or several whose gradients are averaged.
        clip: gradients of a larger L2 norm are scaled down to it.
        drop: removes gradients that must not change any weight, before clipping and the check of gradients.
    """
    optimizer.zero_grad(set_to_none=True)
    buffers = [b for m in network.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    statistics = [torch.empty_like(buffer) for buffer in buffers]
    _copy(buffers, statistics)
    losses = []
    for number, batch in enumerate(batches, start=1):
        with _without_synchronising(network, number < len(batches)):
            loss = loss_of(batch)
            part = loss / len(batches)
            (part if scaler is None else scaler.scale(part)).backward()
        losses.append(loss.detach().float())
    drop()
    if scaler is not None:
        scaler.unscale_(optimizer)
    # gradients, and so their norm, are those of all processes
    norm = nn.utils.clip_grad_norm_(network.parameters(), clip).to(losses[0])
    faulty = maximum_over_ranks((~torch.stack(losses).isfinite()).any().to(losses[0]))
    *values, norm_here, loss_is_faulty = torch.stack([*losses, norm, faulty]).cpu().tolist()
    taken = not loss_is_faulty and isfinite(norm_here)
    if taken:
        # not by the scaler, which would wait for the device to ask what the norm has said
        optimizer.step()
    else:
        optimizer.zero_grad(set_to_none=True)
        _copy(statistics, buffers)
    if scaler is None:
        return Step(values, taken)
    scale = None if taken else scaler.get_scale()
    # a loss that is not finite says nothing about the scale
    scaler.update(scale if loss_is_faulty else None)
    return Step(values, taken, scale_lowered=scale is not None and scaler.get_scale() < scale and scale > 1)


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies all tensors of a dtype at once: on CUDA a copy of each would be hundreds of launches."""
    for dtype in {source.dtype for source in sources}:
        pairs = [pair for pair in zip(targets, sources, strict=True) if pair[1].dtype == dtype]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def _without_synchronising(network: nn.Module, wanted: bool) -> Any:
    return network.no_sync() if wanted and isinstance(network, DistributedDataParallel) else nullcontext()
