"""Which checkpoint a training goes on from, and how its random numbers do."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hyspark_nnunet.checkpoints.storage import check_whole, read_checkpoint, write_atomically
from hyspark_nnunet.training.continuing import keep_as_previous, newest_whole
from hyspark_nnunet.training.runtime.randomness import generator_states, restore_generators, seed_generators


def write(folder: Path, name: str, epoch: int, iterations: int | None = None) -> Path:
    inside = None if iterations is None else {"iterations": iterations, "ranks": []}
    path = folder / f"checkpoint_{name}.pth"
    write_atomically({"network_weights": {"w": torch.rand(50)}, "current_epoch": epoch, "inside_epoch": inside}, path)
    return path


def test_the_checkpoint_that_has_come_farthest(tmp_path: Path) -> None:
    """Not the one that nnU-Net names: the final one of a training that was prolonged is older than its latest."""
    write(tmp_path, "final", 10)
    write(tmp_path, "best", 12)
    write(tmp_path, "previous", 14)
    latest = write(tmp_path, "latest", 14, iterations=3)
    assert newest_whole(tmp_path) == (latest, [])


@pytest.mark.parametrize("fault", ["truncated", "empty", "one byte", "another file"])
def test_a_file_that_is_not_whole_is_passed_over(tmp_path: Path, fault: str) -> None:
    previous, latest = write(tmp_path, "previous", 4), write(tmp_path, "latest", 5)
    write(tmp_path, "best", 2)
    content = latest.read_bytes()
    if fault == "one byte":  # of the weights: torch reads it without a word
        weights = read_checkpoint(latest)["network_weights"]["w"].numpy().tobytes()
        at = content.index(weights)
        content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    elif fault == "another file":
        torch.save([1, 2], latest)
        content = latest.read_bytes()
    latest.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(fault, content))
    path, [text] = newest_whole(tmp_path)
    assert path == previous and str(latest) in text
    previous.write_bytes(b"nothing")
    assert newest_whole(tmp_path)[0].name == "checkpoint_best.pth"


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, "latest", 1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no checkpoint can be continued from:\n.*checkpoint_latest.pth"):
        newest_whole(tmp_path)


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        latest = tmp_path / "checkpoint_latest.pth"
        if latest.exists():
            keep_as_previous(latest)
            assert read_checkpoint(tmp_path / "checkpoint_previous.pth")["current_epoch"] == epoch - 1
        write(tmp_path, "latest", epoch)
        check_whole(latest)
    assert read_checkpoint(tmp_path / "checkpoint_previous.pth")["current_epoch"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint_latest.pth", "checkpoint_previous.pth"]


def draw(masks: torch.Generator) -> list[float]:
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), float(torch.rand(()))]
    return [*drawn, float(torch.rand((), generator=masks))]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    masks = torch.Generator()
    seed_generators(5, 2, 0, masks=masks)
    draw(masks)
    write_atomically(generator_states(masks), tmp_path / "states.pth")
    expected = [draw(masks) for _ in range(3)]
    seed_generators(6, 0, 0, masks=masks)
    restore_generators(read_checkpoint(tmp_path / "states.pth"), masks)
    assert [draw(masks) for _ in range(3)] == expected


def test_every_epoch_and_rank_has_its_own_numbers() -> None:
    masks = torch.Generator()
    drawn = []
    for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (1, 0, 1), (2**63 - 1, 9, 9)]:
        seed_generators(*where, masks=masks)
        drawn.append(draw(masks))
        seed_generators(*where, masks=masks)
        assert draw(masks) == drawn[-1]
    numbers = [number for numbers in drawn for number in numbers]
    assert len(set(numbers)) == len(numbers)
