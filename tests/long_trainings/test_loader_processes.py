"""nnU-Net's loader processes when their training ends, in order or not."""

import os
import signal
import time
from pathlib import Path

import pytest

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from tests.long_trainings.conftest import Commands

TRAINER = "RecordingFinetuneTrainer"


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["killed", "signal to all"])
def test_they_end_with_the_training(commands: Commands, tmp_path: Path, how: str) -> None:
    """A queue may signal every process of a job: the training writes its checkpoint though its loaders are gone."""
    run = commands.start(TRAINER, tmp_path, nnUNet_n_proc_DA="1", HYSPARK_NUM_ITERATIONS_PER_EPOCH="100000")
    wait_until(lambda: Path(f"{run.record}.0").exists())
    loaders = children(run.process)
    assert len(loaders) >= 2
    if how == "killed":
        os.kill(run.process, signal.SIGKILL)
    else:
        for process in (run.process, *loaders):
            os.kill(process, signal.SIGTERM)
    commands.wait(run)
    wait_until(lambda: not any(map(running, loaders)), seconds=120)
    if how == "killed":
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == 0 and "To continue: HYSPARK_" in run.printed, run.printed[-5000:]
        checkpoint = read_checkpoint(run.folder(TRAINER) / "checkpoint_latest.pth")
        assert checkpoint["inside_epoch"]["iterations"] == run.steps()[-1]["step"]
