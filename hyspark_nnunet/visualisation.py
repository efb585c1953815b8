"""Pictures of pre-training: hidden blocks, reconstructions, and the loss over the epochs.

Figures are drawn without pyplot, which has global state: so a trainer or a worker process can draw them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.masking import VARIANCE_EPSILON, mean_and_variance

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

PLANES = ("axial", "coronal", "sagittal")  # the plane at a fixed first, second, third axis
SLICE = ("slice",)  # of 2d configurations: one plane, whose direction is unknown
HIDDEN_COLOUR = (84, 110, 148)  # slate blue: no grey value can be mistaken for it
BACKGROUND = (16, 17, 20)
IGNORED_COLOUR = (122, 72, 40)  # brown
NOT_JUDGED = (46, 49, 57)  # visible and ignored voxels in the column of errors
ERROR_COLOURS = "inferno"
COLUMNS = ("input", "visible to the network", "reconstruction", "absolute error, hidden voxels")
CAPTION = "Blue: hidden. Dark grey: visible."
STANDARDISED_CAPTION = (
    " Hidden blocks of the reconstruction are rescaled to the mean and standard deviation of the input block: the "
    "network predicts standardised blocks."
)
IGNORED_CAPTION = " Brown: hidden voxels with the ignore label, which do not count."


class Example(NamedTuple):
    """A patch to draw; ``counted`` is (1, *spatial), False for voxels with the ignore label, None: all count."""

    name: str
    image: npt.ArrayLike | Tensor
    visible: npt.ArrayLike | Tensor
    reconstruction: npt.ArrayLike | Tensor
    counted: npt.ArrayLike | Tensor | None = None


class Panels(NamedTuple):
    """One row of a picture.

    Attributes:
        input: (height, width), uint8.
        masked: (height, width, 3), uint8: hidden mask units in HIDDEN_COLOUR, ignored voxels in IGNORED_COLOUR.
        reconstruction: (height, width), uint8: hidden units of the reconstruction, visible ones of the input.
        error: (height, width), the absolute error; NaN at visible and ignored voxels.
        aspect: height of a voxel over its width.
        place: which slice.
    """

    input: npt.NDArray[np.uint8]
    masked: npt.NDArray[np.uint8]
    reconstruction: npt.NDArray[np.uint8]
    error: FloatArray
    aspect: float
    place: int


def restore_intensities(
    reconstruction: Tensor, image: Tensor, unit: Sequence[int], counted: Tensor | None = None
) -> Tensor:
    """Puts back the mean and the standard deviation that the loss takes out of each mask unit.

    The inverse of the standardised target of ``reconstruction_loss``: per unit and channel, sqrt(variance + 1e-6) with
    the unbiased variance of the input.

    Args:
        reconstruction: (C, *spatial), standardised per unit.
        image: (C, *spatial), the network's input before masking.
        unit: voxels of a mask unit per axis.
        counted: BoolTensor (1, *spatial), False for voxels with the ignore label; None: all count.

    Returns:
        (C, *spatial), in the image's intensities, float32 or better.

    Raises:
        ValueError: shapes differ, or a mask unit does not divide the image.
    """
    if reconstruction.shape != image.shape:
        raise ValueError(f"reconstruction is {tuple(reconstruction.shape)}, but image is {tuple(image.shape)}")
    spatial = image.shape[1:]
    if len(spatial) != len(unit) or any(n % u for n, u in zip(spatial, unit, strict=True)):
        raise ValueError(f"image of {tuple(spatial)} voxels is not a multiple of mask units of {tuple(unit)} voxels")
    split = [size for n, u in zip(spatial, unit, strict=True) for size in (n // u, u)]
    inside_unit = tuple(range(2, 1 + len(split), 2))
    dtype = torch.promote_types(image.dtype, torch.float32)  # the variance of a CT patch overflows half
    blocks = image.to(dtype).reshape(image.shape[0], *split)
    if counted is None:
        variance, mean = torch.var_mean(blocks, dim=inside_unit, keepdim=True)
    else:
        mean, variance = mean_and_variance(blocks, counted.reshape(1, *split), inside_unit)
    predicted = reconstruction.to(dtype).reshape(blocks.shape)
    return (predicted * (variance + VARIANCE_EPSILON).sqrt() + mean).reshape(image.shape)


def reconstruction_pictures(
    examples: Sequence[Example],
    path: Path | str,
    title: str | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    standardised: bool = True,
) -> None:
    """Writes input, masked input, reconstruction and absolute error of examples, in three planes, as one PNG.

    The plane's names hold for nnU-Net's usual order of axes (z, y, x). A slice of a 2d configuration, (C, y, x), is one
    plane. Of several channels the first is shown.

    Args:
        examples: one below the other; reconstructions in the image's intensities (see ``restore_intensities``).
        path: of the PNG, which is replaced atomically.
        title: above the picture.
        spacing: size of a voxel (z, y, x), or (y, x).
        standardised: the network predicted standardised units, which were rescaled.

    Raises:
        ValueError: no examples, or shapes that do not fit together.
    """
    if not examples:
        raise ValueError("no examples to draw")
    rows = [
        (example.name, f"{plane}, slice {panels.place}" if plane in PLANES else plane, panels)
        for example in examples
        for plane, panels in _panels(example, spacing).items()
    ]
    heights = [panels.input.shape[0] * panels.aspect / panels.input.shape[1] for _, _, panels in rows]
    column, caption = 2.6, 0.45  # inches
    header = 0.45 + (0.35 if title else 0)
    width, height = 0.75 + 4 * column + 0.75, header + column * sum(heights) + 0.08 * len(rows) + caption
    figure = new_figure(width, height, BACKGROUND)
    grid = figure.add_gridspec(
        len(rows),
        5,
        width_ratios=[1, 1, 1, 1, 0.05],
        height_ratios=heights,
        left=0.62 / width,
        right=1 - 0.55 / width,
        bottom=caption / height,
        top=1 - header / height,
        wspace=0.03,
        hspace=0.08 / (column * sum(heights) / len(rows)),
    )
    errors = np.concatenate([panels.error[np.isfinite(panels.error)] for _, _, panels in rows])
    largest = float(np.percentile(errors, 99.5)) if errors.size else 1.0
    colour_map = colormaps[ERROR_COLOURS].with_extremes(bad=_unit_range(NOT_JUDGED))
    colours = ScalarMappable(Normalize(0, largest or 1.0), colour_map)
    for index, (name, plane, panels) in enumerate(rows):
        shown: tuple[np.ndarray, ...] = (panels.input, panels.masked, panels.reconstruction, panels.error)
        # back of the patient down; head up
        origin = "lower" if plane.startswith(("coronal", "sagittal")) else "upper"
        for place, picture in enumerate(shown):
            axes = figure.add_subplot(grid[index, place])
            draw(axes, picture, panels.aspect, origin, colours if place == 3 else None)
            if place == 0:
                axes.set_ylabel(f"{name}\n{plane}".strip(), color="white", fontsize=9)
            if index == 0:
                axes.set_title(COLUMNS[place], color="white", fontsize=10)
    bar = figure.colorbar(colours, cax=figure.add_subplot(grid[:, 4]))
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.outline.set_visible(False)
    if title:
        figure.text(0.5, 1 - 0.28 / height, title, color="white", fontsize=13, ha="center", va="center")
    ignoring = any(example.counted is not None for example in examples)
    said = CAPTION + STANDARDISED_CAPTION * standardised + IGNORED_CAPTION * ignoring
    figure.text(0.5, 0.2 / height, said, color="#b9bec9", fontsize=8, ha="center", va="center")
    save_figure(figure, path, dpi=110)


def progress_picture(
    log: Mapping[str, Sequence[Any]] | Callable[[str, Any], Sequence[Any]],
    path: Path | str,
    probe: Sequence[float] | None = None,
    probe_before: float | None = None,
    loss_of_means: float | None = None,
) -> None:
    """Writes reconstruction loss, learning rate, duration and, where there is one, the probe's Dice over the epochs.

    Args:
        log: the lists of nnU-Net's local logger by name, as in a checkpoint's "logging"; or the logger's ``get_value``.
            Lists of unequal length (an epoch that is not over) are cut to the shortest.
        path: of the PNG, which is replaced atomically.
        probe: Dice of the linear probe by epoch, NaN where it was not asked; None: there is no probe.
        probe_before: its Dice before the first step, where it is known.
        loss_of_means: what predicting each hidden block's mean gives on the validation patches, where it is known.
    """

    def lists(*names: str) -> list[FloatArray]:
        found = [list(log(name, None) if callable(log) else log.get(name, ())) for name in names]
        length = min(len(values) for values in found)
        return [np.array(values[:length], dtype=np.float64) for values in found]

    n_panels = 3 if probe is None else 4
    figure = new_figure(13 / 3 * n_panels, 3.9)
    losses, rates, durations, *more = figure.subplots(1, n_panels)
    train, validation = lists("train_losses", "val_losses")
    _curve(losses, train, "training", "#8c96a8")
    _curve(losses, validation, "validation, fixed patches and masks", "#c8553d")
    if loss_of_means is not None:
        losses.axhline(
            loss_of_means, color="black", linewidth=1, linestyle="--", label="validation, predicting each block's mean"
        )
    losses.set_title("reconstruction loss of hidden blocks")
    losses.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))

    (rate,) = lists("lrs")
    _curve(rates, rate, "learning rate", "#2f6690")
    rates.set_title("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))

    start, end = lists("epoch_start_timestamps", "epoch_end_timestamps")
    _curve(durations, end - start, "duration", "#3a7d44")
    durations.set_title("duration of an epoch, s")
    durations.set_ylim(0, 1.1 * (end - start).max(initial=0.1))  # epochs that take the same lie below the upper edge
    if probe is not None:
        scores = np.array(probe, dtype=np.float64)
        asked = np.flatnonzero(np.isfinite(scores))
        more[0].plot(asked + 1, scores[asked], color="#7a4f9a", marker="o", markersize=3.5)
        if probe_before is not None:
            more[0].axhline(probe_before, color="black", linewidth=1, linestyle="--", label="before the first step")
            more[0].legend(frameon=False, fontsize=8)
        more[0].set_title("Dice of a linear head on the frozen encoder")
    for axes in (losses, rates, durations, *more):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def _panels(example: Example, spacing: Sequence[float]) -> dict[str, Panels]:
    """The rows of one example by plane; one window for all, from the 0.5 to the 99.5 percentile of the input."""
    arrays = (example.image, example.reconstruction)
    whole, rebuilt = (np.asarray(_on_cpu(array), dtype=np.float32) for array in arrays)
    kept = np.asarray(_on_cpu(example.visible), dtype=bool)
    if whole.ndim not in (3, 4) or whole.shape != rebuilt.shape:
        raise ValueError(
            f"image {whole.shape} and reconstruction {rebuilt.shape} must both be (C, z, y, x) or (C, y, x) and equal"
        )
    grid: tuple[int, ...] = kept.shape[1 - whole.ndim :]
    planes: tuple[str, ...] = PLANES
    if whole.ndim == 3:  # a volume of one slice
        planes, grid, spacing = SLICE, (1, *grid), (1.0, *spacing)
        whole, rebuilt = whole[:, None], rebuilt[:, None]
    kept = kept.reshape(grid)
    if any(n % g for n, g in zip(whole.shape[1:], grid, strict=True)):
        raise ValueError(f"image of {whole.shape[1:]} voxels is not a multiple of the mask's grid {grid}")
    unit = tuple(n // g for n, g in zip(whole.shape[1:], grid, strict=True))
    hidden = np.kron(~kept, np.ones(unit, dtype=bool))
    if example.counted is None:
        judged = hidden
    else:
        judged = hidden & np.asarray(_on_cpu(example.counted), dtype=bool).reshape(hidden.shape)
    volume, rebuilt_volume = whole[0], np.where(hidden, rebuilt[0], whole[0])
    low, high = np.percentile(volume, (0.5, 99.5))

    rows = {}
    for axis, plane in enumerate(planes):
        index = _informative_slice(kept, axis, unit[axis])
        flat, covered, compared, predicted = (
            np.take(array, index, axis) for array in (volume, hidden, judged, rebuilt_volume)
        )
        grey = grey_values(flat, low, high)
        masked = np.repeat(grey[..., None], 3, axis=-1)
        masked[covered] = HIDDEN_COLOUR
        masked[covered & ~compared] = IGNORED_COLOUR
        error = np.where(compared, np.abs(predicted - flat), np.nan).astype(np.float32)
        first, second = (float(s) for place, s in enumerate(spacing) if place != axis)
        rows[plane] = Panels(grey, masked, grey_values(predicted, low, high), error, first / second, index)
    return rows


def _informative_slice(visible: BoolArray, axis: int, width: int) -> int:
    """The slice nearest the middle which crosses hidden and visible units; failing that, hidden ones."""
    hidden = ~visible.swapaxes(0, axis).reshape(visible.shape[axis], -1)
    layers = hidden.any(1) & ~hidden.all(1)
    if not layers.any():
        layers = hidden.any(1)
    slices = np.flatnonzero(np.repeat(layers, width)) if layers.any() else np.arange(visible.shape[axis] * width)
    middle = visible.shape[axis] * width // 2
    return int(slices[np.abs(slices - middle).argmin()])


def grey_values(plane: FloatArray, low: float, high: float) -> npt.NDArray[np.uint8]:
    scaled = (np.nan_to_num(plane) - low) / max(high - low, 1e-8)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def _on_cpu(array: npt.ArrayLike | Tensor) -> npt.ArrayLike:
    return array.detach().float().cpu().numpy() if isinstance(array, Tensor) else array  # NumPy knows no bfloat16


def _unit_range(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


def new_figure(width: float, height: float, background: tuple[int, int, int] = (255, 255, 255)) -> Figure:
    figure = Figure(figsize=(width, height), facecolor=_unit_range(background))
    FigureCanvasAgg(figure)
    return figure


def draw(axes: Axes, picture: np.ndarray, aspect: float, origin: Any, colours: ScalarMappable | None) -> None:
    """One panel, voxels as they are: no interpolation between them."""
    if colours is not None:
        picture = colours.to_rgba(np.ma.masked_invalid(picture))
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect=aspect, origin=origin, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _curve(axes: Axes, values: npt.NDArray[np.floating], label: str, colour: str) -> None:
    marker = "o" if len(values) < 30 else None  # a single epoch is a point, not a line
    axes.plot(np.arange(1, len(values) + 1), values, color=colour, marker=marker, markersize=3.5, label=label)


def save_figure(figure: Figure, path: Path | str, dpi: int) -> None:
    """Writes the file atomically: who opens it during training never sees a part."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=dpi)
