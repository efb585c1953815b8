"""Predicted and true organs drawn on the scans, for the demo."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hyspark_nnunet.demo.synthetic_data import FILE_ENDING, ORGANS

COLOURS = {"liver": "#f2b134", "spine": "#ef5350", "lungs": "#81c784"}
WINDOW_HU = (-900, 500)
BACKGROUND = "#101114"


def overlay_picture(images: Path, truth: Path, predictions: Path, path: Path, max_cases: int = 4) -> None:
    """Writes one PNG: per case an axial and a coronal slice, the prediction solid, the truth dashed.

    Args:
        images: folder of nnU-Net's images (``*_0000.nii.gz``).
        truth: folder of label files.
        predictions: folder of predicted label files; cases without one are left out.
        path: of the PNG.
        max_cases: columns.

    Raises:
        FileNotFoundError: no case has a prediction.
    """
    files = [file for file in sorted(truth.glob(f"*{FILE_ENDING}")) if (predictions / file.name).is_file()][:max_cases]
    if not files:
        raise FileNotFoundError(f"no prediction in {predictions} belongs to a case of {truth}")
    figure = Figure(figsize=(3.1 * len(files), 6.6), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(files), squeeze=False)
    for column, file in enumerate(files):
        stem = file.name.removesuffix(FILE_ENDING)
        volume = sitk.ReadImage(str(images / f"{stem}_0000{FILE_ENDING}"))
        image, true = sitk.GetArrayFromImage(volume), sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(predictions / file.name)))
        spacing = volume.GetSpacing()[::-1]
        for row, aspect in enumerate((spacing[1] / spacing[2], spacing[0] / spacing[2])):
            place = _fullest_slice(true, row)
            panel = axes[row, column]
            panel.imshow(
                np.take(image, place, row),
                cmap="gray",
                vmin=WINDOW_HU[0],
                vmax=WINDOW_HU[1],
                aspect=aspect,
                origin="lower" if row else "upper",
            )
            for organ, colour in COLOURS.items():
                for labels, style in ((predicted, "solid"), (true, "dashed")):
                    outline = np.take(labels, place, row) == ORGANS[organ]
                    if outline.any():
                        shade = colour if style == "solid" else "white"
                        panel.contour(outline, [0.5], colors=[shade], linestyles=style, linewidths=1.3)
            panel.set_axis_off()
        axes[0, column].set_title(stem, color="white", fontsize=10)
    keys = [Line2D([], [], color=colour, label=organ) for organ, colour in COLOURS.items()]
    keys.append(Line2D([], [], color="white", linestyle="dashed", label="truth"))
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), frameon=False, labelcolor="white", fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.07, wspace=0.03, hspace=0.03)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _fullest_slice(labels: np.ndarray, axis: int) -> int:
    """The slice that crosses most organs, and of those the one with most organ voxels."""
    planes = np.moveaxis(labels, axis, 0)
    return max(range(len(planes)), key=lambda place: (len(np.unique(planes[place])), np.count_nonzero(planes[place])))
