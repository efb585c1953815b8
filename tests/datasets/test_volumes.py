"""Volumes are read whole or refused; series in the order of their places."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from hyspark_nnunet.datasets.dicom import read_series
from hyspark_nnunet.datasets.volumes import read_header, read_volume, volume_ending
from tests.datasets.scans import array_of, ct, write, write_dicom_series


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
@pytest.mark.parametrize("part", [0.4, 0.99])
def test_a_cut_off_file_is_refused(tmp_path: Path, ending: str, part: float) -> None:
    path = write(ct(), tmp_path / f"scan{ending}")
    assert np.array_equal(sitk.GetArrayFromImage(read_volume(path)), sitk.GetArrayFromImage(ct()))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="truncated|unreadable|damaged"):
        read_volume(path)


def test_a_shorter_content_in_a_whole_gzip_is_refused(tmp_path: Path) -> None:
    path = write(ct(), tmp_path / "scan.nii.gz")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    with pytest.raises(ValueError, match="truncated: 1692 bytes instead of the 1792 that its header promises"):
        read_volume(path)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr"])
def test_damage_behind_the_voxels_of_a_packed_nrrd_is_found(tmp_path: Path, ending: str) -> None:
    path = write(ct(), tmp_path / f"scan{ending}")
    read_volume(path)
    voxels = path if ending == ".nrrd" else tmp_path / "scan.raw.gz"
    content = voxels.read_bytes()
    voxels.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated: its gzip stream has no end"):
        read_volume(path)
    voxels.write_bytes(content[:-6] + bytes([content[-6] ^ 255]) + content[-5:])
    with pytest.raises(ValueError, match="damaged: CRC check failed|unreadable"):
        read_volume(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "text.nii.gz").write_text("not an image")
    with pytest.raises(ValueError, match="unreadable"):
        read_header(tmp_path / "text.nii.gz")


def test_endings() -> None:
    assert volume_ending("a.b.NII.GZ") == ".NII.GZ" and volume_ending("a.nii") == ".nii"
    assert volume_ending("a.png") is None and volume_ending("nii") is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_series_is_read_in_the_order_and_orientation_of_its_slices(tmp_path: Path, turned: bool) -> None:
    image = sitk.Cast(ct(3, spacing=(1.5, 2.0, 2.5)), sitk.sitkInt16)
    image.SetOrigin((-7.0, 11.0, 30.0))
    if turned:  # sagittal slices: x of the picture runs to the back, y to the feet
        image.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
    n = image.GetSize()[2]
    shuffled = [f"IM{number:03d}.dcm" for number in np.random.default_rng(1).permutation(n)]
    write_dicom_series(image, tmp_path, shuffled)
    read = read_series([str(path) for path in sorted(tmp_path.iterdir())])
    assert read.GetSize() == image.GetSize()
    assert read.GetSpacing() == pytest.approx(image.GetSpacing())
    # every voxel where it was in the patient, whichever way the third axis runs
    for index in ((0, 0, 0), (3, 2, 1), (11, 9, 5), (4, 5, 4)):
        place = image.TransformIndexToPhysicalPoint(index)
        found = read.TransformPhysicalPointToIndex(place)
        assert read.TransformIndexToPhysicalPoint(found) == pytest.approx(place, abs=1e-3)
        assert read[found] == image[index]


def test_a_series_with_a_missing_slice_is_refused(tmp_path: Path) -> None:
    write_dicom_series(ct(), tmp_path, [f"{k}.dcm" for k in range(6)], skip=(2,))
    with pytest.raises(ValueError, match=r"slices 2 and 3 .* are 6.00 mm apart where the others are 3.00 mm"):
        read_series([str(path) for path in sorted(tmp_path.iterdir())])


def test_a_series_of_two_volumes_is_refused(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write_dicom_series(ct(), tmp_path, [f"{part}{k}.dcm" for k in range(6)])
    with pytest.raises(ValueError, match="several slices at the same position"):
        read_series([str(path) for path in sorted(tmp_path.iterdir())])


def test_written_scans_read_back(tmp_path: Path) -> None:
    assert array_of(write(ct(), tmp_path / "a/b.mha")).shape == (6, 10, 12)
