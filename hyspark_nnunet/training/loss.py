"""The loss of pre-training."""

from math import prod

import torch
from torch import Tensor

from hyspark_nnunet.building_blocks.layouts import to_channels_last
from hyspark_nnunet.building_blocks.visible_units import to_units
from hyspark_nnunet.masking import VARIANCE_EPSILON, mean_and_variance


def reconstruction_loss(
    reconstruction: Tensor, image: Tensor, visible: Tensor, standardised: bool = True, counted: Tensor | None = None
) -> Tensor:
    """Mean squared error of the hidden mask units, each standardised by its own mean and variance.

    Predicting the mean of a unit gives 1, or 0 where the unit is constant. Computed in float32 or better, also under
    autocast: the variance of a CT patch overflows half precision. Source: HySparK (arXiv 2408.05815), section 2; the
    standardised target is that of MAE (arXiv 2111.06377), section 3.

    Args:
        reconstruction: (B, C, *spatial), in standardised units.
        image: (B, C, *spatial).
        visible: BoolTensor (B, 1, *grid), True = kept.
        standardised: False: the reconstruction is in the image's intensities.
        counted: BoolTensor (B, 1, *spatial), False for voxels with the ignore label; None: all count. A unit's mean,
            variance and error are those of its counted voxels. Units without any are left out.

    Returns:
        scalar: mean over voxels and channels of a unit, then over the hidden units; 0 if no hidden voxel counts.
    """
    grid = visible.shape[2:]
    error = unit_errors(reconstruction, image, grid, standardised, counted)
    hidden = ~visible.flatten(1)
    if counted is not None:
        hidden = hidden & _units(counted, grid).any(dim=(2, 3))
    # by selection, not by a product: NaN in a visible unit must not matter
    total = torch.where(hidden, error, error.new_zeros(())).sum()
    # a mask hides at least one unit
    return total / (hidden.sum() if counted is None else hidden.sum().clamp(min=1))


def unit_errors(
    reconstruction: Tensor,
    image: Tensor,
    grid: tuple[int, ...] | torch.Size,
    standardised: bool = True,
    counted: Tensor | None = None,
) -> Tensor:
    """Mean squared error of every mask unit against the image, (B, L), units in row-major order."""
    with torch.autocast(image.device.type, enabled=False):
        target, predicted = (_units(_exact(tensor), grid) for tensor in (image, reconstruction))
        if counted is not None:
            return _counted_errors(predicted, target, _units(counted, grid), standardised)
        if standardised:
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)  # unbiased
            target = (target - mean) * (variance + VARIANCE_EPSILON).rsqrt()
        return (predicted - target).square().mean(dim=(2, 3))


def _counted_errors(predicted: Tensor, target: Tensor, counted: Tensor, standardised: bool) -> Tensor:
    if standardised:
        mean, variance = mean_and_variance(target, counted, 2)
        target = (target - mean) * (variance + VARIANCE_EPSILON).rsqrt()
    counted = counted.expand_as(target)
    # by selection before the square: its gradient would be NaN times 0 where an ignored voxel is NaN
    difference = torch.where(counted, predicted - target, target.new_zeros(()))
    return difference.square().sum(dim=(2, 3)) / counted.sum(dim=(2, 3)).clamp(min=1)


def loss_of_predicting_means(
    image: Tensor, visible: Tensor, standardised: bool = True, counted: Tensor | None = None
) -> float:
    """The ``reconstruction_loss`` of predicting the mean of every hidden unit, with which a network starts."""
    grid = visible.shape[2:]
    units = _units(_exact(image), grid)
    of_unit = torch.ones_like(units[:, :, :, :1], dtype=torch.bool) if counted is None else _units(counted, grid)
    _, variance = mean_and_variance(units, of_unit, 2)
    number = of_unit.sum(2, keepdim=True)
    errors = variance * (number - 1) / number.clamp(min=1)
    if standardised:
        errors = errors / (variance + VARIANCE_EPSILON)
    hidden = ~visible.flatten(1) & of_unit.any(dim=(2, 3))
    return errors.mean(dim=(2, 3))[hidden].mean().item() if hidden.any() else 0.0


def _exact(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _units(image: Tensor, grid: tuple[int, ...] | torch.Size) -> Tensor:
    """(B, L, voxels of a unit, C)."""
    block = [n // g for n, g in zip(image.shape[2:], grid, strict=True)]
    units = to_units(to_channels_last(image), block)
    return units.reshape(len(image), prod(grid), prod(block), image.shape[1])
