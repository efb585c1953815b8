"""The reconstruction error of complete cases, patch by patch."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.masking import mask_grid, view_at
from hyspark_nnunet.training.data.held_out import SEED, fixed_mask
from hyspark_nnunet.training.loss import loss_of_predicting_means, reconstruction_loss
from hyspark_nnunet.visualisation import restore_intensities

METRICS = ("reconstruction_loss", "loss_of_predicting_means", "mean_absolute_error")


class CaseReconstruction(NamedTuple):
    """The result for one case.

    Attributes:
        loss: mean ``reconstruction_loss`` of the patches.
        loss_of_means: that of predicting the mean of each hidden unit; below 1 if units are constant, as air is.
        mean_absolute_error: over hidden voxels, in preprocessed intensities.
        n_patches: number of patches that cover the case.
        image: (C, *patch), the patch in the middle of the case (2d: of the middle slice).
        visible: BoolTensor (1, *grid) of that patch.
        restored: (C, *patch), its reconstruction in intensities.
        counted: BoolTensor (1, *patch), False for voxels with the ignore label; None: all count.
    """

    loss: float
    loss_of_means: float
    mean_absolute_error: float
    n_patches: int
    image: Tensor
    visible: Tensor
    restored: Tensor
    counted: Tensor | None

    @property
    def metrics(self) -> dict[str, float]:
        values = (self.loss, self.loss_of_means, self.mean_absolute_error)
        return dict(zip(METRICS, values, strict=True))


def reconstruct_case(
    image: Tensor,
    patch_size: Sequence[int],
    unit: Sequence[int],
    mask_ratio: float,
    reconstruct: Callable[[Tensor, Tensor], Tensor],
    mask_block: int = 1,
    standardised: bool = True,
    counted: Tensor | None = None,
) -> CaseReconstruction | None:
    """Covers a case with patches, hides units of each with a fixed mask, and compares the reconstruction.

    Args:
        image: preprocessed, (C, *spatial); padded with zeros if smaller than a patch.
        patch_size: voxels per axis; with two axes, an image of three is covered slice by slice.
        unit: voxels of a mask unit per axis.
        mask_ratio: share of hidden units.
        reconstruct: maps image (C, *patch) and visible (1, *grid) to the reconstruction (C, *patch).
        mask_block: units per axis that are hidden together.
        standardised: the reconstruction is in standardised units; False: in intensities.
        counted: BoolTensor (1, *spatial), False for voxels with the ignore label; None: all count. Patches without a
            hidden voxel that counts do not enter the means.

    Returns:
        the result; None: no hidden voxel of the case counts.
    """
    grid = mask_grid(patch_size, unit)
    window = (*[1] * (image.ndim - 1 - len(patch_size)), *patch_size)
    image = pad_nd_image(image, window)
    if counted is not None:
        counted = pad_nd_image(counted, window, kwargs={"value": True})
    steps = compute_steps_for_sliding_window(tuple(image.shape[1:]), window, 1.0)
    corners = torch.cartesian_prod(*(torch.tensor(s) for s in steps)).view(-1, len(steps)).tolist()
    losses, of_means, errors = [], [], []
    middle = len(corners) // 2
    for index, corner in enumerate(corners):
        place = (slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))
        patch = image[place].reshape(len(image), *patch_size)
        counts = None if counted is None else counted[place].reshape(1, *patch_size)
        visible = fixed_mask(index, 1, grid, mask_ratio, mask_block)[0]
        reconstruction = reconstruct(patch, visible)
        restored = restore_intensities(reconstruction, patch, unit, counts) if standardised else reconstruction
        hidden = ~view_at(visible[None], unit)[0].expand_as(patch)
        judged = hidden if counts is None else hidden & counts
        if judged.any():
            of_batch = None if counts is None else counts[None]
            batch = (reconstruction[None], patch[None], visible[None])
            losses.append(reconstruction_loss(*batch, standardised, of_batch).item())
            of_means.append(loss_of_predicting_means(*batch[1:], standardised, of_batch))
            errors.append((restored - patch)[judged].abs().mean().item())
        if index == middle:
            shown = (patch, visible, restored, counts)
    if not losses:
        return None
    loss, loss_of_means, error = (sum(values) / len(values) for values in (losses, of_means, errors))
    return CaseReconstruction(loss, loss_of_means, error, len(corners), *shown)


def cases_to_reconstruct(cases: Sequence[str], limit: int | None) -> list[str]:
    """At most ``limit`` cases, the same in every run, in order; None: all."""
    cases = sorted(cases)
    return cases if limit is None or limit >= len(cases) else sorted(random.Random(SEED).sample(cases, limit))


def write_summary(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Writes the results of all cases and their mean as JSON.

    Args:
        results: "case", "n_patches" and "metrics" of each case.
        about: further entries.
        path: of the file.

    Returns:
        the mean of each metric; empty if there are no results.
    """
    mean = {name: float(np.mean([result["metrics"][name] for result in results])) for name in METRICS if results}
    with replacing(path) as beside:
        beside.write_text(json.dumps({"metric_per_case": results, "mean": mean, **about}, indent=2), encoding="utf-8")
    return mean
