"""A picture of some cases with the outline of their foreground, for a person to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from hyspark_nnunet.visualisation import BACKGROUND, PLANES, draw, grey_values, new_figure, save_figure

OUTLINE = "#ffb000"
CAPTION = "orange line: edge of the foreground in the label file"


def foreground_picture(cases: Sequence[tuple[str, str, str]], path: Path) -> None:
    """Writes one PNG: a row per case, its middle slices in three planes, the foreground's outline drawn.

    Args:
        cases: name, image file, label file.
        path: of the PNG.

    Raises:
        ValueError: no cases.
    """
    if not cases:
        raise ValueError("no cases to draw")
    column, top, bottom = 3.4, 0.35, 0.35  # inches
    height = top + len(cases) * column + bottom
    figure = new_figure(0.5 + 3 * column, height, BACKGROUND)
    grid = figure.add_gridspec(
        len(cases),
        3,
        left=0.05,
        right=0.995,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=0.03,
        hspace=0.03,
    )
    for row, (name, image_file, label_file) in enumerate(cases):
        image, label = (_upright(sitk.ReadImage(file)) for file in (image_file, label_file))
        volume, body = sitk.GetArrayFromImage(image).astype(np.float32), sitk.GetArrayFromImage(label) > 0
        low, high = np.percentile(np.nan_to_num(volume), (0.5, 99.5))
        spacing = image.GetSpacing()[::-1]
        for axis, plane in enumerate(PLANES):
            place = _middle(body, axis)
            first, second = (step for i, step in enumerate(spacing) if i != axis)
            axes = figure.add_subplot(grid[row, axis])
            flat, outline = np.take(volume, place, axis), np.take(body, place, axis)
            draw(axes, grey_values(flat, low, high), first / second, "upper" if axis == 0 else "lower", None)
            if outline.any() and not outline.all() and min(outline.shape) > 1:  # contour needs 2 x 2
                axes.contour(outline, levels=[0.5], colors=[OUTLINE], linewidths=1.1)
            if row == 0:
                axes.set_title(plane, color="white", fontsize=10)
            if axis == 0:
                share = f"{100 * body.mean():.0f} % of the voxels"
                axes.set_ylabel(f"{name[-42:]}\n{share}", color="white", fontsize=8)
    figure.text(0.5, 0.15 / height, CAPTION, color=OUTLINE, fontsize=9, ha="center", va="center")
    save_figure(figure, path, dpi=100)


def _upright(image: sitk.Image) -> sitk.Image:
    """Axes from right to left, front to back, feet to head, whatever the file's."""
    return sitk.DICOMOrient(image, "LPS")


def _middle(body: np.ndarray, axis: int) -> int:
    """The middle slice of those that cross the body."""
    crossed = np.flatnonzero(body.any(axis=tuple(i for i in range(3) if i != axis)))
    return int(crossed[len(crossed) // 2]) if len(crossed) else body.shape[axis] // 2
