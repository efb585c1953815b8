"""Reads and writes volumes with SimpleITK; a file that is truncated, damaged or misread by ITK is refused."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from hyspark_nnunet.datasets.itk_errors import reason
from hyspark_nnunet.datasets.nifti import (
    NIFTI_ENDINGS,
    compare_with_file,
    read_nifti_header,
    read_to_end,
    two_orientations,
)
from hyspark_nnunet.datasets.nrrd import NRRD_ENDINGS, read_nrrd_to_end

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
WRITTEN_ENDING = ".nii.gz"
READER = "SimpleITKIO"  # of nnU-Net: it reads every one of VOLUME_ENDINGS, whatever dataset.json's file_ending
COMPLEX = (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64)
GIPL_HEADER = 256  # bytes before the voxels


class Header(NamedTuple):
    """Geometry and voxel type from the header of a file, in SimpleITK's order of axes (x, y, z).

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
    """A volume, the NaN and infinite voxels of its file that ITK has made zero, and whether its header is ambiguous."""

    image: sitk.Image
    nan: int = 0
    infinite: int = 0
    ambiguous: bool = False


def volume_ending(name: str) -> str | None:
    """The ending of a file name if SimpleITK and nnU-Net read such volumes, as it is written there."""
    return next((name[-len(ending) :] for ending in VOLUME_ENDINGS if name.lower().endswith(ending)), None)


def printable(text: str) -> str:
    """A text in which parts of file names that are not UTF-8, and cannot be printed, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_header(path: str | Path) -> Header:
    """Reads the geometry alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image that nnU-Net can use.
    """
    if (shown := printable(str(path))) != str(path):
        raise ValueError(f"its name is not valid UTF-8 ({shown}): rename it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    nifti = read_nifti_header(str(path)) if str(path).lower().endswith(NIFTI_ENDINGS) else None
    try:
        reader.ReadImageInformation()
        example = sitk.Image([1] * 2, reader.GetPixelID(), reader.GetNumberOfComponents())
    except RuntimeError as error:
        read_to_end(str(path))  # a damaged .nii.gz has a better reason than ITK's
        raise ValueError(f"unreadable: {reason(error)}") from error
    if reader.GetPixelID() in COMPLEX:
        raise ValueError("its voxels are complex numbers, which nnU-Net cannot use: store their magnitude")
    if nifti is not None and nifti.get_data_shape()[:3] != reader.GetSize()[:3]:
        raise ValueError(
            f"ITK reads it as {size_text(reader.GetSize())} voxels, but its header says "
            f"{size_text(nifti.get_data_shape())}: is there a file of the same name with another ending beside it?"
        )
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
        ValueError: it is not an image, truncated, damaged, or misread by ITK.
    """
    return read_counted(path).image


def read_counted(path: str | Path) -> Counted:
    """Reads a volume and counts the voxels that are NaN or infinite in its file, see ``nifti.py``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, truncated, damaged, or misread by ITK.
    """
    header = read_header(path)
    if str(path).lower().endswith(".gipl"):
        needed = math.prod(header.size) * header.components * header.voxel_bytes + GIPL_HEADER
        if os.path.getsize(path) < needed:
            raise ValueError(
                f"truncated: {os.path.getsize(path)} bytes instead of the {needed} that its header promises"
            )
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"unreadable: {reason(error)}") from error
    if str(path).lower().endswith(NRRD_ENDINGS):
        read_nrrd_to_end(str(path))
    if not str(path).lower().endswith(NIFTI_ENDINGS):
        return Counted(image)
    return Counted(image, *compare_with_file(str(path), image), two_orientations(str(path)))


def write_volume(image: sitk.Image, path: str | Path) -> None:
    """Writes a compressed volume."""
    sitk.WriteImage(image, str(path), useCompression=True)


def size_text(size: Sequence[int]) -> str:
    """Such as "12 x 10 x 6"."""
    return " x ".join(map(str, size))


def channel_volumes(image: sitk.Image) -> list[sitk.Image]:
    """The volumes of a file; a file with four axes holds several, which nnU-Net reads as channels."""
    if image.GetDimension() != 4:
        return [image]
    return [image[:, :, :, i] for i in range(image.GetSize()[3])]


def voxels(image: sitk.Image) -> npt.NDArray[np.float32]:
    """The numbers as nnU-Net reads them: float32, (z, y, x), or (channels, z, y, x) of a file with four axes."""
    with np.errstate(over="ignore"):  # what overflows is found as infinite
        return sitk.GetArrayFromImage(image).astype(np.float32)
