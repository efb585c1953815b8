"""Learning rate and weight decay over a training.

The curves are pure functions of the training's progress, from 0 at its start to 1 at its end. A resumed training thus
goes on at the same value, and shorter trainings run through the same curve.
"""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

# parts of the peak learning rate; source: SparK (arXiv 2301.03580), pretrain/utils/lr_control.py
WARMUP_START = 0.005
COSINE_END = 0.001


def warmup_cosine(progress: float, warmup_fraction: float) -> float:
    """Factor on the learning rate: linear from WARMUP_START to 1, then half a cosine down to COSINE_END.

    Args:
        progress: of the training, in [0, 1].
        warmup_fraction: part of the training that is warm-up, in [0, 1).
    """
    if progress < warmup_fraction:
        return _line(progress / warmup_fraction, WARMUP_START, 1.0)
    return cosine_between(_after(progress, warmup_fraction), 1.0, COSINE_END)


def warmup_polynomial(progress: float, warmup_fraction: float, exponent: float = 0.9) -> float:
    """Factor on the learning rate: linear from WARMUP_START to 1, then nnU-Net's polynomial down to 0.

    Without a warm-up it is nnU-Net's PolyLRScheduler.

    Args:
        progress: of the training, in [0, 1].
        warmup_fraction: part of the training that is warm-up, in [0, 1).
        exponent: of the polynomial.
    """
    if progress < warmup_fraction:
        return _line(progress / warmup_fraction, WARMUP_START, 1.0)
    return (1 - _after(progress, warmup_fraction)) ** exponent


def decoder_first(progress: float, alone_fraction: float, curve: Callable[[float], float]) -> float:
    """Factor on the learning rate: linear from WARMUP_START to 1 while the decoder trains alone, then the curve.

    Source: the warm-up of Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation"
    (arXiv 2410.23132): the decoder alone, then the whole network with a second warm-up.

    Args:
        progress: of the training, in [0, 1].
        alone_fraction: part of the training in which the decoder trains alone, in [0, 1).
        curve: maps the progress of the rest, in [0, 1], to its factor.
    """
    if progress < alone_fraction:
        return _line(progress / alone_fraction, WARMUP_START, 1.0)
    return curve(_after(progress, alone_fraction))


def frozen_first(progress: float, frozen_fraction: float) -> float:
    """Further factor on the encoder's learning rate: 0 while it is frozen, then 1.

    Args:
        progress: of the training, in [0, 1].
        frozen_fraction: part of the training in which the encoder is frozen.
    """
    return 0.0 if progress < frozen_fraction else 1.0


def cosine_between(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _line(progress: float, start: float, end: float) -> float:
    return start + (end - start) * progress


def _after(progress: float, warmup_fraction: float) -> float:
    """Progress of the part after the warm-up."""
    return (progress - warmup_fraction) / (1 - warmup_fraction)


def _progress(epoch: float, num_epochs: int, anchor_epoch: float, anchor_progress: float) -> float:
    """Progress: ``anchor_progress`` at the anchor, 1 at the end, linear between them."""
    if num_epochs <= anchor_epoch:
        return 1.0
    part = (epoch - anchor_epoch) / (num_epochs - anchor_epoch)
    return anchor_progress + (1 - anchor_progress) * min(max(part, 0.0), 1.0)


class ProgressScheduler:
    """Sets learning rate and weight decay for a fractional epoch; replaces nnU-Net's PolyLRScheduler.

    The values depend only on the epoch as long as the length of the training does not change. If a resumed training has
    another length (``continue_from``), the rest of the curve is stretched over the remaining epochs: no value jumps.

    Args:
        optimizer: each group's learning rate is its peak, kept as ``group["initial_lr"]`` as in PyTorch's schedulers.
        num_epochs: length of the training.
        lr_factor: maps progress in [0, 1] to the factor on the peak learning rate.
        weight_decay: maps progress to the weight decay of all groups whose weight decay is not zero; the others keep 0.
            None: no change.
        encoder_factor: maps progress to a further factor on the rate of the groups whose ``part`` is "encoder".
        curve_epochs: length of the training for which the curve was made; None: ``num_epochs``.

    Raises:
        ValueError: the training has no epoch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_epochs: int,
        lr_factor: Callable[[float], float],
        weight_decay: Callable[[float], float] | None = None,
        encoder_factor: Callable[[float], float] | None = None,
        curve_epochs: int | None = None,
    ) -> None:
        if num_epochs < 1:
            raise ValueError(f"num_epochs is {num_epochs}, but a schedule needs at least 1 epoch")
        self.optimizer = optimizer
        self.num_epochs = num_epochs
        self.curve_epochs = curve_epochs or num_epochs
        # (epoch, progress), from which progress is linear to 1
        self.anchor = (0.0, 0.0)
        self.lr_factor = lr_factor
        self.weight_decay = weight_decay
        self.encoder_factor = encoder_factor
        # also kept here: loading an optimizer's state replaces the groups by those of the checkpoint and its recipe
        self.initial_lrs = [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.decays = [group.get("weight_decay", 0) != 0 for group in optimizer.param_groups]
        self.encoder = [group.get("part") == "encoder" for group in optimizer.param_groups]
        self.step(0)

    def progress(self, epoch: float) -> float:
        """Part of the curve that is done at this epoch, in [0, 1]."""
        return _progress(epoch, self.num_epochs, *self.anchor)

    def state_dict(self) -> dict[str, Any]:
        """The input of ``continue_from``: numbers only."""
        return {"curve_epochs": self.curve_epochs, "num_epochs": self.num_epochs, "anchor": list(self.anchor)}

    def continue_from(self, state: dict[str, Any], epoch: float) -> None:
        """Resumes at ``epoch`` a training whose scheduler had this ``state_dict``, at the same progress."""
        earlier = (float(state["anchor"][0]), float(state["anchor"][1]))
        same_length = state["num_epochs"] == self.num_epochs
        self.anchor = earlier if same_length else (epoch, _progress(epoch, state["num_epochs"], *earlier))

    def step(self, epoch: float) -> None:
        """Sets the values of all groups for this epoch; 2.5 is the middle of the third epoch."""
        progress = self.progress(epoch)
        factor = self.lr_factor(progress)
        encoder_factor = 1.0 if self.encoder_factor is None else self.encoder_factor(progress)
        kept = zip(self.optimizer.param_groups, self.initial_lrs, self.decays, self.encoder, strict=True)
        for group, initial_lr, decays, is_encoder in kept:
            group["initial_lr"] = initial_lr
            group["lr"] = initial_lr * factor * (encoder_factor if is_encoder else 1.0)
            if self.weight_decay is not None:
                group["weight_decay"] = self.weight_decay(progress) if decays else 0.0
