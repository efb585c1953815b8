"""What is wrong with one case: the examination that a worker makes."""

import math
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from hyspark_nnunet.datasets.volumes import Counted, read_counted, read_header, voxels

SPACING_MM = (0.01, 30.0)  # outside is a slip of units: metres, micrometres
DIRECTION_TOLERANCE = 1e-3  # of a direction cosine


class CheckJob(NamedTuple):
    """A case and its files as absolute paths."""

    name: str
    images: tuple[str, ...]
    label: str | None
    n_channels: int


class Examined(NamedTuple):
    """Faults of a case, none if it is good, and a digest of its voxels; "" if they could not be read."""

    faults: tuple[str, ...]
    digest: str


def examine_case(job: CheckJob) -> Examined:
    """Reads a case and says everything that is wrong with it."""
    faults: list[str] = []
    if not job.images:
        return Examined((f"wrong number of channels: 0 instead of {job.n_channels}",), "")
    channels: list[sitk.Image] = []
    content = blake2b(digest_size=16)
    n_channels = 0
    for file in job.images:
        where = f" in {os.path.basename(file)}" if len(job.images) > 1 else ""
        try:
            counted = read_counted(file)
            image = counted.image
            faults += [fault + where for fault in _voxel_faults(counted, content)]
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            faults.append(f"{error or type(error).__name__}{where}")
            continue
        faults += [fault + where for fault in _geometry_faults(image)]
        n_channels += image.GetSize()[3] if image.GetDimension() == 4 else 1
        channels.append(_without_voxels(image))
    readable = len(channels) == len(job.images)
    if readable and n_channels != job.n_channels:
        faults.append(f"wrong number of channels: {n_channels} instead of {job.n_channels}")
    faults += _differences(channels)
    if channels:
        faults += _label_faults(job.label, channels[0])
    return Examined(tuple(faults), content.hexdigest() if readable else "")


def _without_voxels(image: sitk.Image) -> sitk.Image:
    """A picture's geometry on an image of one voxel: several channels are never held at once; size as metadata."""
    point = sitk.Image([1] * image.GetDimension(), sitk.sitkUInt8)
    point.SetSpacing(image.GetSpacing())
    point.SetOrigin(image.GetOrigin())
    point.SetDirection(image.GetDirection())
    point.SetMetaData("size", " ".join(map(str, image.GetSize())))
    return point


def _voxel_faults(counted: Counted, content: blake2b) -> list[str]:
    """Faults of the values; adds them to the digest."""
    image = counted.image
    if math.prod(image.GetSize()) == 0:
        return [f"empty: {_times(image.GetSize())} voxels"]
    if image.GetNumberOfComponentsPerPixel() > 1:
        return [
            f"wrong number of channels: {image.GetNumberOfComponentsPerPixel()} numbers per voxel in one file; give "
            "every channel a file"
        ]
    array = voxels(image)
    content.update(str(array.shape).encode())
    content.update(np.ascontiguousarray(array).data)
    nan = int(np.isnan(array).sum()) + counted.nan
    infinite = int(np.isinf(array).sum()) + counted.infinite
    if nan or infinite:
        parts = [f"{n} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
        return [f"{' and '.join(parts)} of {array.size} voxels"]
    low, high = array.min(), array.max()
    return [f"constant: every voxel is {low:g}"] if low == high else []


def _geometry_faults(image: sitk.Image) -> list[str]:
    faults = []
    size, spacing = image.GetSize(), image.GetSpacing()
    if image.GetDimension() == 2 or min(size[:3]) == 1:
        faults.append(f"2D: {_times(size)} voxels, but the networks are 3D")
    smallest, largest = SPACING_MM
    if any(not (np.isfinite(step) and smallest <= step <= largest) for step in spacing[:3]):
        steps = " x ".join(f"{step:g}" for step in spacing[:3])
        faults.append(f"absurd spacing: {steps} mm, outside {smallest:g} to {largest:g} mm; is it in another unit?")
    return faults


def _differences(channels: Sequence[sitk.Image]) -> list[str]:
    faults = []
    for number, other in enumerate(channels[1:], 1):
        first = channels[0]
        if other.GetMetaData("size") != first.GetMetaData("size"):
            faults.append(f"channels 0 and {number} differ in size: {_size(first)} and {_size(other)} voxels")
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


def _label_faults(label: str | None, image: sitk.Image) -> list[str]:
    if label is None:
        return ["no label file: nnU-Net cannot preprocess it; hyspark_nnunet dataset prepare makes one"]
    try:
        header = read_header(label)
    except (ValueError, OSError, RuntimeError) as error:
        return [f"label file: {error}"]
    if _times(header.size) != _size(image) and image.GetDimension() == 3:
        return [f"label file has {_times(header.size)} voxels, the image {_size(image)}"]
    return []


def _size(point: sitk.Image) -> str:
    return _times([int(n) for n in point.GetMetaData("size").split()])


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
