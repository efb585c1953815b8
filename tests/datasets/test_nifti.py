"""Voxels of NIfTI files as nibabel reads them, or a refusal that names the reason."""

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from hyspark_nnunet.datasets.case_checks import ambiguous_note
from hyspark_nnunet.datasets.volumes import read_counted, read_volume

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
VALUES = np.random.default_rng(0).integers(0, 200, (7, 6, 5))


def save(path: Path, values: np.ndarray = VALUES, dtype: Any = np.int16, **header: Any) -> Path:
    """``header``: fields that are put into the file as they are."""
    image = nibabel.Nifti1Image(values.astype(dtype), AFFINE, dtype=dtype)
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    packed = content[:2] == b"\x1f\x8b"
    if packed:
        content = bytearray(gzip.decompress(content))
    fields = image.header.template_dtype.fields
    for name, value in header.items():
        dtype, offset = fields[name][:2]
        field = np.broadcast_to(np.asarray(value), dtype.shape).astype(dtype.base).tobytes()
        content[offset : offset + len(field)] = field
    path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.01, 0), (-2, 3), (0, 0), (np.nan, 0), (1, 0)])
def test_scaled_integers_are_read(tmp_path: Path, ending: str, dtype: Any, slope: float, intercept: float) -> None:
    path = save(tmp_path / f"a{ending}", dtype=dtype, scl_slope=slope, scl_inter=intercept)
    truth = np.asarray(nibabel.load(path).dataobj).T
    assert np.allclose(sitk.GetArrayFromImage(read_volume(path)), truth, rtol=1e-6)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="truncated"):
        read_volume(path)


def test_not_finite_voxels_of_scaled_floats_are_counted(tmp_path: Path) -> None:
    values = VALUES.astype(np.float32)
    values[0, 0, :3] = np.nan, np.inf, np.nan
    counted = read_counted(save(tmp_path / "a.nii.gz", values, np.float32, scl_slope=2, scl_inter=1))
    assert (counted.nan, counted.infinite) == (2, 1)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"scl_slope": 0, "scl_inter": 5}, "reads voxels that differ from the file's"),
        ({"scl_slope": 1e-17}, "reads voxels that differ from the file's"),
        ({"scl_slope": 1, "scl_inter": np.nan}, "its header is damaged .*invalid intercept"),
        ({"dim": [3, 7, 6, 0, 1, 1, 1, 1]}, "empty: 7 x 6 x 0 voxels"),
        ({"dim": [9, 7, 6, 5, 1, 1, 1, 1]}, "its header says 9 axes"),
        ({"datatype": 1792, "bitpix": 128}, "its voxels are complex numbers"),
        ({"datatype": 2048, "bitpix": 256}, "its voxels are complex numbers"),
        ({"datatype": 1, "bitpix": 1}, "NIfTI's type 1, which nnU-Net cannot read"),
        ({"magic": b"ni1"}, "that of a pair .hdr and .img"),
        ({"srow_x": [-4, 0, 0, 0]}, "two spacings, 2 x 2 x 3 and 4 x 2 x 3 mm"),
        ({"srow_x": [-2, 0.5, 0, 0], "pixdim": [1, 2, 2.0616, 3, 1, 1, 1, 1]}, r"are not perpendicular.*set_sform"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "a.nii", sform_code=1, **{"qform_code": 0, **header})
    with pytest.raises(ValueError, match=message):
        read_volume(path)


def test_a_file_of_the_same_name_does_not_lend_its_voxels(tmp_path: Path) -> None:
    """ITK takes the voxels of a.nii for those of a.nii.gz."""
    path = save(tmp_path / "a.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(read_volume(path)), VALUES.T)
    save(tmp_path / "a.nii", VALUES + 1)
    with pytest.raises(
        ValueError, match=r"differ from the file's .*takes the voxels of a\.nii beside it.*--link or --copy"
    ):
        read_volume(path)


def test_damage_behind_the_voxels_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz")
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\1\2\3\4" + content[-4:])  # the checksum
    with pytest.raises(ValueError, match="damaged: CRC check failed.*copy it again"):
        read_volume(path)
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match="damaged"):
        read_volume(path)


def test_nifti_2_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(VALUES.astype(np.int16), AFFINE), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="it is NIfTI-2, which nnU-Net's SimpleITKIO cannot read: write it again"):
        read_volume(tmp_path / "a.nii")


def test_other_forms_that_are_read(tmp_path: Path) -> None:
    big = nibabel.Nifti1Image(VALUES.astype(">i2"), AFFINE, nibabel.Nifti1Header(endianness=">"))
    metres = nibabel.Nifti1Image(VALUES.astype(np.int16), np.diag([-0.002, -0.002, 0.003, 1.0]))
    metres.header.set_xyzt_units("meter")
    one_time = nibabel.Nifti1Image(VALUES.astype(np.int16)[..., None], AFFINE)
    for name, image in {"big": big, "metres": metres, "one_time": one_time}.items():
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        read = read_volume(tmp_path / f"{name}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(read), VALUES.T), name
        assert read.GetSpacing() == pytest.approx((2, 2, 3), rel=1e-5), name


def test_a_header_that_places_the_volume_in_two_ways_is_noted(tmp_path: Path) -> None:
    """ITK follows the qform, nibabel the sform; the voxels and their size are the same."""
    image = nibabel.Nifti1Image(VALUES.astype(np.int16), AFFINE)
    for sform, code, ambiguous in (
        (AFFINE, 2, False),
        (AFFINE[[1, 0, 2, 3]], 2, True),
        (AFFINE[[1, 0, 2, 3]], 1, False),
    ):
        image.set_qform(AFFINE, 1)
        image.set_sform(sform, code)
        nibabel.save(image, tmp_path / "a.nii")
        assert read_counted(tmp_path / "a.nii").ambiguous is ambiguous
    assert ambiguous_note(["b", "a"]).startswith("note: qform and sform place 2 cases differently (a, b)")
