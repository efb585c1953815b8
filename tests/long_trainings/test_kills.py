"""SIGKILL at random moments, every second one while a checkpoint is written: --c goes on from a whole checkpoint.

KILLS says how many; "make kills" does 40.
"""

import os
import random
import re
import signal
import time
from pathlib import Path

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from tests.long_trainings.conftest import Commands, Run

TRAINER = "RecordingPretrainTrainer"
EPOCHS = 400
SAVE_EVERY = 2


def epochs_started(printed: str) -> list[int]:
    return [int(number) for number in re.findall(r"Epoch (\d+) *\n", printed)]


def wait_for(condition, process: int, seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


def kill(run: Run, while_writing: bool, folder: Path, rng: random.Random) -> bool:
    """Kills the training after a few epochs; returns whether a checkpoint was being written."""
    wait_for(lambda: len(epochs_started(run.printed)) >= 2, run.process)
    time.sleep(rng.uniform(0, 1.5))
    if while_writing:
        wait_for(lambda: any(folder.glob(".checkpoint_*.tmp")), run.process)
        time.sleep(rng.uniform(0, 0.03))
    os.kill(run.process, signal.SIGKILL)
    # what the killed process left: a file half written, whose name nothing takes for a checkpoint
    return any(folder.glob(".checkpoint_*.tmp"))


def test_kills(commands: Commands, tmp_path: Path) -> None:
    rng = random.Random(5)
    settings = {
        "HYSPARK_NUM_EPOCHS": str(EPOCHS),
        "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "1",
        "HYSPARK_SAVE_EVERY": str(SAVE_EVERY),
    }
    expected, while_writing, lost = 0, 0, []
    for number in range(int(os.environ.get("KILLS", "4"))):
        run = commands.start(TRAINER, tmp_path, *(["--c"] if number else []), **settings)
        folder = run.folder(TRAINER)
        while_writing += kill(run, number % 2 == 1, folder, rng)
        assert commands.wait(run).returncode == -signal.SIGKILL, run.printed[-5000:]
        started = epochs_started(run.printed)
        if number:
            assert "Continuing from " in run.printed, run.printed[-5000:]
            # epochs that had ended before the kill and are done again
            lost.append(expected - started[0])
            assert lost[-1] < SAVE_EVERY, (expected, started)
        expected = started[-1]
        # whatever a checkpoint's name says, the file is intact
        for file in folder.glob("checkpoint_*.pth"):
            assert read_checkpoint(file)["current_epoch"] <= expected + 1
    print(f"\n{number + 1} kills, {while_writing} of them with a checkpoint half written; epochs lost: {lost}")
    assert while_writing >= 1 and max(lost) <= SAVE_EVERY
    final = {**settings, "HYSPARK_NUM_EPOCHS": str(expected + 2)}
    ended = commands.train(TRAINER, tmp_path, "--c", **final)
    assert read_checkpoint(ended.folder(TRAINER) / "checkpoint_final.pth")["current_epoch"] == expected + 2
    assert not list(ended.folder(TRAINER).glob(".*.tmp"))
