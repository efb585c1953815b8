"""Several datasets as one: names, channels, held-out cases, and no image copied."""

import dataclasses
import json
from pathlib import Path

import pytest
import SimpleITK as sitk
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from hyspark_nnunet.datasets.check import check
from hyspark_nnunet.datasets.pool import PoolOptions, pool, read_case_list
from hyspark_nnunet.datasets.prepare import PrepareOptions, prepare
from tests.datasets.scans import array_of, ct, mr, write

POOL = PoolOptions(("60", "4"), 70, "Pool")


def write_labelled(folder: Path, channels: tuple[str, ...], cases: int, ending: str = ".nii.gz") -> None:
    for i in range(cases):
        for c, name in enumerate(channels):
            image = ct(50 + 10 * c + i) if name == "CT" else mr(50 + 10 * c + i)
            write(image, folder / f"imagesTr/p{i}_{c:04d}{ending}")
        write(sitk.Cast(ct() > 1000, sitk.sitkUInt8) + 2, folder / f"labelsTr/p{i}{ending}")
    described = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": cases,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(described))


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60: three CTs prepared; 4: two labelled CTs; 5: two labelled MRs of two channels; 6: two labelled MRs."""
    for name in ("preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    raw = tmp_path / "raw"
    for i in range(3):
        write(ct(i), tmp_path / f"scans/s{i}.nii.gz")
    prepare(PrepareOptions(str(tmp_path / "scans"), 60, "Scans"), raw)
    write_labelled(raw / "Dataset004_Organs", ("CT",), 2, ".nrrd")
    write_labelled(raw / "Dataset005_Brain", ("T1", "T2"), 2)
    write_labelled(raw / "Dataset006_Head", ("MRI",), 2)
    return raw


def cases_of(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())["dataset"]


def test_labelled_and_unlabelled_become_one(raw: Path, tmp_path: Path) -> None:
    folder = pool(POOL, raw)
    cases = cases_of(folder)
    assert list(cases) == ["Dataset004_p0", "Dataset004_p1", "Dataset060_s0", "Dataset060_s1", "Dataset060_s2"]
    assert cases["Dataset060_s0"]["images"] == [str(tmp_path / "scans/s0.nii.gz")]
    assert cases["Dataset004_p1"]["images"] == ["../Dataset004_Organs/imagesTr/p1_0000.nrrd"]
    assert cases["Dataset060_s0"]["label"] == "../Dataset060_Scans/labelsTr/s0.nii.gz"
    assert not (folder / "imagesTr").exists() and (folder / "foreground_check.png").exists()
    for files in get_filenames_of_train_images_and_targets(str(folder)).values():
        assert Path(files["images"][0]).is_file() and set(array_of(files["label"]).ravel()) == {0, 1}
    written = json.loads((folder / "dataset.json").read_text())
    assert written["labels"] == {"background": 0, "body": 1} and written["numTraining"] == 5
    assert written["hyspark_nnunet"]["from"] == ["Dataset060_Scans", "Dataset004_Organs"]


def test_a_pool_of_a_pool(raw: Path) -> None:
    pool(POOL, raw)
    folder = pool(dataclasses.replace(POOL, sources=("70",), dataset_id=71), raw)
    assert list(cases_of(folder))[0] == "Dataset070_Dataset004_p0" and len(cases_of(folder)) == 5


def test_modalities_do_not_mix_unless_one_says_how(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = dataclasses.replace(POOL, sources=("60", "6"))
    with pytest.raises(ValueError, match=r"Dataset060_Scans: CT; Dataset006_Head: MRI.*normalises.*--channels-from"):
        pool(mixed, raw)
    assert not list(raw.glob("*070*")) and not list(raw.glob(".*070*"))
    folder = pool(dataclasses.replace(mixed, channels_from=("6",)), raw)
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "MRI"}
    assert "warning" not in capsys.readouterr().out
    pool(dataclasses.replace(mixed, channels_from=("60",), overwrite=True), raw)
    assert "warning: Dataset006_Head will be normalised as CT" in capsys.readouterr().out


def test_channels_are_chosen(raw: Path) -> None:
    mixed = dataclasses.replace(POOL, sources=("5", "6"))
    with pytest.raises(ValueError, match=r"Dataset005_Brain gives 2 channels, Dataset006_Head 1.*5=CHANNELS"):
        pool(dataclasses.replace(mixed, channels_from=("6",)), raw)
    folder = pool(dataclasses.replace(mixed, channels_from=("6", "5=1")), raw)
    assert cases_of(folder)["Dataset005_p0"]["images"] == ["../Dataset005_Brain/imagesTr/p0_0001.nii.gz"]
    for said, message in {
        ("9",): "--channels-from 9 is not one of the datasets",
        ("6", "5=2"): "Dataset005_Brain has no channel 2: it has 2",
        ("6", "5"): "write ID=CHANNELS",
    }.items():
        with pytest.raises(ValueError, match=message):
            pool(dataclasses.replace(mixed, channels_from=said, overwrite=True), raw)


def test_held_out_cases_never_get_in(raw: Path, tmp_path: Path) -> None:
    text = tmp_path / "test_cases.txt"
    text.write_text("# of the benchmark\np1_0000.nrrd\n\nDataset060/s0  # wrong way to say it\n")
    with pytest.raises(ValueError, match="1 cases to hold out are in none of the datasets: Dataset060/s0"):
        pool(dataclasses.replace(POOL, holdout=(str(text),)), raw)
    text.write_text("p1_0000.nrrd\n60/s0\n")
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["s0"], "validation": ["s2"]}))
    with pytest.raises(ValueError, match="holds several lists, name one: .*:KEY with train, validation"):
        pool(dataclasses.replace(POOL, holdout=(str(splits),)), raw)
    folder = pool(dataclasses.replace(POOL, holdout=(str(text), f"{splits}:validation")), raw)
    assert list(cases_of(folder)) == ["Dataset004_p0", "Dataset060_s1"]
    said = json.loads((folder / "dataset.json").read_text())["hyspark_nnunet"]["held_out"]
    assert said == ["Dataset004_p1", "Dataset060_s0", "Dataset060_s2"]


def test_a_name_in_two_sets_is_held_out_of_both(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("p0")
    asked = dataclasses.replace(POOL, sources=("5", "6"), channels_from=("6", "5=0"), holdout=(f"{tmp_path}/list.txt",))
    assert list(cases_of(pool(asked, raw))) == ["Dataset005_p1", "Dataset006_p1"]


def test_lists_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--holdout: no file"):
        read_case_list(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="is not a list of case names"):
        read_case_list(str(tmp_path / "empty.txt"))


def test_refusals(raw: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dataset 9 in .*Dataset004_Organs, Dataset005_Brain"):
        pool(dataclasses.replace(POOL, sources=("9",)), raw)
    with pytest.raises(ValueError, match="Dataset060_Scans more than once"):
        pool(dataclasses.replace(POOL, sources=("60", "60")), raw)
    with pytest.raises(ValueError, match="number 004 is used by"):
        pool(dataclasses.replace(POOL, dataset_id=4), raw)
    pool(POOL, raw)
    with pytest.raises(ValueError, match="Dataset070_Pool exists and is not overwritten"):
        pool(POOL, raw)
    with pytest.raises(ValueError, match="the pool itself"):
        pool(dataclasses.replace(POOL, sources=("60", "70"), overwrite=True), raw)


def test_an_incomplete_case_is_named(raw: Path) -> None:
    (raw / "Dataset005_Brain/imagesTr/p1_0001.nii.gz").unlink()
    asked = dataclasses.replace(POOL, sources=("5",))
    with pytest.raises(ValueError, match=r"Dataset005_p1: 1 files for 2 channels"):
        pool(asked, raw)
    assert list(cases_of(pool(dataclasses.replace(asked, skip_bad=True), raw))) == ["Dataset005_p0"]


def test_channels_in_files_of_four_axes(raw: Path) -> None:
    folder = raw / "Dataset007_Echoes"
    for i in range(2):
        write(sitk.JoinSeries([mr(i), mr(i + 5)]), folder / f"imagesTr/p{i}_0000.nii.gz")
        write(sitk.Cast(mr(i) > 100, sitk.sitkUInt8), folder / f"labelsTr/p{i}.nii.gz")
    described = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described | {"numTraining": 2}))
    assert check(folder, 1) == 0
    pooled = pool(dataclasses.replace(POOL, sources=("7", "5")), raw)
    assert len(cases_of(pooled)) == 4 and check(pooled, 1) == 0
    assert set(array_of(pooled / cases_of(pooled)["Dataset007_p0"]["label"]).ravel()) == {0, 1}
    with pytest.raises(ValueError, match=r"Dataset007_p0: its 2 channels are in 1 files with four axes"):
        pool(dataclasses.replace(POOL, sources=("7", "6"), channels_from=("6", "7=1"), overwrite=True), raw)
