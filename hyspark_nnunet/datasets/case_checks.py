"""Faults of one case, as a worker finds them."""

import contextlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from hyspark_nnunet.datasets.case_names import RESERVED
from hyspark_nnunet.datasets.nifti import read_to_end
from hyspark_nnunet.datasets.volumes import Counted, read_counted, size_text, voxels

SPACING_MM = (0.01, 30.0)  # outside is a wrong unit: metres, micrometres
DIRECTION_TOLERANCE = 1e-3  # of a direction cosine
ITK_READERS = ("SimpleITKIO", "SimpleITKIOWithReorient")
# what reading a file may raise; MemoryError: a damaged header may promise anything
READING_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


class CheckJob(NamedTuple):
    """A case and its files as absolute paths; ``reader`` is the class of nnU-Net that will read them."""

    name: str
    images: tuple[str, ...]
    label: str | None
    n_channels: int
    reader: str = "SimpleITKIO"


class Examined(NamedTuple):
    """What was found in a case.

    Attributes:
        faults: none if it is good.
        digest: of its voxels; "" if they could not be read.
        ambiguous: whether the header of an image places it in two ways, which ``ambiguous_note`` tells.
        flat: size of a 2D image or a volume of one slice, which is a fault among volumes; "" for a volume.
    """

    faults: tuple[str, ...]
    digest: str
    flat: str = ""
    ambiguous: bool = False


def examine_case(job: CheckJob) -> Examined:
    """Reads a case and returns every fault."""
    faults = []
    if job.name.endswith(RESERVED):
        faults.append(f"its name ends in {RESERVED}, which nnU-Net reserves for segmentations: rename the case")
    if not job.images:
        faults.append(
            f"wrong number of channels: 0 instead of {job.n_channels}; images are called {job.name}_0000 and so on"
        )
        return Examined(tuple(faults), "")
    found = _examine_by_itk(job) if job.reader in ITK_READERS else _examine_by_reader(job)
    return found._replace(faults=(*faults, *found.faults))


def image_faults(counted: Counted) -> list[str]:
    """What is wrong with the voxels and the geometry of one file."""
    image = counted.image
    if math.prod(image.GetSize()) == 0:
        return [f"empty: {size_text(image.GetSize())} voxels"]
    if image.GetNumberOfComponentsPerPixel() > 1:
        return [
            f"wrong number of channels: {image.GetNumberOfComponentsPerPixel()} values per voxel in one file (such as "
            "RGB); give every channel a file"
        ]
    if image.GetDimension() > 4:
        return [f"{image.GetDimension()} axes ({size_text(image.GetSize())}): nnU-Net reads 2 to 4; split the file"]
    return _voxel_faults(voxels(image), counted.nan, counted.infinite) + _spacing_faults(image.GetSpacing()[:3])


def flat_size(size: Sequence[int]) -> str:
    """The size as a text if it is that of a 2D image or of one slice, "" if it is a volume's (x, y, z)."""
    return size_text(size) if len(size) == 2 or min(size[:3]) == 1 else ""


def flat_faults(flat: Mapping[str, str]) -> dict[str, str]:
    """Images and volumes cannot be trained together: the faults of those that are flat, if others are not.

    Args:
        flat: ``flat_size`` by case.
    """
    if all(flat.values()):
        return {}
    return {
        name: f"2D: {size} voxels, but other cases are volumes; --exclude it, or make a dataset of the 2D images alone"
        for name, size in flat.items()
        if size
    }


def ambiguous_note(names: Sequence[str]) -> str:
    """What to print about cases whose headers are ambiguous; nothing where there are none."""
    if not names:
        return ""
    some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"note: qform and sform place {len(names)} cases differently ({some}): nnU-Net's SimpleITKIO follows the "
        "qform, nibabel the sform; voxels and spacing are the same"
    )


def without_voxels(image: sitk.Image) -> sitk.Image:
    """An image's geometry on an image of one voxel: several channels are never held at once; size as metadata."""
    point = sitk.Image([1] * image.GetDimension(), sitk.sitkUInt8)
    point.SetSpacing(image.GetSpacing())
    point.SetOrigin(image.GetOrigin())
    point.SetDirection(image.GetDirection())
    point.SetMetaData("size", size_text(image.GetSize()))
    return point


def channel_differences(channels: Sequence[sitk.Image]) -> list[str]:
    """How the channels of a case differ in geometry, from the images of ``without_voxels``."""
    faults = []
    for number, other in enumerate(channels[1:], 1):
        first = channels[0]
        if other.GetMetaData("size") != first.GetMetaData("size"):
            sizes = f"{first.GetMetaData('size')} and {other.GetMetaData('size')}"
            faults.append(f"channels 0 and {number} differ in size: {sizes} voxels")
        elif not np.allclose(first.GetSpacing(), other.GetSpacing(), rtol=1e-3):
            faults.append(
                f"channels 0 and {number} differ in spacing: {first.GetSpacing()} and {other.GetSpacing()} mm"
            )
        elif not np.allclose(first.GetDirection(), other.GetDirection(), atol=DIRECTION_TOLERANCE):
            turned = np.abs(np.subtract(first.GetDirection(), other.GetDirection())).max()
            faults.append(f"channels 0 and {number} differ in direction, by up to {turned:.3g} in a direction cosine")
        elif np.abs(np.subtract(first.GetOrigin(), other.GetOrigin())).max() > 0.5 * min(first.GetSpacing()):
            faults.append(f"channels 0 and {number} differ in origin: {first.GetOrigin()} and {other.GetOrigin()} mm")
    return faults


def _examine_by_itk(job: CheckJob) -> Examined:
    faults: list[str] = []
    channels: list[sitk.Image] = []
    content = blake2b(digest_size=16)
    n_channels = 0
    ambiguous = False
    for file in job.images:
        where = f" in {os.path.basename(file)}" if len(job.images) > 1 else ""
        try:
            counted = read_counted(file)
            found = image_faults(counted)
            _add_to_digest(content, voxels(counted.image))
        except READING_ERRORS as error:
            faults.append(f"{error or type(error).__name__}{where}")
            continue
        faults += [fault + where for fault in found]
        ambiguous |= counted.ambiguous
        image = counted.image
        n_channels += image.GetSize()[3] if image.GetDimension() == 4 else image.GetNumberOfComponentsPerPixel()
        channels.append(without_voxels(image))
    readable = len(channels) == len(job.images)
    if readable and n_channels != job.n_channels:
        faults.append(f"wrong number of channels: {n_channels} instead of {job.n_channels}")
    faults += channel_differences(channels)
    if not channels:
        return Examined(tuple(faults), "")
    size = [int(n) for n in channels[0].GetMetaData("size").split(" x ")]
    faults += _label_faults(job.label, size[:3])
    return Examined(tuple(faults), content.hexdigest() if readable else "", flat_size(size), ambiguous)


def _examine_by_reader(job: CheckJob) -> Examined:
    """Examines files as another reader of nnU-Net reads them, such as those of PNG, TIFF, and nibabel's."""
    try:
        array, properties = _read_by(job.reader, "read_images", job.images)
    except ValueError as error:
        return Examined((str(error),), "")
    size = array.shape[:0:-1]  # of (channels, z, y, x)
    faults = _voxel_faults(array, 0, 0)
    if array.shape[0] != job.n_channels:
        faults.append(f"wrong number of channels: {array.shape[0]} instead of {job.n_channels}")
    if not flat_size(size):  # nnU-Net invents the spacing across a single slice
        faults += _spacing_faults(properties["spacing"][::-1])
    content = blake2b(digest_size=16)
    _add_to_digest(content, array)
    if job.label is None or not os.path.isfile(job.label):
        faults += _label_faults(job.label, size)
    else:
        try:
            faults += _size_faults(_read_by(job.reader, "read_seg", job.label)[0].shape[:0:-1], size)
        except ValueError as error:
            faults.append(f"label file: {error}")
    return Examined(tuple(faults), content.hexdigest(), flat_size(size))


def _read_by(reader: str, method: str, files: str | Sequence[str]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Reads by a method of a reader of nnU-Net.

    Raises:
        ValueError: it cannot; with what the reader printed, which is its reason.
    """
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    printed = io.StringIO()
    try:
        for file in [files] if isinstance(files, str) else files:
            read_to_end(file)
        with contextlib.redirect_stdout(printed):
            return getattr(recursive_find_reader_writer_by_name(reader)(), method)(files)
    except Exception as error:  # every reader has errors of its own
        told = " ".join(filter(None, (str(error) or type(error).__name__, *printed.getvalue().split())))
        raise ValueError(f"nnU-Net's {reader} cannot read it: {told}") from error


def _add_to_digest(content: blake2b, array: npt.NDArray[Any]) -> None:
    """Adds size and voxels to the digest of a case."""
    content.update(str(array.shape).encode())
    content.update(np.ascontiguousarray(array).data)


def _voxel_faults(array: npt.NDArray[Any], nan: int, infinite: int) -> list[str]:
    """Args: voxels; the NaN and infinite ones among them that ITK has made zero."""
    nan += int(np.isnan(array).sum())
    infinite += int(np.isinf(array).sum())
    if nan or infinite:
        parts = [f"{n} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
        return [f"{' and '.join(parts)} of {array.size} voxels"]
    low, high = array.min(), array.max()
    return [f"constant: every voxel is {low:g}"] if low == high else []


def _spacing_faults(spacing: Sequence[float]) -> list[str]:
    smallest, largest = SPACING_MM
    if all(np.isfinite(step) and smallest <= step <= largest for step in spacing):
        return []
    steps = " x ".join(f"{step:g}" for step in spacing)
    return [f"implausible spacing: {steps} mm, outside {smallest:g} to {largest:g} mm; is it in another unit?"]


def _label_faults(label: str | None, size: Sequence[int]) -> list[str]:
    """Args: the file; the image's size (x, y, z)."""
    if label is None:
        return ["no label file: nnU-Net cannot preprocess it; hyspark_nnunet dataset prepare makes one"]
    try:
        counted = read_counted(label)
    except READING_ERRORS as error:
        return [f"label file: {error or type(error).__name__}"]
    if counted.nan or counted.infinite:
        return [f"label file: {counted.nan} NaN and {counted.infinite} infinite voxels"]
    return _size_faults(counted.image.GetSize()[:3], size)


def _size_faults(label_size: Sequence[int], size: Sequence[int]) -> list[str]:
    if tuple(label_size) == tuple(size):
        return []
    return [f"label file has {size_text(label_size)} voxels, the image {size_text(size)}"]
