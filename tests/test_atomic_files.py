from pathlib import Path

import pytest

from hyspark_nnunet.atomic_files import remove_half_written, replacing


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "numbers.txt"
    file.write_text("old")
    with pytest.raises(ValueError, match="in the middle"), replacing(file) as beside:
        beside.write_text("ne")
        raise ValueError("in the middle")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / f".{name}.{number:016x}.tmp" for number, name in enumerate(("checkpoint_latest.pth", "a.png"))]
    left.append(tmp_path / ".checkpoint_latest.pth.123.tmp")  # of earlier versions
    kept = [tmp_path / "progress.png", tmp_path / ".notes.tmp", tmp_path / "image.1.tmp"]
    for file in left + kept:
        file.write_text("")
    remove_half_written(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_processes_with_the_same_number_write_beside_each_other(tmp_path: Path) -> None:
    """In containers that share a disk, processes often have the same number."""
    file = tmp_path / "plans.json"
    with replacing(file) as first, replacing(file) as second:
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
