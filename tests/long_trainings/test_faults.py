"""What happens in a week: full disks, folders that vanish, damaged cases, losses that are not finite."""

import json
from pathlib import Path

import blosc2
import numpy as np
import pytest

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from tests.long_trainings.conftest import Commands, preprocessed_copy

PRETRAINER, FINETUNER = "RecordingPretrainTrainer", "RecordingFinetuneTrainer"
TWO_EPOCHS = {"HYSPARK_NUM_EPOCHS": "2", "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "4"}


def split_of(commands: Commands, configuration: Path) -> tuple[list[str], str]:
    """The cases of fold 0, and the one that is validated on."""
    file = commands.project.preprocessed / configuration.parent.name / "splits_final.json"
    fold = json.loads(file.read_text())[0]
    return fold["train"], fold["val"][0]


def damage(file: Path) -> None:
    """Head and tail stay: nnU-Net opens the file, and stumbles over its voxels."""
    content = file.read_bytes()
    file.write_bytes(content[:1000] + bytes(len(content) - 2000) + content[-1000:])


@pytest.fixture(scope="module", autouse=True)
def split(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> None:
    """nnU-Net makes the split in the first training."""
    folder = next(commands.project.preprocessed.glob("Dataset006*"))
    if not (folder / "splits_final.json").exists():
        commands.train(PRETRAINER, tmp_path_factory.mktemp("split"), HYSPARK_NUM_EPOCHS="1")


def write_nan(file: Path) -> None:
    voxels = np.asarray(blosc2.open(str(file))[:])
    file.unlink()
    blosc2.asarray(np.full_like(voxels, np.nan), urlpath=str(file), chunks=voxels.shape, blocks=voxels.shape)


def all_finite(state: dict) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_a_full_disk(commands: Commands, tmp_path: Path) -> None:
    """No file may pass 2 MB: logs and pictures fit, checkpoints do not. It trains on; only the end is an error."""
    run = commands.train(PRETRAINER, tmp_path, returncode=1, file_limit=2_000_000, **TWO_EPOCHS)
    assert len(run.steps()) == 8
    for name in ("checkpoint_best.pth", "checkpoint_latest.pth"):
        assert f"WARNING: {name} not written: {run.folder(PRETRAINER) / name} cannot be written (" in run.printed
    assert "The training goes on." in run.printed and "MB free in" in run.printed
    assert run.printed.rstrip().splitlines()[-1].startswith("OSError: ")
    assert "checkpoint_final.pth cannot be written" in run.printed.rstrip().splitlines()[-1]
    assert not list(run.folder(PRETRAINER).glob("checkpoint_*")) + list(run.folder(PRETRAINER).glob(".*.tmp"))


def test_a_results_folder_that_vanishes(commands: Commands, tmp_path: Path) -> None:
    run = commands.train(FINETUNER, tmp_path, INCIDENT="remove@0.2", VALIDATE="1", **TWO_EPOCHS)
    folder = run.folder(FINETUNER)
    assert f"the results folder {folder} was gone and has been created again" in run.printed
    log = next(folder.glob("training_log_*")).read_text()
    assert "was gone" in log and "Epoch 1" in log
    names = {file.name for file in folder.parent.glob("*.json")}
    assert names == {"plans.json", "dataset.json", "dataset_fingerprint.json"}
    assert all_finite(read_checkpoint(folder / "checkpoint_final.pth")["network_weights"])
    assert (folder / "recipe.json").is_file() and (folder / "validation" / "summary.json").is_file()


@pytest.mark.parametrize("trainer", [PRETRAINER, FINETUNER])
def test_a_damaged_case_and_a_case_of_nan(commands: Commands, tmp_path: Path, trainer: str) -> None:
    """The damaged one is never drawn, with one warning; a step with the other is skipped, and nothing of it stays."""
    configuration = preprocessed_copy(commands, tmp_path / "preprocessed")
    cases, validated = split_of(commands, configuration)
    damage(configuration / f"{cases[0]}.b2nd")
    write_nan(configuration / f"{cases[1]}.b2nd")
    more = {"nnUNet_preprocessed": str(tmp_path / "preprocessed"), "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "6"}
    run = commands.train(trainer, tmp_path / "results", HYSPARK_NUM_EPOCHS="2", **more)
    assert run.printed.count(f"WARNING: case {cases[0]}: its image in {configuration} cannot be read") == 1
    assert "Other cases are drawn instead." in run.printed
    steps = run.steps()
    assert len(steps) == 12 and not any(cases[0] in step["cases"] for step in steps)
    skipped = [cases[1] in step["cases"] for step in steps]
    assert any(skipped) and not all(skipped)
    assert [bool(np.isnan(step["loss"])) for step in steps] == skipped
    assert run.printed.count("The step is skipped.") == sum(skipped)
    assert f"{cases[1]}" in next(line for line in run.printed.splitlines() if "is not finite; cases of the" in line)
    final = read_checkpoint(run.folder(trainer) / "checkpoint_final.pth")
    assert all_finite(final["network_weights"]) and np.isfinite(final["logging"]["train_losses"]).all()

    more["VALIDATE"], file = "1", configuration / f"{validated}.b2nd"
    if trainer == PRETRAINER:
        whole = file.read_bytes()
        write_nan(file)
        run = commands.train(trainer, tmp_path / "results", "--val", **more)
        assert f"WARNING: case {validated} has voxels that are not finite. It is left out." in run.printed
        file.write_bytes(whole)
    damage(file)
    fault = f"case {validated}: its image in {configuration} cannot be read"
    if trainer == PRETRAINER:
        run = commands.train(trainer, tmp_path / "results", "--val", **more)
        assert f"WARNING: {fault}" in run.printed and "It is left out." in run.printed
    else:  # nnU-Net's own validation stops
        run = commands.train(trainer, tmp_path / "results", "--val", returncode=1, **more)
        assert f"UnreadableCase: {fault}" in run.printed and "repeat with --val" in run.printed


def test_too_many_steps_that_are_not_finite(commands: Commands, tmp_path: Path) -> None:
    configuration = preprocessed_copy(commands, tmp_path / "preprocessed")
    cases, _ = split_of(commands, configuration)
    for case in cases:
        write_nan(configuration / f"{case}.b2nd")
    more = {"nnUNet_preprocessed": str(tmp_path / "preprocessed"), "HYSPARK_MAX_NONFINITE_STEPS": "2"}
    run = commands.train(PRETRAINER, tmp_path / "results", returncode=1, HYSPARK_NUM_ITERATIONS_PER_EPOCH="9", **more)
    last = run.printed.rstrip().splitlines()[-1]
    assert "NonFiniteLoss: loss or gradient of step 3 of epoch 0 is not finite; cases of the batch: " in last
    assert "in 3 consecutive steps, more than max_nonfinite_steps 2" in last
    assert any(case in last for case in cases)
    checkpoint = read_checkpoint(run.folder(PRETRAINER) / "checkpoint_latest.pth")
    assert all_finite(checkpoint["network_weights"]) and checkpoint["inside_epoch"]["iterations"] == 3
    # with the cases mended it goes on
    mended = commands.train(PRETRAINER, tmp_path / "results", "--c", HYSPARK_NUM_EPOCHS="1")
    assert "Continuing after 3 steps of this epoch" in mended.printed
    assert all_finite(read_checkpoint(mended.folder(PRETRAINER) / "checkpoint_final.pth")["network_weights"])
