"""One optimizer step over several batches and all processes; skipped if a loss is not finite."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.training.runtime.ranks import any_rank


class NonFiniteLoss(RuntimeError):
    """Too many consecutive steps had a loss or a gradient that is not finite."""


def take_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    loss_of: Callable[[dict], Tensor],
    batches: Sequence[dict],
    clip: float,
    drop: Callable[[], None] = lambda: None,
) -> tuple[list[float], bool]:
    """One step with the mean gradient of the batches and, under DDP, of all processes.

    If the loss of any process is not finite, no process steps: weights, moments and BatchNorm's statistics are
    unchanged. A gradient scaler handles gradients that are not finite (it skips the step and lowers its scale); without
    a scaler they are treated like a loss that is not finite.

    Args:
        network: possibly wrapped in DDP, which synchronises gradients only in the last batch.
        optimizer: of the network.
        scaler: torch's GradScaler, or None.
        loss_of: forward and loss of a batch.
        batches: one, or several whose gradients are averaged.
        clip: gradients of a larger L2 norm are scaled down to it.
        drop: removes gradients that must not change any weight, before clipping and the check of gradients.

    Returns:
        the losses of this process, and whether the step was taken.
    """
    optimizer.zero_grad(set_to_none=True)
    statistics = [(m, [b.clone() for b in m.buffers()]) for m in network.modules() if isinstance(m, _BatchNorm)]
    losses = []
    for number, batch in enumerate(batches, start=1):
        with _without_synchronising(network, number < len(batches)):
            loss = loss_of(batch)
            part = loss / len(batches)
            (part if scaler is None else scaler.scale(part)).backward()
        losses.append(loss.detach())
    values = torch.stack(losses).float().cpu()
    taken = not any_rank(not bool(values.isfinite().all()), losses[0].device)
    if taken:
        drop()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(network.parameters(), clip)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif taken := bool(norm.isfinite()):  # gradients, and so their norm, are those of all processes
            optimizer.step()
    if not taken:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for module, before in statistics:
                for buffer, value in zip(module.buffers(), before, strict=True):
                    buffer.copy_(value)
    return values.tolist(), taken


def _without_synchronising(network: nn.Module, wanted: bool) -> Any:
    return network.no_sync() if wanted and isinstance(network, DistributedDataParallel) else nullcontext()
