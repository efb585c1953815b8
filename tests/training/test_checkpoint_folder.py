"""A folder of checkpoints alone, without a trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hyspark_nnunet.checkpoints.storage import check_whole, read_checkpoint
from hyspark_nnunet.training import checkpoint_folder
from hyspark_nnunet.training.checkpoint_folder import BEST, FINAL, LATEST, PREVIOUS, CheckpointFolder


class Training:
    """A folder with what its training logs, and the description files it writes."""

    def __init__(self, path: Path, resume: bool = False, plans: str = "plans") -> None:
        self.lines: list[str] = []
        self.path, self.plans = path, plans
        path.mkdir(exist_ok=True)
        self.folder = CheckpointFolder(path, resume, self.write_plans, self.lines.append)

    def write_plans(self) -> None:
        (self.path / "plans.json").write_text(self.plans)

    def write(self, name: str, epoch: int, iterations: int | None = None) -> Path:
        inside = None if iterations is None else {"iterations": iterations, "ranks": []}
        checkpoint = {"network_weights": {"w": torch.rand(50)}, "current_epoch": epoch, "inside_epoch": inside}
        self.folder.write(checkpoint, self.path / name)
        return self.path / name


def resumed(path: Path, requested: str = FINAL) -> tuple[Path, list[str]]:
    """The file that ``--c`` takes when nnU-Net requests another, and the log."""
    training = Training(path, resume=True)
    return training.folder.choose(path / requested), training.lines


def test_the_checkpoint_with_the_most_steps_is_resumed(tmp_path: Path) -> None:
    """Not the one that nnU-Net names: the final one of a training that was prolonged is older than its latest."""
    training = Training(tmp_path)
    training.write(FINAL, 10)
    training.write(BEST, 12)
    training.write(PREVIOUS, 14)
    latest = training.write(LATEST, 14, iterations=3)
    assert resumed(tmp_path) == (latest, [f"Continuing from {latest}"])


@pytest.mark.parametrize("fault", ["truncated", "empty", "one byte", "another file"])
def test_a_damaged_file_is_skipped(tmp_path: Path, fault: str) -> None:
    training = Training(tmp_path)
    previous, latest = training.write(PREVIOUS, 4), training.write(LATEST, 5)
    best = training.write(BEST, 2)
    content = latest.read_bytes()
    if fault == "one byte":  # of the weights: torch reads it without complaint
        weights = read_checkpoint(latest)["network_weights"]["w"].numpy().tobytes()
        at = content.index(weights)
        content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    elif fault == "another file":
        torch.save([1, 2], latest)
        content = latest.read_bytes()
    latest.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(fault, content))
    (tmp_path / f".{LATEST}.{1:016x}.tmp").write_bytes(b"half")
    path, [warning, _] = resumed(tmp_path)
    assert path == previous and str(latest) in warning and "This file is skipped" in warning
    assert not list(tmp_path.glob(".*.tmp"))
    previous.write_bytes(b"nothing")
    assert resumed(tmp_path)[0] == best


def test_a_file_that_cannot_be_opened_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be intact, and the next save would replace it."""
    training = Training(tmp_path)
    training.write(PREVIOUS, 4)
    latest = training.write(LATEST, 5)

    def read(path: Path, **options: Any) -> dict[str, Any]:
        if path == latest:
            raise PermissionError(13, "Permission denied", str(path))
        return read_checkpoint(path, **options)

    monkeypatch.setattr(checkpoint_folder, "read_checkpoint", read)
    with pytest.raises(ValueError, match=f"{latest} cannot be read .Permission denied.: make it readable, or move"):
        resumed(tmp_path)


def test_no_intact_checkpoint(tmp_path: Path) -> None:
    path = Training(tmp_path).write(LATEST, 1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"no intact checkpoint to continue from:\n.*{LATEST}"):
        resumed(tmp_path)


def test_only_the_first_load_of_a_resumed_training_chooses(tmp_path: Path) -> None:
    """``--c --val_best`` validates the best checkpoint; so it does if there was nothing to resume from."""
    training = Training(tmp_path)
    best, final = training.write(BEST, 1), training.write(FINAL, 2)
    again = Training(tmp_path, resume=True).folder
    assert again.resumes and again.choose(best) == final
    assert not again.resumes and again.choose(best) == best
    started = Training(tmp_path, resume=True).folder
    started.stop_resuming()
    assert started.choose(best) == best
    elsewhere = tmp_path / "elsewhere" / FINAL
    assert Training(tmp_path, resume=True).folder.choose(elsewhere) == elsewhere


def test_the_last_two_are_kept_until_the_end(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for epoch in (1, 2, 3):
        check_whole(training.write(LATEST, epoch))
        if epoch > 1:
            assert read_checkpoint(tmp_path / PREVIOUS)["current_epoch"] == epoch - 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [LATEST, PREVIOUS]
    training.write(FINAL, 4)
    training.folder.remove_intermediate()
    assert [file.name for file in tmp_path.iterdir()] == [FINAL]


def test_a_latest_checkpoint_that_was_not_loaded_does_not_replace_the_previous_one(tmp_path: Path) -> None:
    """Resumed from the previous one, because the latest was damaged."""
    training = Training(tmp_path)
    training.write(LATEST, 1)
    training.write(LATEST, 2).write_bytes(b"damaged")
    again = Training(tmp_path, resume=True)
    assert again.folder.choose(tmp_path / LATEST).name == PREVIOUS
    again.folder.adopt()
    again.write(LATEST, 3)
    assert read_checkpoint(tmp_path / PREVIOUS)["current_epoch"] == 1


def test_earlier_checkpoints_are_set_aside_with_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then, plans.json describes them; a write that fails is tried again."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    earlier = Training(tmp_path, plans="earlier")
    earlier.folder.write_description()
    path, plans = earlier.write(FINAL, 3), tmp_path / "plans.json"
    training = Training(tmp_path, plans="new")
    training.folder.write_description()
    with monkeypatch.context() as full:
        full.setattr(Path, "mkdir", no_space)
        with pytest.raises(OSError, match=f"{LATEST} cannot be written .No space left on device; .* MB free"):
            training.write(LATEST, 1)
    assert plans.read_text() == "earlier" and path.exists() and not training.folder.is_ours
    training.write(LATEST, 1)
    training.write(LATEST, 2)
    assert plans.read_text() == "new" and not path.exists() and training.folder.is_ours
    [aside] = tmp_path.glob("earlier_*")
    assert [file.name for file in aside.iterdir()] == [FINAL] and str(aside) in training.lines[0]


def test_a_folder_that_was_removed_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "fold_0"
    training = Training(path)
    training.folder.restore()
    assert training.lines == []
    for write in (training.folder.restore, lambda: training.write(LATEST, 1)):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        write()
        assert "was gone and has been created again" in training.lines.pop() and (path / "plans.json").exists()
