"""DICOM files written with pydicom, which the package's own reader (GDCM) has no part in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

SINGLE = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
ENHANCED = {
    "CT": "1.2.840.10008.5.1.4.1.1.2.1",
    "MR": "1.2.840.10008.5.1.4.1.1.4.1",
    "PT": "1.2.840.10008.5.1.4.1.1.130",
}
ORIENTATION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def header(sop_class: str, modality: str, series: str = "1.2.3", syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """A dataset with nothing but its identity."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = modality
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", series
    return dataset


def add_pixels(dataset: Dataset, stored: np.ndarray) -> None:
    """Pixels as they are stored: (rows, columns) or (frames, rows, columns), integers."""
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    order = ">" if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    dataset.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder(order)).tobytes())


def save(dataset: Dataset, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    syntax = dataset.file_meta.TransferSyntaxUID
    dataset.save_as(
        path,
        enforce_file_format=True,
        little_endian=syntax != ExplicitVRBigEndian,
        implicit_vr=syntax == ImplicitVRLittleEndian,
    )
    return str(path)


def slices(
    stored: np.ndarray,
    modality: str = "CT",
    rescale: Sequence[tuple[float, float]] | None = None,
    positions: Sequence[Sequence[float]] | None = None,
    syntax: str = ExplicitVRLittleEndian,
    **tags: Any,
) -> list[Dataset]:
    """A dataset per slice of ``stored`` (slices, rows, columns), 3 mm apart; further tags are given to all."""
    made = []
    for k, pixels in enumerate(stored):
        dataset = header(SINGLE[modality], modality, syntax=syntax)
        add_pixels(dataset, pixels)
        dataset.ImagePositionPatient = list(positions[k] if positions else (0, 0, 3 * k))
        dataset.ImageOrientationPatient, dataset.PixelSpacing = list(ORIENTATION), [2, 1.5]
        if rescale:
            dataset.RescaleSlope, dataset.RescaleIntercept = rescale[k]
        for name, value in tags.items():
            setattr(dataset, name, value)
        made.append(dataset)
    return made


def enhanced(
    stored: np.ndarray,
    positions: Sequence[Sequence[float]],
    modality: str = "MR",
    rescale: Sequence[tuple[float, float]] | None = None,
) -> Dataset:
    """All frames of ``stored`` in one dataset, with their positions in the functional groups."""
    dataset = header(ENHANCED[modality], modality)
    add_pixels(dataset, stored)
    dataset.NumberOfFrames = len(stored)
    dataset.SharedFunctionalGroupsSequence = [
        _with(PixelMeasuresSequence=[_with(PixelSpacing=[2, 1.5], SliceThickness=3)])
    ]
    dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence = [
        _with(ImageOrientationPatient=list(ORIENTATION))
    ]
    groups = [_with(PlanePositionSequence=[_with(ImagePositionPatient=list(place))]) for place in positions]
    for group, (slope, intercept) in zip(groups, rescale or [], strict=False):
        group.PixelValueTransformationSequence = [_with(RescaleSlope=slope, RescaleIntercept=intercept)]
    dataset.PerFrameFunctionalGroupsSequence = groups
    return dataset


def _with(**tags: Any) -> Dataset:
    dataset = Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset
