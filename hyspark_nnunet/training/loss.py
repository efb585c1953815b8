"""The loss of pre-training."""

from math import prod

import torch
from torch import Tensor

from hyspark_nnunet.building_blocks.layouts import to_channels_last
from hyspark_nnunet.building_blocks.visible_units import to_units

EPSILON = 1e-6  # added to a unit's variance


def reconstruction_loss(reconstruction: Tensor, image: Tensor, visible: Tensor, standardised: bool = True) -> Tensor:
    """Mean squared error of the hidden mask units, each standardised by its own mean and variance.

    Predicting the mean of every unit gives 1. Computed in float32 or better, also under autocast: the
    variance of a CT patch overflows half precision. Source: HySparK (arXiv 2408.05815), section 2; the standardised
    target is that of MAE (arXiv 2111.06377), section 3.

    Args:
        reconstruction: (B, C, *spatial), in standardised units.
        image: (B, C, *spatial).
        visible: BoolTensor (B, 1, *grid), True = kept.
        standardised: False: the reconstruction is in the image's intensities.

    Returns:
        scalar: mean over voxels and channels of a unit, then over the hidden units.
    """
    error = unit_errors(reconstruction, image, visible.shape[2:], standardised)
    hidden = ~visible.flatten(1)
    # by selection, not by a product: NaN in a visible unit must not matter
    return torch.where(hidden, error, error.new_zeros(())).sum() / hidden.sum()


def unit_errors(
    reconstruction: Tensor, image: Tensor, grid: tuple[int, ...] | torch.Size, standardised: bool = True
) -> Tensor:
    """Mean squared error of every mask unit against the image, (B, L), units in row-major order."""
    with torch.autocast(image.device.type, enabled=False):
        target, predicted = (_units(tensor, grid) for tensor in (image, reconstruction))
        if standardised:
            variance, mean = torch.var_mean(target, dim=2, keepdim=True)  # unbiased
            target = (target - mean) * (variance + EPSILON).rsqrt()
        return (predicted - target).square().mean(dim=(2, 3))


def loss_of_predicting_means(image: Tensor, visible: Tensor, standardised: bool = True) -> float:
    """The ``reconstruction_loss`` of predicting the mean of every hidden unit, with which a network starts."""
    units = _units(image, visible.shape[2:])
    errors = units.var(dim=2, correction=0)
    if standardised:
        errors = errors / (units.var(dim=2) + EPSILON)
    return errors.mean(2)[~visible.flatten(1)].mean().item()


def _units(image: Tensor, grid: tuple[int, ...] | torch.Size) -> Tensor:
    """(B, L, voxels of a unit, C), in float32 or better."""
    block = [n // g for n, g in zip(image.shape[2:], grid, strict=True)]
    units = to_units(to_channels_last(image.to(torch.promote_types(image.dtype, torch.float32))), block)
    return units.reshape(len(image), prod(grid), prod(block), image.shape[1])
