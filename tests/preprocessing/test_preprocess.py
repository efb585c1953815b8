"""hyspark_nnunet preprocess writes what nnU-Net's command writes, resumes, and never mixes settings."""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK as sitk

from hyspark_nnunet.preprocessing import disk_space
from hyspark_nnunet.preprocessing.preprocess import PreprocessOptions, preprocess
from hyspark_nnunet.preprocessing.records import RECORDS
from tests.nnunet_project import Project
from tests.preprocessing.conftest import DATA, N_CASES, NAME, damage, edit_plans, files_of


def run(project: Project, plans: str = "nnUNetPlans", **options: object) -> int:
    raw, preprocessed = project.raw / NAME, project.preprocessed / NAME
    options = {"show_progress": False, **options}
    return preprocess(raw, preprocessed, plans, "3d_fullres", PreprocessOptions(**options))  # type: ignore[arg-type]


def times(project: Project) -> dict[str, int]:
    folder = project.preprocessed / NAME / DATA
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.*") if file.is_file()}


def rewritten(before: Mapping[str, int], after: Mapping[str, int]) -> set[str]:
    return {name.split(".")[0].removesuffix("_seg") for name in after if before.get(name) != after[name]}


def test_files_are_those_of_nnunet_and_finished_cases_are_kept(
    project: Project, by_nnunet: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    # as after nnUNetv2_move_plans_between_datasets
    (project.preprocessed / NAME / "dataset.json").unlink()
    assert run(project) == 0
    assert files_of(project) == files_of(by_nnunet)
    printed = capsys.readouterr().out
    assert f"Disk space for {N_CASES} cases: at most" in printed
    assert f"{N_CASES} cases, {N_CASES} preprocessed" in printed
    before, folder = times(project), project.preprocessed / NAME / DATA
    damage(folder / "ball_3.b2nd")
    (folder / "ball_4.pkl").unlink()
    for file in (project.raw / NAME / "labelsTr").glob("ball_5.*"):
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    shutil.rmtree(project.preprocessed / NAME / "gt_segmentations")
    assert run(project) == 0
    assert rewritten(before, times(project)) == {"ball_3", "ball_4", "ball_5"}
    assert files_of(project) == files_of(by_nnunet)
    assert f"about 0.0 GB, by the {N_CASES} cases" in capsys.readouterr().out
    # other patches, the same cases
    before = times(project)
    edit_plans(project, "Other", patch_size=[8, 8, 8])
    assert run(project, "Other") == 0
    assert times(project) == before
    assert run(project, overwrite=True) == 0
    assert len(rewritten(before, times(project))) == N_CASES


def test_cases_of_other_settings_are_refused_or_replaced(
    project: Project, by_nnunet: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run(project)
    plans = json.loads((project.preprocessed / NAME / "nnUNetPlans.json").read_text())
    spacing = plans["configurations"]["3d_fullres"]["spacing"]
    edit_plans(project, spacing=[1.5, *spacing[1:]])
    before = times(project)
    with pytest.raises(
        ValueError, match=rf"holds {N_CASES} cases .* these changed: spacing \(\[.* now\)\. With --over"
    ):
        run(project)
    assert times(project) == before
    # parts may start over at different times: none keeps a case of the old plans
    assert run(project, part=(1, 2), overwrite=True) == 0
    assert len({name.split(".")[0].removesuffix("_seg") for name in times(project)}) == N_CASES // 2
    assert run(project, part=(2, 2)) == 0
    assert f"All parts: {N_CASES} of {N_CASES} cases are done" in capsys.readouterr().out
    edit_plans(project, spacing=spacing)
    assert run(project, replace_stale=True) == 0
    assert files_of(project) == files_of(by_nnunet)


def test_cases_without_record_and_foreign_cases_are_refused(project: Project, by_nnunet: Project) -> None:
    folder = project.preprocessed / NAME / DATA
    shutil.copytree(by_nnunet.preprocessed / NAME / DATA, folder)
    with pytest.raises(ValueError, match=f"{N_CASES} have no record, as after nnUNetv2_preprocess, ball_"):
        run(project)
    run(project, overwrite=True)
    shutil.copy(folder / "ball_1.b2nd", folder / "other.b2nd")
    with pytest.raises(ValueError, match="1 are not in the dataset, other for one"):
        run(project)
    run(project, replace_stale=True)
    assert files_of(project) == files_of(by_nnunet)


def test_a_bad_case_is_named_and_does_not_end_the_run(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = (project.raw / NAME / name for name in ("imagesTr", "labelsTr"))
    (images / "ball_2_0000.nii.gz").write_bytes(b"no image")
    (labels / "ball_3.nii.gz").unlink()
    sitk.WriteImage(sitk.ReadImage(str(labels / "ball_4.nii.gz"))[:, :, 1:], str(labels / "ball_4.nii.gz"))
    assert run(project) == 1
    table = capsys.readouterr().out.split("3 failed\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["case", "ball_2", "ball_3", "ball_4"]
    assert "no label file in labelsTr" in table[2] and "Shape mismatch" in table[3]
    assert len(times(project)) == 3 * (N_CASES - 3)
    assert not list((project.preprocessed / NAME / DATA / RECORDS / "writing").iterdir())
    assert run(project, skip_bad=True) == 0
    assert f"{N_CASES - 3} already done, 3 failed" in capsys.readouterr().out


def test_too_little_disk_space_is_refused_before_or_ends_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10_000
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="too little: make room in"):
        run(project)
    free = 900_000
    (project.raw / NAME / "imagesTr" / "ball_2_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(OSError, match="disk full: 1 MB are free"):
        run(project)


def test_records_survive_a_torn_line(project: Project) -> None:
    run(project)
    log = next((project.preprocessed / NAME / DATA / RECORDS).glob("*.jsonl"))
    log.write_text(log.read_text()[:-20])
    before = times(project)
    last = json.loads(log.read_text().splitlines()[-2])[0]
    # the case of the torn line has files, but no record
    run(project, replace_stale=True)
    again = rewritten(before, times(project))
    assert len(again) == 1 and last not in again
    before = times(project)
    run(project)
    assert times(project) == before


def test_properties_are_readable(project: Project) -> None:
    run(project, part=(1, N_CASES))
    (file,) = (project.preprocessed / NAME / DATA).glob("*.pkl")
    assert "class_locations" in pickle.loads(Path(file).read_bytes())


@pytest.mark.parametrize(
    ("plans", "message"), [("none", "no plans none in"), ("nnUNetPlans", "has no configuration 3d_lowres")]
)
def test_what_is_not_planned_is_refused(project: Project, plans: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        preprocess(project.raw / NAME, project.preprocessed / NAME, plans, "3d_lowres", PreprocessOptions())
