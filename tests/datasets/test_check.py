"""Every fault is found and said; a thousand cases with three bad ones give those three."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from hyspark_nnunet.datasets.case_checks import CheckJob, examine_case
from hyspark_nnunet.datasets.check import check, find_faults
from hyspark_nnunet.datasets.dataset_json import CaseFiles, dataset_json_text, read_dataset
from tests.datasets.scans import ct, write


def altered(change: Callable[[np.ndarray], None]) -> sitk.Image:
    image = sitk.Cast(ct(), sitk.sitkFloat32)
    array = sitk.GetArrayFromImage(image)
    change(array)
    result = sitk.GetImageFromArray(array)
    result.CopyInformation(image)
    return result


def put(value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[2, 3, :2] = value

    return change


def with_spacing(*spacing: float) -> sitk.Image:
    return ct(spacing=spacing)


def faults_of(path: Path, image: sitk.Image, n_channels: int = 1, ending: str = ".nii.gz") -> list[str]:
    file = write(image, path / f"a_0000{ending}")
    label = write(image, path / "a.mha")
    return list(examine_case(CheckJob("a", (str(file),), str(label), n_channels)).faults)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (altered(put(np.nan)), "2 NaN of 720 voxels"),
        (altered(put(-np.inf)), "2 infinite of 720 voxels"),
        (altered(lambda array: array.fill(7)), "constant: every voxel is 7"),
        (sitk.Cast(ct(), sitk.sitkComplexFloat32), "its voxels are complex numbers"),
        (with_spacing(0.001, 0.001, 0.003), "implausible spacing: 0.001 x 0.001 x 0.003 mm, outside 0.01 to 30 mm"),
        (with_spacing(1, 1, 500), "implausible spacing: 1 x 1 x 500 mm"),
        (sitk.JoinSeries([ct(0), ct(1)]), "wrong number of channels: 2 instead of 1"),
        (sitk.Compose([ct(0), ct(1)]), "wrong number of channels: 2 values per voxel in one file"),
    ],
)
def test_faults_of_an_image(tmp_path: Path, image: sitk.Image, message: str) -> None:
    assert any(fault.startswith(message) for fault in faults_of(tmp_path, image)), faults_of(tmp_path, image)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("pixel", [sitk.sitkFloat32, sitk.sitkFloat64])
def test_voxels_that_are_no_numbers_are_found_in_every_format(tmp_path: Path, ending: str, pixel: int) -> None:
    """ITK reads those of NIfTI as 0."""
    image = sitk.Cast(altered(put(np.nan)), pixel)
    image[0, 0, 0] = float("-inf")
    assert faults_of(tmp_path, image, ending=ending) == ["2 NaN and 1 infinite of 720 voxels"]


def test_a_volume_of_several_pieces_is_searched_to_its_end(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(40, 100, 100)).astype(np.float32)
    array[-1, -1, -1] = array[20, 1, 1] = np.nan
    assert faults_of(tmp_path, sitk.GetImageFromArray(array)) == ["2 NaN of 400000 voxels"]


def test_a_good_case_has_none(tmp_path: Path) -> None:
    assert faults_of(tmp_path, ct()) == []
    assert faults_of(tmp_path, altered(put(0))) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ct(1, shape=(6, 10, 11)), "channels 0 and 1 differ in size: 12 x 10 x 6 and 11 x 10 x 6 voxels"),
        (ct(1, spacing=(2.0, 2.5, 3.0)), "channels 0 and 1 differ in spacing"),
        (sitk.DICOMOrient(ct(1), "LPI"), "channels 0 and 1 differ in direction, by up to 2"),
    ],
)
def test_channels_that_do_not_fit(tmp_path: Path, other: sitk.Image, message: str) -> None:
    files = tuple(str(write(image, tmp_path / f"{i}.nii.gz")) for i, image in enumerate((ct(), other)))
    label = str(write(ct(), tmp_path / "label.nii.gz"))
    (fault,) = examine_case(CheckJob("a", files, label, 2)).faults
    assert fault.startswith(message)
    assert examine_case(CheckJob("a", files[:1], label, 2)).faults == ("wrong number of channels: 1 instead of 2",)


def test_origins_and_labels(tmp_path: Path) -> None:
    moved = ct(1)
    moved.SetOrigin((5, 0, 0))
    files = tuple(str(write(image, tmp_path / f"{i}.nii.gz")) for i, image in enumerate((ct(), moved)))
    small = str(write(ct(shape=(5, 10, 12)), tmp_path / "label.nii.gz"))
    faults = examine_case(CheckJob("a", files, small, 2)).faults
    assert faults[0].startswith("channels 0 and 1 differ in origin")
    assert faults[1] == "label file has 12 x 10 x 5 voxels, the image 12 x 10 x 6"
    assert "no label file" in examine_case(CheckJob("a", files[:1], None, 1)).faults[0]
    assert "label file: no file at" in examine_case(CheckJob("a", files[:1], "/none", 1)).faults[0]


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    file = write(ct(), tmp_path / "a.nii.gz")
    job = CheckJob("a", (str(file),), str(file), 1)
    file.write_bytes(file.read_bytes()[:300])
    assert examine_case(job).faults[0].startswith("truncated") and examine_case(job).digest == ""
    file.write_bytes(b"")
    assert examine_case(job).faults[0].startswith("unreadable")
    file.unlink()
    assert examine_case(job).faults[0].startswith("no file at")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 cases of which one is truncated, one holds NaN, one has the voxels of another in another format."""
    folder = tmp_path_factory.mktemp("thousand") / "Dataset062_Thousand"
    label = write(sitk.Image([5, 4, 3], sitk.sitkUInt8) + 1, folder / "labelsTr/all.nii.gz")
    rng = np.random.default_rng(0)
    cases = {}
    for i in range(1000):
        array = rng.normal(size=(3, 4, 5)).astype(np.float32)
        if i == 500:
            array[0, 0, 0] = np.nan
        path = write(sitk.GetImageFromArray(array), folder / f"scans/{i:04d}.nii.gz")
        cases[f"case_{i:04d}"] = CaseFiles((f"scans/{path.name}",), f"labelsTr/{label.name}")
    first = folder / "scans/0007.nii.gz"
    first.write_bytes(first.read_bytes()[:-30])
    write(sitk.ReadImage(str(folder / "scans/0123.nii.gz")), folder / "scans/0900.mha")
    cases["case_0900"] = CaseFiles(("scans/0900.mha",), "labelsTr/all.nii.gz")
    (folder / "dataset.json").write_text(dataset_json_text(["MRI"], cases, "none", "SimpleITKIO"))
    return folder


def test_three_bad_of_a_thousand(thousand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (thousand / "dataset.json").read_text()
    assert check(thousand, 2, as_json=True, exclude_bad=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cases"] == 1000 and list(report["bad"]) == ["case_0007", "case_0500", "case_0900"]
    assert [len(faults) for faults in report["bad"].values()] == [1, 1, 1]
    for fault, start in zip(
        report["bad"].values(), ("truncated", "1 NaN of 60", "duplicate: the same voxels as case_0123"), strict=True
    ):
        assert fault[0].startswith(start)

    assert report["excluded"] is True
    kept = get_filenames_of_train_images_and_targets(str(thousand))
    assert len(kept) == json.loads((thousand / "dataset.json").read_text())["numTraining"] == 997
    assert not {"case_0007", "case_0500", "case_0900"} & set(kept)
    assert json.loads((thousand / "excluded_cases.json").read_text()) == report["bad"]
    assert (thousand / "dataset.json.before_check").read_text() == before


def test_a_set_in_nnunets_folders_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "Dataset006_Organs"
    for i in range(3):
        image = write(ct(i), folder / f"imagesTr/p{i}_0000.nii.gz")
        write(sitk.Cast(ct(i) > 0, sitk.sitkUInt8), folder / f"labelsTr/p{i}.nii.gz")
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described | {"numTraining": 3}))
    assert check(folder, 1) == 0
    assert "3 cases, 0 bad" in capsys.readouterr().out
    shutil.copy(image, folder / "imagesTr/p0_0000.nii.gz")
    assert check(folder, 1) == 1
    assert "p2    duplicate: the same voxels as p0" in capsys.readouterr().out
    assert check(folder, 1, exclude_bad=True) == 0
    assert "3 cases, 1 bad; left out of dataset.json, see excluded_cases.json" in capsys.readouterr().out
    assert check(folder, 1) == 0
    assert list(get_filenames_of_train_images_and_targets(str(folder))) == ["p0", "p1"]


def test_exclusion_asks_to_plan_again_where_a_dataset_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preprocessing reads the list of cases that planning copied."""
    folder, planned = tmp_path / "raw/Dataset001_Two", tmp_path / "preprocessed/Dataset001_Two"
    for i in range(2):
        write(altered(put(np.nan)) if i else ct(), folder / f"imagesTr/p{i}_0000.nii.gz")
        write(sitk.Cast(ct(i) > 0, sitk.sitkUInt8), folder / f"labelsTr/p{i}.nii.gz")
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described | {"numTraining": 2}))
    monkeypatch.setenv("nnUNet_preprocessed", str(planned.parent))
    planned.mkdir(parents=True)
    shutil.copy(folder / "dataset.json", planned)
    assert check(folder, 1) == 1
    assert "plan again" not in capsys.readouterr().out
    assert check(folder, 1, exclude_bad=True) == 0
    assert f"plan again: {planned / 'dataset.json'}" in capsys.readouterr().out


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dataset.json in"):
        check(tmp_path, 1)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check(tmp_path, 1)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks channel_names, labels, file_ending"):
        check(tmp_path, 1)
    file = write(ct() * 0, tmp_path / "a.nii.gz")
    cases = {"a": CaseFiles((str(file),), str(file))}
    (tmp_path / "dataset.json").write_text(dataset_json_text(["CT"], cases, "none", "SimpleITKIO"))
    with pytest.raises(ValueError, match="all 1 cases of .* are bad: dataset.json is left as it is"):
        check(tmp_path, 1, exclude_bad=True)


def write_pictures(folder: Path, shape: tuple[int, ...] = (8, 9, 3)) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        write(
            sitk.GetImageFromArray(rng.integers(0, 255, shape).astype(np.uint8), True),
            folder / f"imagesTr/x{i}_0000.png",
        )
        write(sitk.GetImageFromArray(np.eye(*shape[:2]).astype(np.uint8)), folder / f"labelsTr/x{i}.png")
    described = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "a": 1}}
    (folder / "dataset.json").write_text(json.dumps(described | {"file_ending": ".png", "numTraining": 3}))


def test_images_of_nnunets_other_readers_are_good(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    assert check(tmp_path, 1) == 0
    shutil.copy(tmp_path / "imagesTr/x1_0000.png", tmp_path / "imagesTr/x2_0000.png")
    (tmp_path / "imagesTr/x0_0000.png").write_bytes(b"no image")
    write(sitk.Image([3, 3], sitk.sitkUInt8), tmp_path / "labelsTr/x1.png")
    faults = find(tmp_path)
    assert faults["x0"][0].startswith("nnU-Net's NaturalImage2DIO cannot read it: ")
    assert faults["x1"] == ["label file has 3 x 3 x 1 voxels, the image 9 x 8 x 1"]
    assert faults["x2"] == ["duplicate: the same voxels as x1"] and list(faults) == ["x0", "x1", "x2"]


def find(folder: Path) -> dict[str, list[str]]:
    return find_faults(read_dataset(folder), 1)[0]


def test_flat_images_are_a_fault_only_among_volumes(tmp_path: Path) -> None:
    images = {"a": ct(0)[:, :, 2:3], "b": ct(1)[:, :, 2:3], "c": ct(2)}
    cases = {}
    for name, image in images.items():
        write(image, tmp_path / f"{name}.nii.gz")
        cases[name] = CaseFiles((f"{name}.nii.gz",), f"{name}.nii.gz")
    (tmp_path / "dataset.json").write_text(dataset_json_text(["CT"], cases, "none", "SimpleITKIO"))
    assert {name: faults[0][:24] for name, faults in find(tmp_path).items()} == dict.fromkeys(
        "ab", "2D: 12 x 10 x 1 voxels, "
    )
    del cases["c"]
    (tmp_path / "dataset.json").write_text(dataset_json_text(["CT"], cases, "none", "SimpleITKIO"))
    assert find(tmp_path) == {}


def test_reserved_names_damaged_labels_and_images_without_a_number(tmp_path: Path) -> None:
    for name in ("a", "a_seg", "b"):
        write(ct(len(name)), tmp_path / f"imagesTr/{name}_0000.nii.gz")
        label = write(sitk.Cast(ct() > 0, sitk.sitkUInt8), tmp_path / f"labelsTr/{name}.nii.gz")
    label.write_bytes(label.read_bytes()[:-9])
    write(ct(9), tmp_path / "imagesTr/c.nii.gz")
    described = {"modality": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    faults = find(tmp_path)
    assert faults["a_seg"] == ["its name ends in _seg, which nnU-Net reserves for segmentations: rename the case"]
    assert faults["b"][0].startswith("label file: truncated")
    assert faults["c"] == ["wrong number of channels: 0 instead of 1; images are called c_0000 and so on"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_names": ["CT"]}, r'channel_names in .* such as {"0": "CT"}, but is \["CT"\]'),
        ({"channel_names": {"CT": "0"}}, r'such as {"0": "CT"}, but is {"CT": "0"}'),
        ({"labels": {"0": "background"}}, r'such as {"background": 0, "liver": 1}, but is {"0": "background"}'),
        ({"labels": ["a"]}, "labels in"),
        ({"dataset": [{"image": "a", "label": "b"}]}, r"dataset in .* such as .*but is \["),
        ({"dataset": {"p1": {"images": "a.nii.gz", "label": "b"}}}, "1 cases have another form: p1: "),
        ({"file_ending": None}, "file_ending in .* must be a text"),
    ],
)
def test_other_forms_of_dataset_json_are_named(tmp_path: Path, change: dict, message: str) -> None:
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz", "dataset": {}}
    (tmp_path / "dataset.json").write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path)


def test_an_entry_without_a_label_is_a_fault_of_its_case(tmp_path: Path) -> None:
    write(ct(), tmp_path / "a.nii.gz")
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(described | {"dataset": {"a": {"images": ["a.nii.gz"]}}}))
    assert find(tmp_path)["a"][0].startswith("no label file")
