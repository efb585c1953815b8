"""nnU-Net's real commands on synthetic data: pre-train, fine-tune, predict, and what surrounds them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.demo.synthetic_data import write_dataset
from hyspark_nnunet.training.case_reconstruction import cases_to_reconstruct
from tests.nnunet_project import FINETUNER, PRETRAINER, Project

UNLABELLED, LABELLED = "Dataset060_SyntheticUnlabelled", "Dataset006_SyntheticOrgans"
SHAPE = (32, 32, 32)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Both datasets planned and preprocessed, and a pre-training of two epochs."""
    project = Project(tmp_path_factory.mktemp("commands"))
    project.make_folders()
    write_dataset(project.raw, 60, "SyntheticUnlabelled", n_train=5, labelled=False, shape=SHAPE)
    write_dataset(project.raw, 6, "SyntheticOrgans", n_train=5, n_test=2, seed=1, shape=SHAPE)
    project.plan_and_preprocess(60, 6)
    return project


@pytest.fixture(scope="module")
def pretrained(project: Project) -> Path:
    """The folder of a finished pre-training."""
    project.train(60, "all", PRETRAINER, nnUNet_n_proc_DA="1")
    return project.fold_folder(UNLABELLED, PRETRAINER, "all")


@pytest.fixture(scope="module")
def finetuned(project: Project, pretrained: Path) -> tuple[Path, str]:
    """The folder of a finished fine-tuning, and what it printed."""
    weights = str(pretrained / "checkpoint_final.pth")
    # with nnU-Net's loader processes, which the other trainings of the tests do without
    printed = project.train(6, "0", FINETUNER, "-pretrained_weights", weights, nnUNet_n_proc_DA="1")
    return project.fold_folder(LABELLED, FINETUNER, "0"), printed


@pytest.fixture(scope="module")
def prediction(project: Project, finetuned: tuple[Path, str]) -> Path:
    """Predictions of the test cases."""
    return predict(project, project.root / "predicted")


def predict(project: Project, to: Path, **variables: str) -> Path:
    images = str(project.raw / LABELLED / "imagesTs")
    arguments = ("-d", "6", "-c", "3d_fullres", "-f", "0", "-tr", FINETUNER, "-i", images, "-o", str(to))
    project.run("nnUNetv2_predict", *arguments, "-device", "cpu", "-npp", "1", "-nps", "1", **variables)
    return to


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def network_state(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["network_weights"]


def test_pretraining_leaves_what_it_promises(pretrained: Path) -> None:
    found = {str(file.relative_to(pretrained)) for file in pretrained.rglob("*") if file.is_file()}
    promised = {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "recipe.json", "validation/summary.json"}
    promised |= {"reconstructions/epoch_0001.png", "reconstructions/epoch_0002.png"}
    assert promised <= found
    assert "checkpoint_latest.pth" not in found and not any(name.endswith(".tmp") for name in found)
    assert imread(pretrained / "reconstructions/epoch_0002.png").std() > 0.05
    assert len(list((pretrained / "validation").glob("*.png"))) == 2


def test_pretraining_writes_the_error_of_every_case(pretrained: Path, project: Project) -> None:
    summary = json.loads((pretrained / "validation/summary.json").read_text())
    cases = sorted(file.name.removesuffix("_0000.nii.gz") for file in (project.raw / UNLABELLED / "imagesTr").iterdir())
    assert [entry["case"] for entry in summary["metric_per_case"]] == cases
    losses = [entry["metrics"]["reconstruction_loss"] for entry in summary["metric_per_case"]]
    assert summary["mean"]["reconstruction_loss"] == pytest.approx(np.mean(losses))
    assert all(0.2 < loss < 2 for loss in losses)


def test_the_recipe_in_force_is_saved_and_printed(pretrained: Path) -> None:
    saved = json.loads((pretrained / "recipe.json").read_text())
    checkpoint = read_checkpoint(pretrained / "checkpoint_final.pth")
    assert saved["recipe"] == checkpoint["recipe"]
    assert checkpoint["recipe"]["num_epochs"] == 2 and checkpoint["recipe"]["preset"] == "S"
    assert saved["sources"]["num_epochs"] == "environment variable HYSPARK_NUM_EPOCHS"
    log = next(pretrained.glob("training_log_*.txt")).read_text()
    assert "environment variable HYSPARK_NUM_EPOCHS" in log and "mask_ratio" in log


def test_the_log_says_what_the_loss_is_to_be_compared_with(pretrained: Path) -> None:
    log = next(pretrained.glob("training_log_*.txt")).read_text()
    (found,) = re.findall(r"predicting the mean of every hidden block gives a loss of ([\d.]+) *$", log, re.MULTILINE)
    assert 0.5 < float(found) <= 1


def test_the_checkpoint_holds_tensors_numbers_and_strings_only(pretrained: Path, project: Project) -> None:
    def leaves(value: object) -> list:
        if isinstance(value, dict):
            return [leaf for item in value.items() for part in item for leaf in leaves(part)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]

    found = leaves(read_checkpoint(pretrained / "checkpoint_final.pth"))
    assert {type(leaf) for leaf in found} <= {torch.Tensor, int, float, str, bool, type(None)}
    assert [leaf for leaf in found if isinstance(leaf, str) and str(project.root) in leaf] == []


def test_the_best_checkpoint_is_that_of_the_lowest_loss(pretrained: Path) -> None:
    final = read_checkpoint(pretrained / "checkpoint_final.pth")
    losses = final["logging"]["val_losses"]
    best = read_checkpoint(pretrained / "checkpoint_best.pth")
    assert len(losses) == 2 and best["_best_ema"] == pytest.approx(min(losses))
    assert best["current_epoch"] == int(np.argmin(losses)) + 1


def test_validation_alone_of_some_cases_gives_the_same_numbers(pretrained: Path, project: Project) -> None:
    summary = pretrained / "validation/summary.json"
    before = {entry["case"]: entry for entry in json.loads(summary.read_text())["metric_per_case"]}
    summary.unlink()
    printed = project.train(60, "all", PRETRAINER, "--val", HYSPARK_FINAL_VALIDATION_CASES="3")
    assert "Final validation of 3 of 5 validation cases" in printed
    after = json.loads(summary.read_text())["metric_per_case"]
    assert [entry["case"] for entry in after] == cases_to_reconstruct(list(before), 3)
    for again in after:
        first = before[again["case"]]
        assert again["n_patches"] == first["n_patches"]
        assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-4)


def test_pretraining_continues(pretrained: Path, project: Project, tmp_path: Path) -> None:
    copied = Project(tmp_path)
    copied.results.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(project.results / UNLABELLED, copied.results / UNLABELLED)
    before = read_checkpoint(pretrained / "checkpoint_final.pth")
    elsewhere = {"nnUNet_results": str(copied.results)}
    settings = {"HYSPARK_NUM_EPOCHS": "3", "HYSPARK_FINAL_VALIDATION_CASES": "0"}
    printed = project.train(60, "all", PRETRAINER, "--c", **settings, **elsewhere)
    folder = copied.fold_folder(UNLABELLED, PRETRAINER, "all")
    after = read_checkpoint(folder / "checkpoint_final.pth")
    assert "Epoch 2" in printed and "Epoch 1" not in printed and "random weights" not in printed
    assert json.loads((folder / "validation/summary.json").read_text())["metric_per_case"] == []
    assert before["current_epoch"] == 2 and after["current_epoch"] == 3
    assert after["logging"]["val_losses"][:2] == before["logging"]["val_losses"]
    assert not list(folder.glob("earlier_*"))
    # the checkpoint's preset is another: refused, nothing lost
    refused = project.train(60, "all", PRETRAINER, "--c", ok=False, HYSPARK_PRESET="B", **elsewhere)
    assert "trained with preset S" in refused and "HYSPARK_PRESET=S" in refused
    assert read_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 3


def test_training_anew_keeps_the_earlier_checkpoints(pretrained: Path, project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.results / UNLABELLED, tmp_path / UNLABELLED)
    printed = project.train(60, "all", PRETRAINER, HYSPARK_NUM_EPOCHS="1", nnUNet_results=str(tmp_path))
    kept = next(tmp_path.rglob("earlier_*"))
    assert "checkpoints of an earlier training" in printed and str(kept) in printed
    assert read_checkpoint(kept / "checkpoint_final.pth")["current_epoch"] == 2
    assert read_checkpoint(kept.parent / "checkpoint_final.pth")["current_epoch"] == 1


def test_finetuning_starts_from_the_pretrained_encoder(pretrained: Path, finetuned: tuple[Path, str]) -> None:
    folder, printed = finetuned
    assert "100.0% of the encoder's parameters come from the file." in printed
    assert "stem   " in printed and "unused" in printed and "no such part in this network" in printed
    report = json.loads((folder / "pretrained_weights_report.json").read_text())
    state = network_state(pretrained / "checkpoint_final.pth")
    loaded = {entry["name"] for entry in report["tensors"] if entry["fate"] == "loaded"}
    assert loaded == {name for name in state if name.startswith("encoder.")}
    # two epochs of two steps at a learning rate of 1e-4 leave it near where it started
    tuned = network_state(folder / "checkpoint_final.pth")
    assert all((tuned[name] - state[name]).abs().max() < 0.02 for name in loaded)
    assert not torch.equal(tuned["encoder.stem.weight"], state["encoder.stem.weight"])
    # pre-trained layers train at rates of their own
    groups = read_checkpoint(folder / "checkpoint_final.pth")["optimizer_state"]["param_groups"]
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates["stem: weights"] == pytest.approx(rates["decoder: weights"] / 128)
    assert json.loads((folder / "validation/summary.json").read_text())["metric_per_case"]


def test_finetuning_from_scratch_says_so_and_continues(project: Project, finetuned: tuple[Path, str]) -> None:
    printed = project.train(6, "1", FINETUNER)
    assert "No -pretrained_weights given: training from random weights." in printed
    folder = project.fold_folder(LABELLED, FINETUNER, "1")
    printed = project.train(6, "1", FINETUNER, "--c", HYSPARK_NUM_EPOCHS="3")
    assert "Epoch 2" in printed and "Epoch 1" not in printed
    assert read_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 3
    (folder / "validation/summary.json").unlink()
    project.train(6, "1", FINETUNER, "--val", HYSPARK_NUM_EPOCHS="3")
    assert (folder / "validation/summary.json").is_file()
    refused = project.train(6, "2", FINETUNER, ok=False, HYSPARK_PRESET="B")
    assert "holds folds trained with preset S" in refused and "HYSPARK_PRESET=S" in refused
    printed = project.run(
        "nnUNetv2_find_best_configuration",
        "6",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "1",
        "-tr",
        FINETUNER,
        "--disable_ensembling",
    )
    assert "Best" in printed
    assert (project.results / LABELLED / "inference_instructions.txt").is_file()


def test_prediction_and_evaluation(project: Project, prediction: Path) -> None:
    labels = project.raw / LABELLED / "labelsTs"
    for label in labels.glob("*.nii.gz"):
        assert voxels(prediction / label.name).shape == voxels(label).shape
    dataset, plans = (str(project.preprocessed / LABELLED / name) for name in ("dataset.json", "nnUNetPlans.json"))
    project.run("nnUNetv2_evaluate_folder", str(labels), str(prediction), "-djfile", dataset, "-pfile", plans)
    metrics = json.loads((prediction / "summary.json").read_text())
    assert len(metrics["metric_per_case"]) == 2


def test_prediction_takes_its_network_from_the_results(project: Project, prediction: Path, tmp_path: Path) -> None:
    """The preset of the environment is for training; a model predicts as it was trained."""
    again = predict(project, tmp_path / "again", HYSPARK_PRESET="L")
    for file in prediction.glob("*.nii.gz"):
        assert np.array_equal(voxels(file), voxels(again / file.name))


def test_a_converted_checkpoint_predicts_the_same(
    project: Project, finetuned: tuple[Path, str], prediction: Path, tmp_path: Path
) -> None:
    """A fine-tuned checkpoint to safetensors, and from there to a complete checkpoint in an empty results folder."""
    source, weights = finetuned[0] / "checkpoint_final.pth", tmp_path / "weights.safetensors"
    printed = project.run("hyspark_nnunet", "checkpoint", "inspect", str(source), "-d", "6")
    assert "background" in printed and "100.0% of the encoder's parameters" in printed and "Fits." in printed
    project.run("hyspark_nnunet", "checkpoint", "convert", str(source), str(weights), "--to", "safetensors")
    elsewhere = Project(tmp_path)
    folder = elsewhere.fold_folder(LABELLED, FINETUNER, "0")
    folder.mkdir(parents=True)
    arguments = ("--to", "nnunet", "-d", "6", "-f", "0")
    project.run("hyspark_nnunet", "checkpoint", "convert", str(weights), str(folder / source.name), *arguments)
    again = predict(project, tmp_path / "again", nnUNet_results=str(elsewhere.results))
    for file in prediction.glob("*.nii.gz"):
        assert np.array_equal(voxels(file), voxels(again / file.name))
    # and trains on
    project.train(6, "0", FINETUNER, "--c", HYSPARK_NUM_EPOCHS="1", nnUNet_results=str(elsewhere.results))
    assert read_checkpoint(folder / source.name)["current_epoch"] == 1


def test_prediction_with_the_pretraining_network_says_why_not(
    project: Project, pretrained: Path, tmp_path: Path
) -> None:
    images = str(project.raw / LABELLED / "imagesTs")
    arguments = ("-d", "60", "-c", "3d_fullres", "-f", "all", "-tr", PRETRAINER, "-i", images, "-o", str(tmp_path))
    printed = project.run("nnUNetv2_predict", *arguments, "-device", "cpu", ok=False)
    assert "reconstructs images and does not segment" in printed and FINETUNER in printed


@pytest.mark.parametrize("content", ["missing", "empty", "text", "foreign"])
def test_unusable_pretrained_weights(project: Project, tmp_path: Path, content: str) -> None:
    file = tmp_path / "weights.pth"
    if content == "empty":
        file.touch()
    elif content == "text":
        file.write_text("not a checkpoint")
    elif content == "foreign":
        torch.save({"network_weights": {"conv.weight": torch.zeros(3)}}, file)
    message = {
        "missing": f"no checkpoint file at {file}",
        "empty": f"{file} is empty (0 bytes)",
        "text": f"{file} is not a readable checkpoint",
        "foreign": f"{file} has no weights for this network's encoder: it holds conv.weight",
    }[content]
    results = tmp_path / "results"
    printed = project.train(6, "0", FINETUNER, "-pretrained_weights", str(file), ok=False, nnUNet_results=str(results))
    assert message in printed
    assert not list(results.rglob("checkpoint_*.pth"))
