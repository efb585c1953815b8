"""The body is found in CT and in other scans, and never nothing."""

import numpy as np
import pytest
import SimpleITK as sitk

from hyspark_nnunet.datasets.foreground import body_mask
from tests.datasets.scans import ct, mr


def thorax(open_lungs: bool) -> sitk.Image:
    """A body with lungs, a trachea that leaves at the top, and a table below it."""
    array = np.full((24, 40, 40), -1000, dtype=np.float32)
    array[:, 8:30, 5:35] = 30
    lungs = (slice(None) if open_lungs else slice(4, 20), slice(12, 24), slice(9, 31))
    array[lungs] = -820
    array[12:, 13:17, 18:22] = -1000
    array[:, 34:36, 3:37] = 200  # table
    array += np.random.default_rng(0).normal(0, 15, array.shape).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 2.0, 2.0))
    return image


@pytest.mark.parametrize("open_lungs", [False, True])
def test_lungs_and_trachea_are_inside_the_table_is_not(open_lungs: bool) -> None:
    mask = body_mask([thorax(open_lungs)], ["CT"])
    true = np.zeros((24, 40, 40), dtype=np.uint8)
    true[:, 8:30, 5:35] = 1
    found = sitk.GetArrayFromImage(mask)
    assert set(np.unique(found)) == {0, 1} and mask.GetPixelID() == sitk.sitkUInt8
    assert np.mean(found == true) > 0.995
    assert not found[:, 33:].any()


def test_a_crop_of_lungs_open_to_the_sides_is_inside() -> None:
    image = thorax(True)[12:28, 13:25, :]
    assert sitk.GetArrayFromImage(body_mask([image], ["CT"])).mean() > 0.97


def test_the_patients_axis_is_read_from_the_direction() -> None:
    upright = thorax(True)
    turned = sitk.PermuteAxes(upright, [2, 0, 1])
    found = sitk.GetArrayFromImage(sitk.PermuteAxes(body_mask([turned], ["CT"]), [1, 2, 0]))
    assert np.array_equal(found, sitk.GetArrayFromImage(body_mask([upright], ["CT"])))


def test_otsu_elsewhere_with_holes_filled() -> None:
    image = mr(shape=(12, 20, 20))
    array = sitk.GetArrayFromImage(image)
    array[5:7, 9:11, 9:11] = 3  # dark, inside
    array[0, 0, 0] = np.nan
    array[6, 8, 8] = 1e6  # one bright voxel does not draw the threshold up
    true = np.zeros(array.shape)
    true[1:-1, 2:-2, 2:-2] = 1
    mask = body_mask([sitk.GetImageFromArray(array)], ["MRI"])
    assert np.array_equal(sitk.GetArrayFromImage(mask), true)


def test_a_crop_inside_the_body_has_no_background() -> None:
    array = np.random.default_rng(0).choice([180.0, 320.0], (8, 8, 8)).astype(np.float32)
    assert sitk.GetArrayFromImage(body_mask([sitk.GetImageFromArray(array)], ["MRI"])).all()


@pytest.mark.parametrize("channel", ["CT", "MRI"])
@pytest.mark.parametrize("value", [-1000.0, 0.0, np.nan])
def test_a_scan_without_a_body_is_foreground_all_over(channel: str, value: float) -> None:
    image = sitk.GetImageFromArray(np.full((4, 4, 4), value, dtype=np.float32))
    assert sitk.GetArrayFromImage(body_mask([image], [channel])).all()


def test_channels_are_united_and_must_fit() -> None:
    first, second = (np.zeros((8, 8, 8), dtype=np.float32) for _ in range(2))
    first[1:4, 1:4, 1:4], second[4:7, 4:7, 4:7] = 100, 100
    mask = body_mask([sitk.GetImageFromArray(a) for a in (first, second)], ["T1", "T2"])
    assert np.array_equal(sitk.GetArrayFromImage(mask), (first + second > 0).astype(np.uint8))
    with pytest.raises(ValueError, match="channels differ in size"):
        body_mask([ct(), ct(shape=(6, 10, 11))], ["CT", "CT"])
    with pytest.raises(ValueError, match="2 axes"):
        body_mask([ct()[:, :, 1]], ["CT"])


def test_the_geometry_is_the_images() -> None:
    image = ct()
    image.SetOrigin((3, 4, 5))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    mask = body_mask([image], ["CT"])
    assert (mask.GetOrigin(), mask.GetDirection(), mask.GetSpacing()) == (
        image.GetOrigin(),
        image.GetDirection(),
        image.GetSpacing(),
    )
