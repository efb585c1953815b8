"""nnU-Net's real commands with SparK's trainers, on synthetic data and nnU-Net's own plans."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.commands.inspect_checkpoint import inspect_checkpoint
from hyspark_nnunet.commands.publish_checkpoint import publish_checkpoint
from hyspark_nnunet.demo.synthetic_data import write_dataset
from tests.hub_server import served
from tests.nnunet_project import TINY_RECIPE, Project

PRETRAINER, FINETUNER = "SparKPretrainTrainer", "SparKFinetuneTrainer"
DATASET, RESENC_PLANS = "Dataset006_SyntheticOrgans", "nnUNetResEncPlans"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A dataset with nnU-Net's plans, whose PlainConvUNet is made narrow, and plans with a ResidualEncoderUNet."""
    recipe = {name: value for name, value in TINY_RECIPE.items() if name != "HYSPARK_PRESET"}
    project = Project(tmp_path_factory.mktemp("spark"), recipe | {"HYSPARK_NUM_PICTURES": "1"})
    project.make_folders()
    write_dataset(project.raw, 6, "SyntheticOrgans", n_train=5, n_test=1, shape=(32, 32, 32))
    project.plan_and_preprocess(6)
    folder = project.preprocessed / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    n_stages = architecture["arch_kwargs"]["n_stages"]
    architecture["arch_kwargs"]["features_per_stage"] = [8 * 2**stage for stage in range(n_stages)]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    architecture["arch_kwargs"] |= {
        "n_blocks_per_stage": [1, 2, 1, 1, 1, 1][:n_stages],
        "n_conv_per_stage_decoder": [1] * (n_stages - 1),
    }
    (folder / f"{RESENC_PLANS}.json").write_text(json.dumps(plans | {"plans_name": RESENC_PLANS}))
    return project


def pretrained_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a pre-training leaves to fine-tuning."""
    state = read_checkpoint(folder / "checkpoint_final.pth")["network_weights"]
    parts = ("encoder.", "decoder.stages.", "decoder.transpconvs.")
    return {name: tensor for name, tensor in state.items() if name.startswith(parts)}


def loaded_names(folder: Path) -> set[str]:
    report = json.loads((folder / "pretrained_weights_report.json").read_text())
    return {entry["name"] for entry in report["tensors"] if entry["fate"] == "loaded"}


def test_the_plans_own_network_is_pretrained_finetuned_and_predicts(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = {"HYSPARK_PROBE_EVERY": "10"}
    project.train(6, "all", PRETRAINER, HYSPARK_NUM_EPOCHS="1", HYSPARK_FINAL_VALIDATION_CASES="0", **probe)
    printed = project.train(6, "all", PRETRAINER, "--c", HYSPARK_FINAL_VALIDATION_CASES="1", **probe)
    assert "Epoch 1" in printed and "Epoch 0" not in printed and "\npreset " not in printed
    assert re.search(r"A step of 2 patches of 32 x 32 x 32 voxels is estimated to take 0\.\d GB of memory", printed)
    folder = project.fold_folder(DATASET, PRETRAINER, "all")
    pretraining = read_checkpoint(folder / "checkpoint_final.pth")
    assert pretraining["current_epoch"] == 2 and pretraining["recipe"]["decoder"] == "unet"
    assert pretraining["hyspark"]["network"] == "PlainConvUNet" and len(pretraining["logging"]["probe_dice"]) == 2
    assert (folder / "reconstructions/epoch_0002.png").is_file()
    state = pretrained_tensors(folder)
    assert not [name for name in pretraining["network_weights"] if "all_modules" in name or "seg_layers" in name]

    weights = str(folder / "checkpoint_final.pth")
    for name, value in project.variables().items():
        monkeypatch.setenv(name, value)
    assert inspect_checkpoint(weights, "6") == 0
    # published, and loaded from a hub
    assert publish_checkpoint(weights, str(tmp_path / "hub/team/model/main")) == 0
    cache = tmp_path / "cache"
    with served(tmp_path / "hub", cache, monkeypatch) as hub:
        # the hub's client reads its variables when it is imported: PYTHONPATH asks for a process of its own
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "PYTHONPATH": ""}
        printed = project.train(6, "0", FINETUNER, "-pretrained_weights", "hf://team/model", **variables)
        assert hub.downloads == ["team/model/model.safetensors@main"]
    # the hub does not answer any more: from its cache, with an encoder that is frozen at first
    variables |= {"HYSPARK_ENCODER_HOLD_EPOCHS": "1", "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "1"}
    offline = project.train(6, "1", FINETUNER, "-pretrained_weights", "hf://team/model", **variables)
    assert f"{hub.url} cannot be reached: of hf://team/model, the files in the cache are used" in offline
    assert offline.count("frozen for 1 epochs") > 2
    assert loaded_names(project.fold_folder(DATASET, FINETUNER, "1")) == set(state)
    assert "100.0% of the encoder's parameters come from the file." in printed
    folder = project.fold_folder(DATASET, FINETUNER, "0")
    assert loaded_names(folder) == set(state)
    checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
    tuned = checkpoint["network_weights"]
    # two epochs of two steps at a rate of 1e-4
    assert all(0 < (tuned[name] - tensor).abs().max() < 0.02 for name, tensor in state.items() if tensor.ndim > 1)
    rates = {group["name"]: group["initial_lr"] for group in checkpoint["optimizer_state"]["param_groups"]}
    assert rates["stage 0: weights"] == pytest.approx(rates["decoder: weights"] / 128)
    # nnU-Net's own network loads it
    settings = PlansManager(checkpoint["init_args"]["plans"]).get_configuration("3d_fullres")
    network = get_network_from_plans(
        settings.network_arch_class_name,
        settings.network_arch_init_kwargs,
        settings.network_arch_init_kwargs_req_import,
        1,
        4,
        deep_supervision=True,
    )
    network.load_state_dict(tuned)

    printed = project.run("hyspark_nnunet", "checkpoint", "probe", weights, "-d", "6", "--cases", "1")
    lines = [line for line in printed.splitlines() if " label 1 " in line]
    assert [line.split("  ")[0] for line in lines] == ["random weights, SparK", weights]

    project.predict(DATASET, "0", FINETUNER, tmp_path)
    (case,) = (project.raw / DATASET / "labelsTs").glob("*.nii.gz")
    predicted, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (tmp_path / case.name, case))
    assert predicted.shape == truth.shape and np.isin(predicted, range(4)).all()


def test_residual_encoders_and_nnunets_sgd(project: Project, tmp_path: Path) -> None:
    planned = project.run("hyspark_nnunet", "plan", "-d", "6", "-p", RESENC_PLANS)
    assert "3d_fullres: patch 32 x 32 x 32; 2 patches" in planned
    more = {"HYSPARK_NUM_EPOCHS": "1"}
    printed = project.train(6, "all", PRETRAINER, "-p", RESENC_PLANS, **more)
    assert re.search(r"\nbatch_size +2 +plan, \"pretrain\"", printed)
    folder = project.fold_folder(DATASET, PRETRAINER, "all", plans=RESENC_PLANS)
    images = str(project.raw / DATASET / "imagesTs")
    predicting = ("-d", "6", "-c", "3d_fullres", "-f", "all", "-tr", PRETRAINER, "-p", RESENC_PLANS, "-i", images)
    state, weights = pretrained_tensors(folder), str(folder / "checkpoint_final.pth")
    arguments = ("-p", RESENC_PLANS, "-pretrained_weights", weights)
    printed = project.train(6, "0", FINETUNER, *arguments, HYSPARK_NUM_EPOCHS="1", HYSPARK_OPTIMIZER="sgd")
    assert "default of optimizer sgd" in printed
    folder = project.fold_folder(DATASET, FINETUNER, "0", plans=RESENC_PLANS)
    assert loaded_names(folder) == set(state)
    checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
    groups = {group["name"]: group for group in checkpoint["optimizer_state"]["param_groups"]}
    decoder, stem = groups["decoder: weights"], groups["stem: weights"]
    assert (decoder["momentum"], decoder["nesterov"], decoder["initial_lr"]) == (0.99, True, 0.01)
    assert decoder["weight_decay"] == 3e-5 and stem["initial_lr"] == pytest.approx(0.01 / 128)
    summary = folder / "validation/summary.json"
    summary.unlink()
    project.train(6, "0", FINETUNER, "-p", RESENC_PLANS, "--val", HYSPARK_NUM_EPOCHS="1", HYSPARK_OPTIMIZER="sgd")
    assert json.loads(summary.read_text())["metric_per_case"]
    refused = project.run("nnUNetv2_predict", *predicting, "-o", str(tmp_path), "-device", "cpu", ok=False)
    assert "reconstructs images and does not segment" in refused and FINETUNER in refused
    refused = project.train(6, "0", FINETUNER, "-p", RESENC_PLANS, "--c", ok=False, HYSPARK_NUM_EPOCHS="2")
    assert "trained with optimizer sgd, but the recipe has adamw: set HYSPARK_OPTIMIZER=sgd" in refused
