"""The reconstruction error of a whole case, patch by patch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor

from hyspark_nnunet.masking import mask_grid, view_at
from hyspark_nnunet.training.data.held_out import fixed_mask
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.visualisation import restore_intensities


class CaseReconstruction(NamedTuple):
    """What became of one case.

    Attributes:
        loss: mean of the patches' ``reconstruction_loss``; 1 is what predicting each unit's mean gives.
        mean_absolute_error: over hidden voxels, in units of the preprocessed intensities.
        n_patches: patches that cover the case.
        image: (C, *patch), the patch in the middle (2d: of the slice in the middle).
        visible: BoolTensor (1, *grid) of that patch.
        restored: (C, *patch), its reconstruction in intensities.
    """

    loss: float
    mean_absolute_error: float
    n_patches: int
    image: Tensor
    visible: Tensor
    restored: Tensor


def reconstruct_case(
    image: Tensor,
    patch_size: Sequence[int],
    unit: Sequence[int],
    mask_ratio: float,
    reconstruct: Callable[[Tensor, Tensor], Tensor],
    mask_block: int = 1,
    standardised: bool = True,
) -> CaseReconstruction:
    """Covers a case with patches, hides units of each by a fixed mask, and compares.

    Args:
        image: preprocessed, (C, *spatial); padded with zeros where smaller than a patch.
        patch_size: voxels per axis; of two axes, where the image has three: it is covered slice by slice.
        unit: voxels of a mask unit per axis.
        mask_ratio: share of hidden units.
        reconstruct: image (C, *patch) and visible (1, *grid) to the reconstruction (C, *patch).
        mask_block: units per axis that are hidden together.
        standardised: is the reconstruction that of standardised units, or of intensities?
    """
    grid = mask_grid(patch_size, unit)
    window = (*[1] * (image.ndim - 1 - len(patch_size)), *patch_size)
    image = pad_nd_image(image, window)
    steps = compute_steps_for_sliding_window(tuple(image.shape[1:]), window, 1.0)
    corners = torch.cartesian_prod(*(torch.tensor(s) for s in steps)).view(-1, len(steps)).tolist()
    losses, errors = [], []
    middle = len(corners) // 2
    for index, corner in enumerate(corners):
        patch = image[(slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))]
        patch = patch.reshape(len(image), *patch_size)
        visible = fixed_mask(index, 1, grid, mask_ratio, mask_block)[0]
        reconstruction = reconstruct(patch, visible)
        restored = restore_intensities(reconstruction, patch, unit) if standardised else reconstruction
        hidden = ~view_at(visible[None], unit)[0].expand_as(patch)
        losses.append(reconstruction_loss(reconstruction[None], patch[None], visible[None], standardised).item())
        errors.append((restored - patch)[hidden].abs().mean().item())
        if index == middle:
            shown = (patch, visible, restored)
    return CaseReconstruction(
        sum(losses) / len(losses), sum(errors) / len(errors), len(corners), shown[0], shown[1], shown[2]
    )
