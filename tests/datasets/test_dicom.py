"""Series become volumes with the values and places of every slice, or are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from hyspark_nnunet.datasets.dicom import read_series
from tests.datasets.dicom_files import enhanced, save, slices

STORED = np.random.default_rng(0).integers(0, 4000, (5, 4, 6)).astype(np.uint16)
POSITIONS = [(0.0, 0.0, 3.0 * k) for k in range(5)]
SLOPES = [(1.0, 0.0), (0.0003, 0.0), (0.0003, 1.5), (2.0, -1024.0), (0.5, 0.0)]


def read(folder: Path, datasets: list[Dataset]) -> sitk.Image:
    return read_series([save(dataset, folder / f"{i}.dcm") for i, dataset in enumerate(datasets)])


def expected(rescale: list[tuple[float, float]]) -> np.ndarray:
    return np.stack([one.astype(float) * slope + add for one, (slope, add) in zip(STORED, rescale, strict=True)])


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_every_slice_has_its_own_rescaling(tmp_path: Path, modality: str) -> None:
    image = read(tmp_path, slices(STORED, modality, SLOPES))
    assert image.GetPixelID() == sitk.sitkFloat32
    assert np.allclose(sitk.GetArrayFromImage(image), expected(SLOPES), rtol=1e-6)
    assert image.GetSpacing() == (1.5, 2.0, 3.0)
    whole = read(tmp_path, slices(STORED, modality, [(1, -1024)] * 5))
    assert np.array_equal(sitk.GetArrayFromImage(whole), STORED.astype(int) - 1024)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("rescale", [None, SLOPES])
def test_frames_of_one_file_are_sorted_and_rescaled(tmp_path: Path, modality: str, rescale: Any) -> None:
    order = [3, 0, 4, 1, 2]
    dataset = enhanced(
        STORED[order], [POSITIONS[i] for i in order], modality, [rescale[i] for i in order] if rescale else None
    )
    image = read(tmp_path, [dataset])
    truth = expected(rescale) if rescale else STORED
    assert np.allclose(sitk.GetArrayFromImage(image), truth, rtol=1e-6) and image.GetSpacing() == (1.5, 2.0, 3.0)
    assert image.GetOrigin() == (0, 0, 0)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    image = read(tmp_path, slices(STORED, syntax=syntax))
    assert np.array_equal(sitk.GetArrayFromImage(image), STORED)


def change(number: int, **tags: Any) -> Callable[[], list[Dataset]]:
    def make() -> list[Dataset]:
        made = slices(STORED)
        for name, value in tags.items():
            setattr(made[number], name, value)
        return made

    return make


def without(name: str) -> list[Dataset]:
    made = slices(STORED)
    delattr(made[2], name)
    return made


def other_size() -> list[Dataset]:
    return slices(STORED[:4]) + slices(STORED[4:, :3], positions=POSITIONS[4:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: slices(STORED, positions=[(0, k, 3 * k) for k in range(5)]), "shifted sideways by up to 4.00 mm"),
        (other_size, "differ in size, .*4.dcm"),
        (change(3, PixelSpacing=[1, 1]), "differ in spacing, .*3.dcm"),
        (change(3, ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), "have different orientations .3.dcm"),
        (change(3, ImageOrientationPatient=[1, 0, 0, 0, 2, 0]), "no perpendicular unit vectors"),
        (change(1, SamplesPerPixel=3), "1.dcm is a colour image"),
        (change(1, PixelData=b"\0" * 20), "1.dcm is truncated: 20 bytes of voxels instead of 48"),
        # one odd header must not end a run over thousands of series with a TypeError
        (change(1, RescaleSlope=[1, 2]), "1.dcm has no valid RescaleSlope"),
        (change(1, RescaleIntercept=float("nan")), "1.dcm has no valid RescaleSlope or RescaleIntercept"),
        (change(1, RescaleSlope=0, RescaleIntercept=7), "1.dcm has RescaleSlope 0, which programs read differently"),
        (change(1, NumberOfFrames=-1), "1.dcm is damaged: NumberOfFrames is -1"),
        (change(1, SamplesPerPixel=[1, 1]), r"1.dcm is damaged: SamplesPerPixel is \[1, 1\]"),
        (change(1, Rows=[4, 4]), "1.dcm is damaged: Rows is"),
        (change(1, ModalityLUTSequence=[Dataset()]), "1.dcm stores its values by a table"),
        (lambda: without("PixelSpacing"), "2.dcm has no spacing for its slice"),
        (lambda: without("ImagePositionPatient"), "2.dcm has no position for its slice"),
        (lambda: without("PixelData"), "2.dcm is unreadable"),
        (lambda: slices(STORED.astype(np.uint32), syntax=ExplicitVRBigEndian), "32 bits per voxel in big-endian"),
        (lambda: [enhanced(STORED[[0, 1, 0, 1]], POSITIONS[:2] * 2)], "several slices at the same position .0.dcm"),
        (lambda: [enhanced(STORED, POSITIONS[:3])], "has no position for slice 4 of 5"),
        (lambda: [enhanced(STORED[:3], [*POSITIONS[:2], POSITIONS[4]])], "are 9.00 mm apart|are 3.00 mm apart"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path: Path, make: Callable[[], list[Dataset]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, make())


def test_the_thickness_matters_for_a_single_slice_alone(tmp_path: Path) -> None:
    datasets = slices(STORED, SliceThickness=[3, 3])
    assert read(tmp_path, datasets).GetSpacing()[2] == 3
    with pytest.raises(ValueError, match=r"0.dcm has no valid SliceThickness"):
        read(tmp_path, datasets[:1])


def test_a_slope_of_zero_is_good_for_an_empty_slice(tmp_path: Path) -> None:
    """Some PET scanners write it there; everywhere else programs disagree on the values."""
    stored = STORED.copy()
    stored[1] = 0
    image = read(tmp_path, slices(stored, "PT", [(2.0, 0.0), (0.0, 0.0), *[(2.0, 0.0)] * 3]))
    assert np.array_equal(sitk.GetArrayFromImage(image), 2.0 * stored)
