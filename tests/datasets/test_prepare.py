"""From folders of scans to datasets, and what is refused on the way."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from hyspark_nnunet.datasets.dataset_json import read_dataset
from hyspark_nnunet.datasets.prepare import prepare
from tests.datasets.conftest import TARGET, content, options, remains
from tests.datasets.scans import array_of, ct, mr, write, write_dicom_series


def test_files_are_listed_where_they_lie_and_nnunet_reads_the_list(scans: Path, raw: Path) -> None:
    folder = prepare(options(scans), raw)
    assert folder == raw / TARGET and remains(raw) == [TARGET]
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "foreground_check.png", "labelsTr"]
    written = content(folder)
    assert written["numTraining"] == 4 and written["labels"] == {"background": 0, "body": 1}
    assert written["channel_names"] == {"0": "CT"} and written["overwrite_image_reader_writer"] == "SimpleITKIO"
    theirs = get_filenames_of_train_images_and_targets(str(folder))
    ours = read_dataset(folder)
    for name, files in theirs.items():
        assert files["images"] == [ours.path(ours.cases[name].images[0])] and Path(files["images"][0]).is_file()
        label = sitk.ReadImage(files["label"])
        assert label.GetSpacing() == ct().GetSpacing() and label.GetPixelID() == sitk.sitkUInt8
        assert sitk.GetArrayFromImage(label)[2, 5, 5] == 1 and sitk.GetArrayFromImage(label)[0, 0, 0] == 0
    assert len(theirs) == 4 and imread(folder / "foreground_check.png").std() > 0.05


@pytest.mark.parametrize("processes", [1, 2])
def test_names_do_not_depend_on_the_number_of_processes(scans: Path, raw: Path, processes: int) -> None:
    names = list(content(prepare(options(scans, processes=processes), raw))["dataset"])
    assert len(names) == 4 and names[:2] == ["four", "one"] and all(name.startswith("site-A__t") for name in names[2:])


def test_relative_paths_and_variables(scans: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANS_HOME", str(scans.parent))
    relative = content(prepare(options(scans, relative=True), raw))["dataset"]["one"]["images"]
    assert relative == ["../../scans/one.nii.gz"]
    folder = prepare(options("$SCANS_HOME/scans", overwrite=True), raw)
    assert content(folder)["dataset"]["one"]["images"] == ["$SCANS_HOME/scans/one.nii.gz"]
    assert get_filenames_of_train_images_and_targets(str(folder))["one"]["images"] == [str(scans / "one.nii.gz")]


def test_copies_are_nifti(scans: Path, raw: Path) -> None:
    folder = prepare(options(scans, files="copied"), raw)
    for name, files in content(folder)["dataset"].items():
        assert files["images"] == [f"imagesTr/{name}_0000.nii.gz"]
    assert (folder / "imagesTr/one_0000.nii.gz").read_bytes() == (scans / "one.nii.gz").read_bytes()
    assert np.array_equal(array_of(folder / "imagesTr/four_0000.nii.gz"), array_of(scans / "four.nii"))


def test_links(scans: Path, raw: Path) -> None:
    with pytest.raises(ValueError, match=r"--link takes .nii.gz only.*\.mha, \.nii, \.nrrd: use --copy"):
        prepare(options(scans, files="linked"), raw)
    folder = prepare(options(scans, files="linked", include=("*.nii.gz",)), raw)
    assert (folder / "imagesTr/one_0000.nii.gz").resolve() == (scans / "one.nii.gz").resolve()


def test_channels_by_suffix_and_by_folder(tmp_path: Path, raw: Path) -> None:
    for case in ("p1", "p2"):
        for channel, name in enumerate(("T1", "T2")):
            write(mr(channel), tmp_path / f"suffix/{case}_{channel:04d}.nii.gz")
            write(mr(channel), tmp_path / f"folders/{name}/{case}.nii.gz")
    first = content(prepare(options(tmp_path / "suffix", channels=("T1", "T2")), raw))
    assert first["channel_names"] == {"0": "T1", "1": "T2"}
    assert [Path(path).name for path in first["dataset"]["p1"]["images"]] == ["p1_0000.nii.gz", "p1_0001.nii.gz"]
    by_folder = tuple(f"{name}={tmp_path}/folders/{name}" for name in ("T2", "T1"))
    second = content(prepare(options(None, channels=by_folder, dataset_id=61), raw))
    assert second["channel_names"] == {"0": "T2", "1": "T1"}
    assert [Path(path).parent.name for path in second["dataset"]["p2"]["images"]] == ["T2", "T1"]


def test_incomplete_cases_are_named(tmp_path: Path, raw: Path) -> None:
    for name in ("p1_0000", "p1_0001", "p2_0000"):
        write(mr(), tmp_path / f"s/{name}.nii.gz")
    asked = options(tmp_path / "s", channels=("T1", "T2"))
    with pytest.raises(ValueError, match=r"1 of 2 cases cannot be used(.|\n)*p2: channel _0001 is missing"):
        prepare(asked, raw)
    assert remains(raw) == []
    written = content(prepare(dataclasses.replace(asked, skip_bad=True), raw))
    assert list(written["dataset"]) == ["p1"] and written["numTraining"] == 1
    assert written["hyspark_nnunet"]["left_out"] == {"p2": "channel _0001 is missing"}


def test_unreadable_cases_are_named_and_leave_nothing(scans: Path, raw: Path) -> None:
    (scans / "one.nii.gz").write_bytes((scans / "one.nii.gz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"1 of 4 cases cannot be used(.|\n)*one: truncated"):
        prepare(options(scans), raw)
    assert remains(raw) == []
    assert content(prepare(options(scans, skip_bad=True), raw))["numTraining"] == 3


def test_no_labels_means_all_foreground(scans: Path, raw: Path) -> None:
    folder = prepare(options(scans, labels="none"), raw)
    assert array_of(folder / "labelsTr/one.nii.gz").all() and not (folder / "foreground_check.png").exists()


def test_dicom_is_written_once(tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ct(4)
    shuffled = [f"{k}.dcm" for k in (3, 5, 0, 4, 1, 2)]
    write_dicom_series(image, tmp_path / "dicom/patient1", shuffled)
    with pytest.raises(ValueError, match="1 DICOM series, patient1 the first: nnU-Net reads no series; omit --no-copy"):
        prepare(options(tmp_path / "dicom", convert=False), raw)
    folder = prepare(options(tmp_path / "dicom"), raw)
    assert content(folder)["dataset"]["patient1"]["images"] == ["imagesTr/patient1_0000.nii.gz"]
    assert content(folder)["channel_names"] == {"0": "CT"}
    assert np.array_equal(array_of(folder / "imagesTr/patient1_0000.nii.gz"), sitk.GetArrayFromImage(image))
    assert "several folders" not in capsys.readouterr().out
    write_dicom_series(image, tmp_path / "dicom/patient1/second", shuffled)
    prepare(options(tmp_path / "dicom", overwrite=True), raw)
    assert "lie in several folders: 1 (patient1, patient1/second)" in capsys.readouterr().out


def test_an_existing_layout_is_taken_as_it_is(raw: Path) -> None:
    folder = raw / "Dataset060_TotalSegmentator"
    paths = [write(ct(i), folder / f"imagesTr/s{i}_0000.nii.gz") for i in range(2)]
    before = {path: path.read_bytes() for path in paths}
    assert prepare(options(folder, dataset_id=None, name=None), raw) == folder
    assert content(folder)["dataset"]["s0"] == {"images": ["imagesTr/s0_0000.nii.gz"], "label": "labelsTr/s0.nii.gz"}
    assert {path: path.read_bytes() for path in paths} == before
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "foreground_check.png", "imagesTr", "labelsTr"]
    with pytest.raises(ValueError, match="dataset.json exists and is not overwritten"):
        prepare(options(folder, dataset_id=None, name=None), raw)
    prepare(options(folder, dataset_id=None, name=None, labels="none", overwrite=True), raw)
    files = read_dataset(folder).cases["s1"]
    assert files.label and array_of(folder / files.label).all() and not (folder / "labelsTr").exists()
    with pytest.raises(ValueError, match="is the dataset itself"):
        prepare(options(folder, dataset_id=None, name=None, files="copied", overwrite=True), raw)


@pytest.mark.parametrize("label", ["../Dataset061_Other/labelsTr/s0.nii.gz", "{absolute}/s0.nii.gz", "masks/s0.nii.gz"])
def test_label_files_that_lie_elsewhere_stay(raw: Path, label: str) -> None:
    """A pool lists the label files of its datasets: to remove their folder would remove nnUNet_raw."""
    folder = raw / TARGET
    image = write(ct(), folder / "imagesTr/s0_0000.nii.gz")
    other = write(ct(), raw / "Dataset061_Other/labelsTr/s0.nii.gz")
    prepare(options(folder, dataset_id=None, name=None), raw)
    described = content(folder)
    described["dataset"]["s0"]["label"] = label.format(absolute=other.parent)
    (folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"the label files of .* are not its own \(.*s0.nii.gz\)"):
        prepare(options(folder, dataset_id=None, name=None, overwrite=True), raw)
    assert content(folder) == described and image.exists() and other.exists()


def test_labels_of_others_are_never_replaced(raw: Path) -> None:
    folder = raw / TARGET
    write(ct(), folder / "imagesTr/a_0000.nii.gz")
    label = write(sitk.Cast(ct() > 0, sitk.sitkUInt8), folder / "labelsTr/a.nii.gz")
    before = label.read_bytes()
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="has labels of its own"):
        prepare(options(folder, dataset_id=None, name=None, overwrite=True), raw)
    elsewhere = write(ct(), raw.parent / "s/b.nii.gz").parent
    with pytest.raises(ValueError, match="was not made by hyspark_nnunet.*remove it yourself"):
        prepare(options(elsewhere, overwrite=True), raw)
    assert label.read_bytes() == before and content(folder) == described


def test_nothing_is_overwritten_unasked_nor_before_the_new_is_complete(scans: Path, raw: Path) -> None:
    folder = prepare(options(scans), raw)
    before = (folder / "dataset.json").read_text()
    with pytest.raises(ValueError, match="exists and is not overwritten: give another -d or -n, or --overwrite"):
        prepare(options(scans, labels="none"), raw)
    (scans / "one.nii.gz").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be used"):
        prepare(options(scans, overwrite=True), raw)
    assert (folder / "dataset.json").read_text() == before and remains(raw) == [TARGET]
    write(ct(9), scans / "one.nii.gz")
    write(ct(8), scans / "five.nii.gz")
    assert content(prepare(options(scans, overwrite=True), raw))["numTraining"] == 5
    assert remains(raw) == [TARGET]


def test_a_set_lost_between_the_two_renames_comes_back(scans: Path, raw: Path) -> None:
    folder = prepare(options(scans), raw)
    folder.rename(raw / f".{TARGET}.replaced")
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        prepare(options(scans), raw)
    assert remains(raw) == [TARGET]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_id": None}, "give the new dataset a number and a name"),
        ({"dataset_id": 1000}, "the number is 1 to 999"),
        ({"name": "a b"}, "no dataset can be called Dataset060_a b"),
        ({"channels": ("T1", "T2=x")}, "names or NAME=FOLDER, not both"),
        ({"channels": ("T1", "T1")}, "must not be empty or repeated"),
        ({"folder": None}, "no folder of scans"),
        ({"processes": 0}, "0 processes are too few"),
    ],
)
def test_refusals_of_what_is_asked(scans: Path, raw: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(options(scans), **change), raw)
    assert remains(raw) == []


def test_a_number_belongs_to_one_name(scans: Path, raw: Path) -> None:
    (raw / "Dataset060_Other").mkdir()
    with pytest.raises(ValueError, match="number 060 is used by .*Dataset060_Other"):
        prepare(options(scans), raw)


@pytest.mark.parametrize(
    ("series", "decided"),
    [(False, "the intensities of 1 scans"), (True, "the modality of 1 DICOM series and the intensities of 1 scans")],
)
def test_what_recognised_ct_is_printed(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture, series: bool, decided: str
) -> None:
    write(ct(), tmp_path / "s/a.nii.gz")
    if series:
        write_dicom_series(ct(), tmp_path / "s/b", [f"{k}.dcm" for k in range(ct().GetSize()[2])])
    prepare(options(tmp_path / "s"), raw)
    assert f"channel 0: CT, by {decided} (--channels names another)" in capsys.readouterr().out


def test_scans_that_are_no_ct_must_be_called_something(tmp_path: Path, raw: Path) -> None:
    write(ct(), tmp_path / "s/a.nii.gz")
    write(mr(), tmp_path / "s/b.nii.gz")
    with pytest.raises(ValueError, match=r"do not all look like CT \(such as b\): name the channel"):
        prepare(options(tmp_path / "s"), raw)
    assert content(prepare(options(tmp_path / "s", channels=("MRI",)), raw))["channel_names"] == {"0": "MRI"}


def test_scans_inside_the_new_folder_are_refused(raw: Path) -> None:
    write(ct(), raw / TARGET / "scans/a.nii.gz")
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        prepare(options(raw / TARGET / "scans"), raw)


def test_the_original_scans_are_never_written(scans: Path, raw: Path) -> None:
    before = {path: path.read_bytes() for path in scans.rglob("*") if path.is_file()}
    prepare(options(scans), raw)
    prepare(options(scans, files="copied", overwrite=True), raw)
    assert {path: path.read_bytes() for path in scans.rglob("*") if path.is_file()} == before
