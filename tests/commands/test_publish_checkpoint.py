"""``hyspark_nnunet checkpoint publish``, and what it wrote read back from a hub."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from huggingface_hub import constants
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import hyspark_nnunet
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.network_plan import by_configuration
from hyspark_nnunet.checkpoints.reference import to_reference
from hyspark_nnunet.checkpoints.state_dicts import stored_once
from hyspark_nnunet.checkpoints.storage import read_weights, write_atomically
from hyspark_nnunet.cli import main
from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer
from hyspark_nnunet.training.spark import SparKFinetuneTrainer
from tests.hub_server import served
from tests.nnunet_plans import CUBIC, DATASET_JSON, make_plans, plans_of
from tests.small_networks import preset_arguments

HYSPARK_WORDS = (
    "hyspark_nnunet plan_and_preprocess -d DATASET -preset S -c 3d_fullres",
    "nnUNetv2_train DATASET 3d_fullres 0 -tr HySparKFinetuneTrainer -p nnUNetHySparKSPlans -pretrained_weights",
)
SPARK_WORDS = (
    "hyspark_nnunet plan_and_preprocess -d DATASET --like hf://ORG/NAME -c 3d_fullres",
    "nnUNetv2_train DATASET 3d_fullres 0 -tr SparKFinetuneTrainer -p nnUNetPlansLikeFile -pretrained_weights hf://ORG/NAME",
    "2404.09556",
)
FORMS = ("pre-training", "fine-tuning", "SparK's pre-training", "SparK's fine-tuning")
CASE, FOLDER = "patient_0815", "/home/somebody/scans"


def trainer_of(form: str) -> str:
    family = "SparK" if "SparK" in form else "HySparK"
    return f"{family}{'Pretrain' if 'pre-training' in form else 'Finetune'}Trainer"


def write_checkpoint(form: str, path: Path) -> Path:
    """As a training writes it, and with the list of scans that earlier versions left in it."""
    torch.manual_seed(1)
    described: dict[str, Any] = {"channel_names": {"0": "CT"}, "strides": CUBIC, "patch_size": [16, 16, 16]}
    described |= {"dataset": "Dataset007_Nothing", "configuration": "3d_fullres", "plans": "nnUNetPlans"}
    plans = make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}, spacing=[2.5, 0.8, 0.8])
    recipe = PretrainRecipe(preset="S", num_epochs=3).as_dict()
    network: torch.nn.Module
    if "SparK" in form:
        plans = plans_of("ResidualEncoderUNet", n_stages=4)
        settings = plans["configurations"]["3d_fullres"]
        settings["spacing"] = described["spacing"] = [2.5, 0.8, 0.8]
        # what the shapes of the weights do not say
        settings["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.ReLU"
        configuration = PlansManager(copy.deepcopy(plans)).get_configuration("3d_fullres")
        network = by_configuration(configuration).build(1, 2, True)
        if "pre-training" in form:
            network = SparKMaskedAutoencoder(network, 1)
        del recipe["preset"]
    elif form == "pre-training":
        network = HySparKMaskedAutoencoder(**preset_arguments("S", 4), decoder_width=16)
    else:
        network = HySparKUNet(**preset_arguments("S", 4), num_classes=2)
    if "fine-tuning" in form:
        described |= {"labels": ["background", "organ"], "regions": False}
    log = {key: [0.9, 0.7, 0.5] for key in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs")}
    log |= {"dice_per_class_or_region": [[0.5]] * 3, "epoch_start_timestamps": [0, 9, 18]}
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 101.5, "std": 40.0}}
    scans = {CASE: {"images": [f"{FOLDER}/{CASE}_0000.nii.gz"], "label": f"{FOLDER}/{CASE}.nii.gz"}}
    write_atomically(
        {
            "network_weights": network.state_dict(),
            "trainer_name": trainer_of(form),
            "current_epoch": 3,
            "logging": log | {"epoch_end_timestamps": [8, 17, 26]},
            "init_args": {
                "plans": plans,
                "configuration": "3d_fullres",
                "fold": "all" if "pre-training" in form else 2,
                "dataset_json": DATASET_JSON | {"numTraining": 41, "dataset": scans},
            },
            "recipe": recipe,
            "hyspark": described,
        },
        path,
    )
    return path


@pytest.fixture(params=FORMS)
def published(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture) -> tuple[str, Path, Path]:
    """Form, checkpoint and folder, the folder where a hub serves it."""
    checkpoint = write_checkpoint(request.param, tmp_path / "checkpoint_final.pth")
    folder = tmp_path / "hub/team/model/main"
    assert main(["checkpoint", "publish", str(checkpoint), str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors: " in printed and f"Fill in the licence in {folder}/README.md" in printed
    return request.param, checkpoint, folder


def test_what_is_written(published: tuple[str, Path, Path]) -> None:
    form, _, folder = published
    spark = "SparK" in form
    expected = {"README.md", "config.json", "model.safetensors", "progress.png"}
    expected |= {"adaptation_plan.json", "checkpoint_final.pth"} if spark else set()
    assert {file.name for file in folder.iterdir()} == expected
    # whoever may read one file may read all
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["epochs"] == 3 and config["data"]["cases"] == 41 and config["data"]["spacing"] == [2.5, 0.8, 0.8]
    assert config["data"]["foreground_intensity_properties_per_channel"]["0"]["mean"] == 101.5
    assert config["recipe"]["num_epochs"] == 3 and config["description"]["strides"] == CUBIC
    assert config["network"] == ("ResidualEncoderUNet" if spark else config["network"])
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["license"] == "unknown" and about["library_name"] == "hyspark_nnunet"
    held_out = "" if "pre-training" in form else ", of which fold 2 was held out"
    for words in (
        f"| cases | 41{held_out} |",
        "| modality (input channels) | CT |",
        "| spacing of the training, mm | 2.5 x 0.8 x 0.8 |",
        "| normalisation | CTNormalization |",
        "3 epochs. Last training loss: 0.5000. Last validation loss: 0.5000.",
        "(progress.png)",
        *(SPARK_WORDS if spark else HYSPARK_WORDS),
        "Nature Methods",
        "num_epochs",
        "The authors of these weights have not named a licence yet.",
    ):
        assert words in card, words
    assert ("num_classes=14" in card) == ("pre-training" in form)
    assert ("| labels | background, organ |" in card) == ("fine-tuning" in form)
    assert ("2301.03580" in card) == spark and ("2408.05815" in card) != spark
    if spark:  # what nnU-Net's development version reads
        plan = json.loads((folder / "adaptation_plan.json").read_text())
        stored = torch.load(folder / "checkpoint_final.pth", weights_only=True)["nnssl_adaptation_plan"]
        assert plan == json.loads(json.dumps(stored))
        assert plan["pretrain_plan"]["configurations"]["3d_fullres"]["spacing"] == [2.5, 0.8, 0.8]
        assert plan["architecture_plans"]["arch_kwargs"]["nonlin"] == "torch.nn.ReLU"


def test_no_path_and_no_case_is_named(published: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, folder = published
    for file in folder.iterdir():
        content = file.read_bytes()
        for word in (CASE, FOLDER, str(tmp_path), os.path.expanduser("~") + "/"):
            assert word.encode() not in content, (file.name, word)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "init_args" not in file.metadata()


def test_the_folder_is_read_back_from_a_hub(
    published: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By -pretrained_weights, inspect and load_network, and without the hub from the cache."""
    form, checkpoint, _ = published
    address, expected = "hf://team/model", read_weights(checkpoint)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with served(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        weights = read_weights(address)
        assert weights.description == expected.description and weights.origin == expected.origin
        assert set(weights.state) == set(expected.state)
        assert all(torch.equal(tensor, expected.state[name]) for name, tensor in weights.state.items())
        assert main(["checkpoint", "inspect", address]) == 0
        assert re.search(rf"^{address}, \d+\.\d MB$", capsys.readouterr().out, re.MULTILINE)
        spark = "SparK" in form
        trainer_class = SparKFinetuneTrainer if spark else HySparKFinetuneTrainer
        plans = plans_of("ResidualEncoderUNet", 4) if spark else make_plans([16] * 3, CUBIC, hyspark={"preset": "S"})
        trainer = trainer_class(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
        trainer.num_input_channels = 1
        trainer.network = trainer_class.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 1, 2
        )
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        trainer.load_pretrained_weights(address)
        loaded = trainer.network.state_dict()
        assert hub.downloads == ["team/model/model.safetensors@main"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match="cannot be reached"):
        network = hyspark_nnunet.load_network(address, labels=["background", "organ"])
    for name, tensor in stored_once(network.state_dict()).items():
        if "fine-tuning" in form or name.startswith("encoder."):
            assert torch.equal(tensor, expected.state[name]) and torch.equal(tensor, loaded[name]), name
    if "SparK" in form:
        assert any(isinstance(module, torch.nn.ReLU) for module in network.modules())


def test_the_variables_of_the_hub_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_ENDPOINT and HF_HOME, in a process of its own; the folder was made from weights without a description."""
    state = HySparKMaskedAutoencoder(**preset_arguments("S", 4), decoder_width=16).state_dict()
    write_atomically(to_reference(state).state, tmp_path / "release.pth")
    folder = tmp_path / "hub/team/model/main"
    assert main(["checkpoint", "publish", str(tmp_path / "release.pth"), str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert "The file does not describe its training data." in card and not (folder / "progress.png").exists()
    command = [sys.executable, "-m", "hyspark_nnunet.cli", "checkpoint", "inspect", "hf://team/model"]
    with served(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "HySparK release, masked autoencoder" in done.stdout, done.stderr
    assert list((tmp_path / "home/hub").glob("models--team--model/snapshots/*/model.safetensors"))


def test_folders_that_hold_something_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = write_checkpoint("pre-training", tmp_path / "checkpoint_final.pth")
    assert main(["checkpoint", "publish", str(checkpoint), str(tmp_path)]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert main(["checkpoint", "publish", str(tmp_path / "missing.pth"), str(tmp_path / "new")]) == 1
    assert "no checkpoint file at" in capsys.readouterr().err and not (tmp_path / "new").exists()
