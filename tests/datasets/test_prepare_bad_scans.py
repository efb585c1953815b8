"""Scans that dataset prepare refuses, leaves out or names, one by one; masks beside scans."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from hyspark_nnunet.datasets.check import check
from hyspark_nnunet.datasets.dataset_json import read_dataset
from hyspark_nnunet.datasets.pool import PoolOptions, pool
from hyspark_nnunet.datasets.prepare import prepare
from tests.datasets.conftest import content, options, remains
from tests.datasets.dicom_files import save, slices
from tests.datasets.scans import array_of, ct, mr, write


def altered(change: Callable[[np.ndarray], None]) -> sitk.Image:
    array = sitk.GetArrayFromImage(ct()).astype(np.float32)
    change(array)
    return sitk.GetImageFromArray(array)


def put_nan(array: np.ndarray) -> None:
    array[0, 0, 0] = np.nan


@pytest.mark.parametrize("labels", ["foreground", "none"])
def test_all_bad_scans_are_listed_and_left_out(tmp_path: Path, raw: Path, labels: str) -> None:
    """What check would reject is not made; one odd file does not hide the others."""
    for i in range(3):
        write(ct(i), tmp_path / f"s/good{i}.nii.gz")
    bad = {
        "colour": (sitk.Compose([ct(), ct(1), ct(2)]), "3 values per voxel in one file"),
        "complex": (sitk.Cast(ct(), sitk.sitkComplexFloat32), "2 values per voxel in one file"),
        "constant": (ct() * 0 - 1000, "constant: every voxel is -1000"),
        "films": (sitk.JoinSeries([ct(), ct(1)]), "wrong number of channels: 2 instead of 1"),
        "image": (ct()[:, :, 2], "store a 2D image as a volume of one slice"),
        "mr": (mr(), "it does not look like CT, as the other scans do"),
        "nan": (altered(put_nan), "1 NaN of 720 voxels"),
        "slice": (ct(3)[:, :, 2:3], "2D: 12 x 10 x 1 voxels, but other cases are volumes"),
        "unit": (ct(spacing=(0.002, 0.002, 0.003)), "implausible spacing: 0.002 x 0.002 x 0.003 mm"),
    }
    for name, (image, _) in bad.items():
        write(image, tmp_path / f"s/{name}.mha")
    asked = options(tmp_path / "s", labels=labels, exclude=("mr.mha",))
    with pytest.raises(ValueError, match=r"8 of 11 cases cannot be used, so nothing was made") as caught:
        prepare(asked, raw)
    lines = {line.split(":")[0].strip(): line for line in str(caught.value).splitlines()[1:]}
    for name, (_, message) in bad.items():
        assert name == "mr" or message in lines[name]
    assert remains(raw) == []
    folder = prepare(dataclasses.replace(asked, exclude=(), skip_bad=True, channels=("CT",), files="copied"), raw)
    assert list(content(folder)["dataset"]) == ["good0", "good1", "good2", "mr"]
    assert set(content(folder)["hyspark_nnunet"]["left_out"]) == set(bad) - {"mr"}
    for part in ("imagesTr", "labelsTr"):
        assert len(list((folder / part).iterdir())) == 4
    assert check(folder, 1) == 0


def test_a_scan_that_differs_from_the_sample_is_named(tmp_path: Path, raw: Path) -> None:
    for i in range(9):
        write(ct(i), tmp_path / f"s/a{i}.nii.gz")
    write(mr(), tmp_path / "s/a1b.nii.gz")  # none of the five that are read to recognise the channel
    with pytest.raises(ValueError, match=r"1 of 10 cases cannot be used(.|\n)*a1b: it does not look like CT"):
        prepare(options(tmp_path / "s"), raw)


@pytest.mark.parametrize("channels", [(), ("CT",)])
def test_the_modality_of_every_series_counts(tmp_path: Path, raw: Path, channels: tuple[str, ...]) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (4, 6, 6)).astype(np.int16)
    for i in range(6):
        for k, dataset in enumerate(slices(stored + i, "MR" if i == 1 else "CT")):
            save(dataset, tmp_path / f"s/p{i}/{k}.dcm")
    asked = options(tmp_path / "s", channels=channels)
    with pytest.raises(ValueError, match=r"1 of 6 cases cannot be used(.|\n)*p1: its modality is MR, but the channel"):
        prepare(asked, raw)
    assert len(content(prepare(dataclasses.replace(asked, skip_bad=True), raw))["dataset"]) == 5


def test_slices_alone_are_a_dataset_and_a_picture_that_fails_stops_nothing(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        write(ct(i)[:, :, 2:3], tmp_path / f"s/{i}.nii.gz")
    folder = prepare(options(tmp_path / "s"), raw)
    assert check(folder, 1) == 0 and imread(folder / "foreground_check.png").std() > 0.05
    monkeypatch.setattr("hyspark_nnunet.visualisation.save_figure", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("hyspark_nnunet.datasets.foreground_picture.save_figure", lambda *_, **__: 1 / 0)
    assert len(content(prepare(options(tmp_path / "s", overwrite=True), raw))["dataset"]) == 2
    assert "foreground_check.png is not drawn (ZeroDivisionError" in capsys.readouterr().out


def test_names_of_segmentations_are_avoided_and_twins_in_other_endings_are_apart(tmp_path: Path, raw: Path) -> None:
    write(ct(0), tmp_path / "s/liver_0.nii.gz")
    write(ct(1), tmp_path / "s/liver_0_seg.nii.gz")
    write(ct(2), tmp_path / "s/liver_0.nii")
    with pytest.raises(
        ValueError, match=r"1 of 3 cases(.|\n)*liver_0-\w*: ITK, and therefore nnU-Net, reads voxels that differ"
    ):
        prepare(options(tmp_path / "s"), raw)
    folder = prepare(options(tmp_path / "s", files="copied"), raw)
    cases = content(folder)["dataset"]
    assert len(cases) == 3 and not [name for name in cases if name.endswith("_seg")]
    voxels = sorted(int(array_of(folder / files["images"][0]).sum()) for files in cases.values())
    assert voxels == sorted(int(sitk.GetArrayFromImage(ct(i)).sum()) for i in range(3))


def test_a_path_with_a_variable_in_it_is_a_bad_case(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE", "other")
    write(ct(0), tmp_path / "s/a.nii.gz")
    write(ct(1), tmp_path / "s/$SITE.nii.gz")
    with pytest.raises(ValueError, match=r"1 of 2 cases(.|\n)*SITE-\w*: nnU-Net would read a part of .* as a variable"):
        prepare(options(tmp_path / "s"), raw)
    assert len(content(prepare(options(tmp_path / "s", files="copied"), raw))["dataset"]) == 2


def test_masks_exclude_voxels_and_a_pool_keeps_them(
    scans: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = tmp_path / "masks"
    face = np.zeros((6, 10, 12), np.uint8)
    face[2:4, :5, 3:6] = 7
    mask = sitk.GetImageFromArray(face)
    mask.SetSpacing(ct().GetSpacing())
    write(mask, masks / "site A/two.nii.gz")  # the same path, another ending
    write(mask, masks / "elsewhere/four.mha")  # the same name
    target = prepare(options(scans, exclude_masks=str(masks)), raw)
    assert f"{masks}: masks for 2 of 4 cases" in capsys.readouterr().out
    dataset = read_dataset(target)
    assert dataset.content["labels"] == {"background": 0, "body": 1, "ignore": 2}
    without = read_dataset(prepare(options(scans, dataset_id=61, name="Plain"), raw))
    for case, files in dataset.cases.items():
        expected = array_of(without.path(str(without.cases[case].label)))
        if "two" in case or "four" in case:
            expected[face != 0] = 2
        assert (array_of(dataset.path(str(files.label))) == expected).all()
    assert check(target, 1) == 0
    pooled = read_dataset(pool(PoolOptions((dataset.name, without.name), 70, "Pool"), raw))
    assert pooled.content["labels"]["ignore"] == 2
    write(mask[:, :, 1:], masks / "one.nii.gz")
    with pytest.raises(ValueError, match=r"one.nii.gz: image and mask differ in size: 12 x 10 x 6 and 12 x 10 x 5"):
        prepare(options(scans, exclude_masks=str(masks), overwrite=True), raw)
    with pytest.raises(ValueError, match="none of the 1 masks in .* is called as a scan"):
        prepare(options(scans, exclude_masks=str(masks / "elsewhere"), exclude=("*four*",), overwrite=True), raw)
