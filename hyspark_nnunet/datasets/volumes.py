"""Reading and writing volumes with SimpleITK, whole or not at all, and DICOM series in the order of their positions."""

import locale
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from hyspark_nnunet.datasets.nifti_content import nifti_content

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
WRITTEN_ENDING = ".nii.gz"
READER = "SimpleITKIO"  # of nnU-Net: it reads every one of VOLUME_ENDINGS, whatever dataset.json's file_ending
GIPL_HEADER, NIFTI_HEADER = 256, 352  # bytes before the voxels, at least
SERIES_TAG, MODALITY_TAG = "0020|000e", "0008|0060"
POSITION_TAG, ORIENTATION_TAG = "0020|0032", "0020|0037"


class Header(NamedTuple):
    """What a file says of its volume, in SimpleITK's order of axes (x, y, z).

    Attributes:
        size: voxels per axis; two for an image, four for several volumes in a file.
        spacing: mm per axis.
        origin: mm per axis.
        direction: direction cosines, row by row.
        components: numbers per voxel.
        voxel_bytes: of one number.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    components: int
    voxel_bytes: int


class Counted(NamedTuple):
    """A volume, and the NaN and infinite voxels of its file that ITK has made zero."""

    image: sitk.Image
    nan: int
    infinite: int


def volume_ending(name: str) -> str | None:
    """The ending of a file name if SimpleITK and nnU-Net read such volumes, as it is written there."""
    return next((name[-len(ending) :] for ending in VOLUME_ENDINGS if name.lower().endswith(ending)), None)


def read_header(path: str | Path) -> Header:
    """Reads the geometry alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"unreadable: {_reason(error)}") from error
    example = sitk.Image([1] * 2, reader.GetPixelID(), reader.GetNumberOfComponents())
    return Header(
        tuple(reader.GetSize()),
        tuple(reader.GetSpacing()),
        tuple(reader.GetOrigin()),
        tuple(reader.GetDirection()),
        reader.GetNumberOfComponents(),
        example.GetSizeOfPixelComponent(),
    )


def read_volume(path: str | Path) -> sitk.Image:
    """Reads a volume.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or cut off.
    """
    return read_counted(path).image


def read_counted(path: str | Path) -> Counted:
    """Reads a volume and says how many of its voxels the file has as NaN and infinite, see ``nifti_content``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or cut off.
    """
    header = read_header(path)
    needed = math.prod(header.size) * header.components * header.voxel_bytes
    nan = infinite = 0
    held = None
    if str(path).lower().endswith((".nii", ".nii.gz")):
        held, nan, infinite = nifti_content(str(path))
        needed += NIFTI_HEADER
    elif str(path).lower().endswith(".gipl"):
        held = os.path.getsize(path)
        needed += GIPL_HEADER
    if held is not None and held < needed:
        raise ValueError(f"truncated: {held} bytes where its header promises {needed}")
    try:
        return Counted(sitk.ReadImage(str(path)), nan, infinite)
    except RuntimeError as error:
        raise ValueError(f"unreadable: {_reason(error)}") from error


def write_volume(image: sitk.Image, path: str | Path) -> None:
    """Writes a compressed volume."""
    sitk.WriteImage(image, str(path), useCompression=True)


def read_series(files: Sequence[str]) -> sitk.Image:
    """Reads the slices of one DICOM series, ordered by their position along the normal of the slices.

    Args:
        files: in any order; a single one may hold all frames.

    Raises:
        ValueError: unreadable, slices of unlike orientation, two at one place, or uneven gaps (a missing slice).
    """
    if len(files) == 1:
        return read_volume(files[0])
    placed = [(*_placement(file), file) for file in files]
    orientation = placed[0][1]
    if any(not np.allclose(other, orientation, atol=1e-3) for _, other, _ in placed):
        raise ValueError(f"the {len(files)} slices of the DICOM series in {_folder(files)} have unlike orientations")
    normal = np.cross(orientation[:3], orientation[3:])
    ordered = sorted((float(position @ normal), file) for position, _, file in placed)
    places = np.array([place for place, _ in ordered])
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    worst = int(np.argmax(np.abs(gaps - usual)))
    if usual <= 0 or gaps.min() < 1e-3:
        raise ValueError(
            f"the DICOM series in {_folder(files)} has several slices at one place: it holds more than one volume "
            "(time points, echoes); put each into a folder of its own"
        )
    if abs(gaps[worst] - usual) > 0.1 * usual:
        raise ValueError(
            f"slices {worst + 1} and {worst + 2} of the DICOM series in {_folder(files)} are {gaps[worst]:.2f} mm "
            f"apart where the others are {usual:.2f} mm: slices are missing"
        )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([file for _, file in ordered])
    try:
        with _kept_locale():
            image = reader.Execute()
    except RuntimeError as error:
        raise ValueError(f"unreadable: {_reason(error)}") from error
    across = float((places[-1] - places[0]) / (len(places) - 1))
    image.SetSpacing((*image.GetSpacing()[:2], across))
    return image


def dicom_tags(path: str) -> tuple[str, str] | None:
    """Series identifier and modality of a DICOM file that holds an image; None: it is no such file."""
    try:
        with open(path, "rb") as file:
            if file.read(132)[128:] != b"DICM":
                return None
        reader = _dicom_reader(path)
        return reader.GetMetaData(SERIES_TAG).strip("\0 "), reader.GetMetaData(MODALITY_TAG).strip("\0 ")
    except (OSError, RuntimeError):  # structure sets, reports: DICOM, but no image
        return None


def voxels(image: sitk.Image) -> npt.NDArray[np.float32]:
    """The numbers as nnU-Net reads them: float32, (z, y, x), or (channels, z, y, x) of a file with four axes."""
    with np.errstate(over="ignore"):  # what overflows is found as infinite
        return sitk.GetArrayFromImage(image).astype(np.float32)


def _placement(file: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Position (3) and orientation (6) of a slice, mm and cosines."""
    try:
        reader = _dicom_reader(file)
        position, orientation = (
            np.array([float(number) for number in reader.GetMetaData(tag).strip("\0 ").split("\\")])
            for tag in (POSITION_TAG, ORIENTATION_TAG)
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} says no position of its slice: {_reason(error)}") from error
    return position, orientation


def _dicom_reader(path: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    with _kept_locale():
        reader.ReadImageInformation()
    return reader


@contextmanager
def _kept_locale() -> Iterator[None]:
    """SimpleITK's DICOM reader leaves the process in the locale "C": Python then opens text files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _folder(files: Sequence[str]) -> str:
    return os.path.dirname(files[0])


def _reason(error: BaseException) -> str:
    """The telling line of ITK's many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
