"""Which mask units of a batch stay visible.

A mask is a BoolTensor ``visible`` of shape (B, 1, *grid), True = kept. One entry is one mask unit: a voxel of the
network's bottleneck, which is a block of ``prod(strides)`` voxels of the input. The same mask serves every stage.
Source: HySparK (arXiv 2408.05815), section 2; SparK (arXiv 2301.03580), section 3.1.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

VARIANCE_EPSILON = 1e-6  # added to a mask unit's variance where it is standardised


def unit_size(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Size of one mask unit in input voxels per axis: the product of the strides of all stages.

    Args:
        strides: per stage, the stride per axis, as in a plan (the first stage's is 1).
    """
    return tuple(prod(axis) for axis in zip(*strides, strict=True))


def mask_grid(patch_size: Sequence[int], unit: Sequence[int]) -> tuple[int, ...]:
    """Number of mask units per axis of a patch.

    Raises:
        ValueError: the mask unit does not divide the patch.
    """
    if len(patch_size) != len(unit):
        raise ValueError(
            f"patch size {tuple(patch_size)} has {len(patch_size)} axes, the mask unit {tuple(unit)} has {len(unit)}"
        )
    if any(p % u or p < u for p, u in zip(patch_size, unit, strict=True)):
        nearest = tuple(max(u, round(p / u) * u) for p, u in zip(patch_size, unit, strict=True))
        raise ValueError(
            f"patch size {tuple(patch_size)} is not divisible by the mask unit {tuple(unit)} (the product of the "
            f"strides): set 'patch_size' of the plan's configuration to a multiple, for example {list(nearest)}"
        )
    return tuple(p // u for p, u in zip(patch_size, unit, strict=True))


def num_visible_units(grid: Sequence[int], mask_ratio: float) -> int:
    """Number of units of each sample that stay visible: round(L * (1 - mask_ratio)).

    Raises:
        ValueError: the ratio is not strictly between 0 and 1, or leaves no visible or no hidden unit on this grid.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(
            f"mask_ratio is {mask_ratio}, but it must lie strictly between 0 and 1 (0.75 hides three quarters)"
        )
    units = prod(grid)
    visible = round(units * (1 - mask_ratio))
    if not 0 < visible < units:
        share = "visible" if visible == 0 else "hidden"
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves no {share} unit on the grid {tuple(grid)} of {units} mask units: "
            + (
                f"choose a mask_ratio from {1 / units:.3g} to {1 - 1 / units:.3g}, or a larger patch size"
                if units > 1
                else "choose a larger patch size; the patch must hold at least two mask units"
            )
        )
    return visible


def sample_visible(
    batch_size: int,
    grid: Sequence[int],
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    block: int = 1,
) -> Tensor:
    """Draws a mask: in each sample, the same number of units, chosen uniformly at random, stays visible.

    Args:
        batch_size: number of samples B.
        grid: number of mask units per axis.
        mask_ratio: share of the units that is hidden.
        generator: source of randomness; its device must be ``device``.
        device: where the mask is made; None: the generator's device, or the CPU.
        block: units per axis that are kept or hidden together. In each sample, one block may be visible in part, so
            that the number of visible units matches the ratio.

    Returns:
        BoolTensor (B, 1, *grid), True = visible.

    Raises:
        ValueError: see ``num_visible_units``.
    """
    visible_units = num_visible_units(grid, mask_ratio)
    if device is None and generator is not None:
        device = generator.device
    # all units of a block share one random number; the stable sort keeps their order
    coarse = [-(-size // block) for size in grid]
    draws = torch.rand(batch_size, 1, *coarse, generator=generator, device=device)
    draws = view_at(draws, [block] * len(coarse))[(..., *(slice(size) for size in grid))]
    order = draws.flatten(1).argsort(dim=1, stable=True)
    visible = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :visible_units], True)
    return visible.view(batch_size, 1, *grid)


def view_at(visible: Tensor, block: Sequence[int]) -> Tensor:
    """The mask on a finer grid: each unit becomes a block of ``block`` voxels.

    Args:
        visible: BoolTensor (B, 1, *grid), or any other tensor of values per unit.
        block: voxels per unit and axis on the finer grid.

    Returns:
        (B, 1, *(grid * block)).
    """
    for axis, width in enumerate(block):
        if width != 1:
            visible = visible.repeat_interleave(width, dim=axis + 2)
    return visible


def mean_and_variance(values: Tensor, counted: Tensor, dims: Sequence[int] | int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the counted values along ``dims``, which are kept; 0 where there are too few.

    Args:
        values: float32 or better.
        counted: BoolTensor that broadcasts to ``values``, True = counts.
        dims: to reduce.
    """
    counted = counted.expand_as(values)
    zero = values.new_zeros(())
    number = counted.sum(dims, keepdim=True)
    # by selection, not by a product: what does not count may be NaN
    mean = torch.where(counted, values, zero).sum(dims, keepdim=True) / number.clamp(min=1)
    squares = torch.where(counted, values - mean, zero).square()
    return mean, squares.sum(dims, keepdim=True) / (number - 1).clamp(min=1)
