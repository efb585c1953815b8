"""Subjects are noted, kept by a pool, and stay together in folds."""

import json
from pathlib import Path

import pytest

from hyspark_nnunet.datasets.check import check
from hyspark_nnunet.datasets.dataset_json import read_dataset
from hyspark_nnunet.datasets.pool import PoolOptions, pool
from hyspark_nnunet.datasets.prepare import PrepareOptions, prepare
from hyspark_nnunet.datasets.subjects import divided_subjects, recorded_subjects, write_splits
from tests.datasets.scans import ct, write


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for i, name in enumerate(("a/p1_x", "a/p1_y", "b/p2_x", "b/p1_z")):
        write(ct(i), tmp_path / "scans" / f"{name}.nii.gz")
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def prepared(raw: Path, group_by: str) -> Path:
    return prepare(PrepareOptions(str(raw.parent / "scans"), 60, "Scans", group_by=group_by, overwrite=True), raw)


@pytest.mark.parametrize(
    ("pattern", "subjects"), [("1", ["a", "a", "b", "b"]), (r"(p\d)_", ["p1", "p1", "p1", "p2"]), (r"[xyz]$", "xyzx")]
)
def test_subjects_by_path_part_or_expression(raw: Path, pattern: str, subjects: list[str]) -> None:
    found = recorded_subjects(read_dataset(prepared(raw, pattern)).content)
    assert [found[case] for case in sorted(found)] == list(subjects) and len(found) == 4


@pytest.mark.parametrize(
    ("pattern", "message"), [("3", "finds no subject in 4 paths, such as a/p1_x"), ("(", "neither")]
)
def test_cases_without_subject_are_refused(raw: Path, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(raw, pattern)


def test_a_pool_keeps_subjects_and_check_warns_of_folds(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = prepared(raw, r"p\d")
    pooled = read_dataset(pool(PoolOptions(("60",), 70, "Pool"), raw))
    found = recorded_subjects(pooled.content)
    assert set(found) == set(pooled.cases) and set(found.values()) == {"Dataset060_p1", "Dataset060_p2"}
    first, *others = sorted(pooled.cases)
    splits = raw.parent / "preprocessed" / pooled.name / "splits_final.json"
    splits.parent.mkdir(parents=True)
    splits.write_text(json.dumps([{"train": others, "val": [first]}]))
    assert check(pooled.folder, 1) == 0
    assert "divides 1 subjects between training and validation, such as Dataset060_p1" in capsys.readouterr().out
    check(target, 1)
    assert "WARNING" not in capsys.readouterr().out


def test_folds_keep_subjects_together(tmp_path: Path) -> None:
    cases = [f"case{i:02d}" for i in range(40)]
    subjects = {case: f"subject{int(case[4:]) % 11}" for case in cases[:30]}
    written = tmp_path / "splits_final.json"
    write_splits(cases, subjects, 5, written)
    splits = json.loads(written.read_text())
    assert sorted(case for fold in splits for case in fold["val"]) == cases
    assert all(sorted(fold["train"] + fold["val"]) == cases for fold in splits)
    assert divided_subjects(splits, subjects) == []
    assert all(7 <= len(fold["val"]) <= 9 for fold in splits)
    with pytest.raises(ValueError, match="2 subjects are too few for 5 folds"):
        write_splits(cases[:20], {case: case[:5] for case in cases[:20]}, 5, written)
