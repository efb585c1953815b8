"""A training that is interrupted and continued equals the one that was not: step by step, to the bit."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from tests.long_trainings.conftest import SPARK, Commands, Run

PRETRAINER, FINETUNER = "RecordingPretrainTrainer", "RecordingFinetuneTrainer"


@pytest.fixture(scope="module", params=[PRETRAINER, FINETUNER])
def uninterrupted(request, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    return request.param, commands.train(request.param, tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def interrupted(uninterrupted, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Run:
    signal = {PRETRAINER: "SIGTERM", FINETUNER: "SIGUSR1"}[uninterrupted[0]]
    # in the second of the three steps of the second epoch
    return commands.train(uninterrupted[0], tmp_path_factory.mktemp("interrupted"), INCIDENT=f"{signal}@1.1")


def assert_equal_checkpoints(one: dict, other: dict) -> None:
    assert one["network_weights"].keys() == other["network_weights"].keys()
    for name, tensor in one["network_weights"].items():
        assert torch.equal(tensor, other["network_weights"][name]), name
    assert str(one["optimizer_state"]) == str(other["optimizer_state"])
    for index, state in one["optimizer_state"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, other["optimizer_state"]["state"][index][name]), (index, name)
    for name in ("train_losses", "val_losses", "lrs", "mean_fg_dice", "ema_fg_dice"):
        assert one["logging"][name] == other["logging"][name], name
    for name in ("_best_ema", "current_epoch", "seed", "schedule", "inside_epoch"):
        assert one[name] == other[name], name


def test_a_signal_ends_in_order_and_says_how_to_continue(uninterrupted, interrupted: Run) -> None:
    trainer, _ = uninterrupted
    folder = interrupted.folder(trainer)
    assert "received: stopping after this step" in interrupted.printed
    said = r"in epoch 1 after 2 of 3 steps\. To continue: HYSPARK_.* nnUNetv2_train 6 3d_fullres 0 -tr "
    assert re.search(said, interrupted.printed)
    assert interrupted.printed.rstrip().endswith("-device cpu --c")
    checkpoint = read_checkpoint(folder / "checkpoint_latest.pth")
    assert checkpoint["current_epoch"] == 1 and checkpoint["inside_epoch"]["iterations"] == 2
    assert len(checkpoint["logging"]["train_losses"]) == 1 == len(checkpoint["logging"]["lrs"])
    assert read_checkpoint(folder / "checkpoint_previous.pth")["current_epoch"] == 1
    assert not list(folder.glob(".*.tmp")) and not (folder / "checkpoint_final.pth").exists()


@pytest.mark.parametrize("latest", ["whole", "truncated"])
def test_continued_equals_uninterrupted(
    uninterrupted, interrupted: Run, commands: Commands, tmp_path: Path, latest: str
) -> None:
    """From inside an epoch, and, where that checkpoint is truncated, from the one before it."""
    trainer, whole = uninterrupted
    shutil.copytree(interrupted.results, tmp_path / "results")
    folder = Run(tmp_path / "results", Path(), Path(), 0).folder(trainer)
    if latest == "truncated":
        file = folder / "checkpoint_latest.pth"
        file.write_bytes(file.read_bytes()[:-5000])
    run = commands.train(trainer, tmp_path / "results", "--c")
    if latest == "truncated":
        assert (
            "checkpoint_latest.pth is not a readable checkpoint" in run.printed
            and "This file is skipped" in run.printed
        )
        assert "Continuing from " in run.printed and "checkpoint_previous.pth" in run.printed
        expected = interrupted.steps() + whole.steps()[3:]
    else:
        expected = whole.steps()
        assert "Continuing after 2 steps of this epoch" in run.printed
    assert json.dumps(run.steps()) == json.dumps(expected)
    assert [(s["epoch"], s["step"]) for s in whole.steps()] == [(e, s) for e in range(3) for s in (1, 2, 3)]
    final = [r.folder(trainer) / "checkpoint_final.pth" for r in (whole, run)]
    assert_equal_checkpoints(*map(read_checkpoint, final))
    assert not (run.folder(trainer) / "checkpoint_previous.pth").exists()


def test_sparks_training_continues_inside_an_epoch(commands: Commands, tmp_path: Path) -> None:
    trainer, short = "RecordingSparKPretrainTrainer", {"HYSPARK_NUM_EPOCHS": "1", **SPARK}
    whole = commands.train(trainer, tmp_path / "whole", **short)
    stopped = commands.train(trainer, tmp_path / "stopped", INCIDENT="SIGTERM@0.1", **short)
    assert "received: stopping after this step" in stopped.printed
    run = commands.train(trainer, tmp_path / "stopped", "--c", **short)
    assert "Continuing after 2 steps of this epoch" in run.printed
    assert json.dumps(run.steps()) == json.dumps(whole.steps())
    assert_equal_checkpoints(*(read_checkpoint(r.folder(trainer) / "checkpoint_final.pth") for r in (whole, run)))


def test_a_seed_repeats_a_training_and_another_does_not(uninterrupted, commands: Commands, tmp_path: Path) -> None:
    trainer, whole = uninterrupted
    short = {"HYSPARK_NUM_EPOCHS": "1", "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "1"}
    if trainer == PRETRAINER:  # the same code for both
        again = commands.train(
            trainer, tmp_path / "again", HYSPARK_NUM_ITERATIONS_PER_EPOCH="3", HYSPARK_NUM_EPOCHS="1"
        )
        assert [s["loss"] for s in again.steps()][:1] == [s["loss"] for s in whole.steps()][:1]
        assert [s["cases"] for s in again.steps()] == [s["cases"] for s in whole.steps()][:3]
    other = commands.train(trainer, tmp_path / "other", HYSPARK_SEED="8", **short)
    assert other.steps()[0]["loss"] != whole.steps()[0]["loss"]
