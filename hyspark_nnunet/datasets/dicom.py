"""DICOM series as volumes: frames in the order of their positions, each with its own rescaling."""

import locale
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from hyspark_nnunet.datasets.itk_errors import reason

NOT_DICOM = "not DICOM"
MARK = b"DICM"  # at byte 128
NO_SCANS = ("SEG", "RTDOSE", "RTSTRUCT", "PR", "KO", "SR", "DOC")  # modalities of what is made from scans
COUNTS = ("NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "Rows", "Columns")
IDENTITY = ("SOPClassUID", "SeriesInstanceUID", "Modality", "Rows")
DEFERRED = 4096  # bytes: longer values stay on the disk
GAP_TOLERANCE = 0.1  # of the usual distance of slices
SHIFT_TOLERANCE = 0.1  # of a pixel, sideways
COSINE_TOLERANCE = 1e-3
CONVERT = "convert it to .nii.gz with dcm2niix"


class Identity(NamedTuple):
    """Which series a DICOM file belongs to; of a file with a damaged header, its own path."""

    series: str
    modality: str


class Frame(NamedTuple):
    """One slice: where it is stored, and where it lies.

    Attributes:
        file: that holds it.
        number: in the file, from 0.
        size: rows, columns.
        position: of the first voxel, mm.
        orientation: direction cosines of a row and of a column (6).
        spacing: between rows, between columns, mm.
        rescale: slope and intercept.
        thickness: mm; of use for a single slice only; NaN if the file has no valid number.
    """

    file: str
    number: int
    size: tuple[int, int]
    position: npt.NDArray[np.float64]
    orientation: npt.NDArray[np.float64]
    spacing: tuple[float, float]
    rescale: tuple[float, float]
    thickness: float


def identify(path: str) -> Identity | str:
    """Series and modality of a DICOM image, or why the file is not one.

    A DICOM file whose header cannot be read counts as an image: ``read_series`` will refuse it by name.
    """
    if not os.path.isfile(path):
        return "missing (a broken link) or not a file"
    try:
        with open(path, "rb") as file:
            if file.read(132)[128:] != MARK:
                return NOT_DICOM
        header = _read(path, list(IDENTITY))
        series, modality = str(header.get("SeriesInstanceUID", "")), str(header.get("Modality", ""))
        kind = header.get("SOPClassUID")
    except Exception:  # pydicom raises many kinds on damaged files
        return Identity(path, "")
    if modality in NO_SCANS:
        return f"DICOM {modality}, not a scan"
    if "Rows" not in header and kind is not None and "Image Storage" not in kind.name:
        return "DICOM without an image"
    return Identity(series, modality)


def read_series(files: Sequence[str]) -> sitk.Image:
    """Reads one DICOM series, its frames ordered by their position along the normal of the slices.

    Args:
        files: in any order; each holds one frame or more.

    Returns:
        a volume of integers where all slices are, of float32 otherwise.

    Raises:
        ValueError: unreadable, or frames that do not make one volume; with the way out.
    """
    by_file = {file: _frames(file) for file in files}
    frames = [frame for group in by_file.values() for frame in group]
    _refuse_unlike(frames)
    row, column = frames[0].orientation[:3], frames[0].orientation[3:]
    normal = np.cross(row, column)
    frames.sort(key=lambda frame: float(frame.position @ normal))
    across = _distance_of_slices(frames, normal)
    pixels = {file: _pixels(file, group) for file, group in by_file.items()}
    slices = [pixels[frame.file][frame.number] for frame in frames]
    volume = np.stack(slices)  # of a type that holds the values of every slice
    image = sitk.GetImageFromArray(volume.astype(np.float32) if volume.dtype.kind == "f" else volume)
    image.SetSpacing((frames[0].spacing[1], frames[0].spacing[0], across))
    image.SetOrigin(frames[0].position.tolist())
    image.SetDirection(np.column_stack((row, column, normal)).ravel().tolist())
    return image


def _refuse_unlike(frames: Sequence[Frame]) -> None:
    first = frames[0]
    what = f"the {len(frames)} slices of the DICOM series in {os.path.dirname(first.file)}"
    way_out = "keep one volume per series, the others (such as localizers) in folders of their own"
    for frame in frames:
        if not np.allclose(frame.orientation, first.orientation, atol=COSINE_TOLERANCE):
            raise ValueError(f"{what} have different orientations ({_name(frame)}): {way_out}")
        if frame.size != first.size:
            raise ValueError(f"{what} differ in size, {first.size} and {frame.size} ({_name(frame)}): {way_out}")
        if not np.allclose(frame.spacing, first.spacing, rtol=1e-3):
            raise ValueError(
                f"{what} differ in spacing, {first.spacing} and {frame.spacing} mm ({_name(frame)}): {way_out}"
            )


def _distance_of_slices(frames: Sequence[Frame], normal: npt.NDArray[np.float64]) -> float:
    """mm between neighbours in sorted order.

    Raises:
        ValueError: the frames are not one stack of equally distant slices.
    """
    if len(frames) == 1:
        if not math.isfinite(frames[0].thickness):
            raise ValueError(f"{frames[0].file} has no valid SliceThickness: {CONVERT}, or --exclude it")
        return frames[0].thickness
    folder = os.path.dirname(frames[0].file)
    places = np.array([frame.position for frame in frames])
    along = places @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    worst = int(np.argmax(np.abs(gaps - usual)))
    if usual <= 0 or gaps.min() < 1e-3:
        same = int(np.argmin(gaps))
        raise ValueError(
            f"the DICOM series in {folder} has several slices at the same position ({_name(frames[same])} and "
            f"{_name(frames[same + 1])}): it holds more than one volume (time points, echoes) or a slice twice; put "
            f"each volume into a folder of its own, or {CONVERT}"
        )
    if abs(gaps[worst] - usual) > GAP_TOLERANCE * usual:
        raise ValueError(
            f"slices {worst + 1} and {worst + 2} of the DICOM series in {folder} are {gaps[worst]:.2f} mm apart where "
            f"the others are {usual:.2f} mm: slices are missing; complete the series, or leave it out (--exclude)"
        )
    moved = places - places[0]
    sideways = np.linalg.norm(moved - np.outer(moved @ normal, normal), axis=1)
    if sideways.max() > SHIFT_TOLERANCE * min(frames[0].spacing):
        raise ValueError(
            f"the slices of the DICOM series in {folder} are shifted sideways by up to {sideways.max():.2f} mm (a "
            f"tilted gantry, or several stacks): {CONVERT}, which corrects a tilt"
        )
    return float((along[-1] - along[0]) / (len(frames) - 1))


def _frames(file: str) -> list[Frame]:
    try:
        header = _read(file)
        n, *_ = [_count(header, name) for name in COUNTS]
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise ValueError(f"{file} is damaged: {error or type(error).__name__}; copy it again") from error
    _refuse_unusable(file, header, n)
    shared = _groups(header, "SharedFunctionalGroupsSequence")[:1]
    own = _groups(header, "PerFrameFunctionalGroupsSequence")
    if n > 1 and len(own) != n:
        raise ValueError(
            f"{file} has no position for slice {len(own) + 1} of {n}: frames without positions (a film, or a "
            "projection) are not a volume; --exclude it, or convert it to .nii.gz with a program that knows the scanner"
        )
    return [_frame(file, i, [*own[i : i + 1], *shared, header]) for i in range(n)]


def _count(header: Dataset, name: str) -> int:
    """A whole number of the header; 1 if it is missing."""
    value = header.get(name) or 1
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value}")
    return value


def _refuse_unusable(file: str, header: Dataset, n_frames: int) -> None:
    """What GDCM reads wrongly without a message: it would read memory beyond the voxels that are there."""
    if int(header.get("SamplesPerPixel") or 1) > 1:
        raise ValueError(f"{file} is a colour image, not a scan: --exclude it")
    if header.get("ModalityLUTSequence"):
        raise ValueError(f"{file} stores its values by a table (ModalityLUTSequence), which is not read: {CONVERT}")
    bits = int(header.get("BitsAllocated") or 0)
    syntax = header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
    if syntax == ExplicitVRBigEndian and bits != 16:
        raise ValueError(f"{file} has {bits} bits per voxel in big-endian order, which is not read: {CONVERT}")
    if syntax.is_compressed or "PixelData" not in header:
        return
    stored = header.get_item("PixelData", keep_deferred=True).length  # type: ignore[attr-defined]
    needed = math.ceil(n_frames * int(header.get("Rows") or 0) * int(header.get("Columns") or 0) * bits / 8)
    if stored < needed or os.path.getsize(file) < needed:
        raise ValueError(f"{file} is truncated: {stored} bytes of voxels instead of {needed}; copy it again")


def _frame(file: str, index: int, sources: Sequence[Dataset]) -> Frame:
    """A frame's values, from its own group, the group of all frames, or the file's header."""

    def find(group: str, name: str) -> Any:
        for source in sources:
            places = [source, *_groups(source, group)[:1]]
            for place in places:
                value = place.get(name)
                if value is not None and value != "":
                    return value
        return None

    def numbers(group: str, name: str, n: int, what: str) -> npt.NDArray[np.float64]:
        try:
            found = np.array(find(group, name), dtype=np.float64).reshape(n)
        except (TypeError, ValueError):
            found = np.full(n, np.nan)
        if not np.isfinite(found).all():
            raise ValueError(f"{file} has no {what} for its slice ({name}): {CONVERT}, or --exclude it")
        return found

    def number(group: str, name: str, missing: float) -> float:
        """NaN if the file has no valid number."""
        try:
            value = find(group, name)
            return missing if value is None else float(value)
        except (TypeError, ValueError):
            return math.nan

    position = numbers("PlanePositionSequence", "ImagePositionPatient", 3, "position")
    orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6, "orientation")
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2, "spacing")
    cosines = orientation.reshape(2, 3)
    if not np.allclose(cosines @ cosines.T, np.eye(2), atol=COSINE_TOLERANCE) or spacing.min() <= 0:
        raise ValueError(
            f"{file} has the orientation {orientation.tolist()} and the spacing {spacing.tolist()}: no perpendicular "
            f"unit vectors and positive numbers; {CONVERT}, or --exclude it"
        )
    slope = number("PixelValueTransformationSequence", "RescaleSlope", 1.0)
    intercept = number("PixelValueTransformationSequence", "RescaleIntercept", 0.0)
    thickness = number("PixelMeasuresSequence", "SliceThickness", 1.0)
    if not math.isfinite(slope + intercept):
        raise ValueError(f"{file} has no valid RescaleSlope or RescaleIntercept: {CONVERT}, or --exclude it")
    return Frame(
        file,
        index,
        (int(sources[-1].get("Rows") or 0), int(sources[-1].get("Columns") or 0)),
        position,
        orientation,
        (float(spacing[0]), float(spacing[1])),
        (slope, intercept),
        1.0 if thickness <= 0 else thickness,
    )


def _groups(source: Dataset, name: str) -> list[Dataset]:
    return list(source.get(name) or []) if name else []


def _pixels(file: str, frames: Sequence[Frame]) -> npt.NDArray[Any]:
    """The rescaled values of a file's frames: (frames, rows, columns)."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        with _kept_locale():
            pixels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise ValueError(f"{file} is unreadable: {reason(error)}") from error
    if pixels.shape != (len(frames), *frames[0].size):
        raise ValueError(f"{file}: its image has another size ({pixels.shape}) than its header says; copy it again")
    slope, intercept = frames[0].rescale
    if slope != 0 and all(frame.rescale == frames[0].rescale for frame in frames):
        return pixels
    # GDCM rescales every frame of a file by the values of the first, and takes a slope of 0 for 1
    stored = np.rint((pixels.astype(np.float64) - intercept) / (slope or 1.0))
    if any(frame.rescale[0] == 0 and one.any() for one, frame in zip(stored, frames, strict=True)):
        raise ValueError(f"{file} has RescaleSlope 0, which programs read differently: {CONVERT}, or --exclude it")
    return np.stack([one * frame.rescale[0] + frame.rescale[1] for one, frame in zip(stored, frames, strict=True)])


def _read(path: str, tags: list[str] | None = None) -> Dataset:
    """All of a header but the voxels, or some of its elements."""
    with warnings.catch_warnings():  # about values that do not matter here
        warnings.simplefilter("ignore")
        return dcmread(path, defer_size=DEFERRED, stop_before_pixels=tags is not None, specific_tags=tags)


def _name(frame: Frame) -> str:
    return f"{os.path.basename(frame.file)}{f', frame {frame.number + 1}' if frame.number else ''}"


@contextmanager
def _kept_locale() -> Iterator[None]:
    """SimpleITK's DICOM reader leaves the process in the locale "C": Python then opens text files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)
