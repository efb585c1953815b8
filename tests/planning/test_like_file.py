"""Plans with the network of a checkpoint."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hyspark_nnunet.architectures import HySparKUNet
from hyspark_nnunet.checkpoints.network_plan import by_configuration
from hyspark_nnunet.checkpoints.nnssl import adaptation_plan
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.cli import main
from hyspark_nnunet.planning.file_plans import FilePlans
from hyspark_nnunet.training.spark import SparKFinetuneTrainer
from tests.commands.test_plan_network_files import plans_of, stock_network, write_checkpoint
from tests.planning.conftest import make_dataset, written
from tests.small_networks import small_arguments

NETWORK = "ResidualEncoderUNet"


@pytest.fixture
def dataset(folders: Path) -> str:
    return make_dataset(folders, 6, (70, 80, 80), (0.8, 0.7, 0.7))


def write_nnssl(path: Path, spacing: list[float] | None, patch_size: list[int] | None = None) -> dict[str, Any]:
    """In nnssl's layout; returns the network's arguments."""
    plans = plans_of(NETWORK)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    plan = adaptation_plan(
        architecture["network_class_name"], architecture["arch_kwargs"], 1, "onemmiso", spacing, patch_size or [32] * 3
    )
    if patch_size == []:
        del plan["pretrain_patch_size"], plan["pretrain_plan"]
    torch.save({"network_weights": stock_network(plans).state_dict(), "nnssl_adaptation_plan": plan}, path)
    return architecture["arch_kwargs"]


def test_a_file_of_nnssl(folders: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theirs.pth"
    arguments = write_nnssl(file, [1.0, 1.0, 1.0])
    assert main(["plan", "-d", "6", "--like", str(file)]) == 0
    said = capsys.readouterr().out
    assert (
        "Batches for nnU-Net's own network, for a GPU of 24 GB" in said
        and "Train with -p nnUNetPlansLikeFile and SparKPretrainTrainer" in said
    )
    plans = written(folders, dataset, "nnUNetPlansLikeFile")
    (configuration,) = plans["configurations"].values()
    assert (configuration["spacing"], configuration["patch_size"]) == ([1.0] * 3, [32] * 3)
    assert configuration["architecture"]["network_class_name"].endswith(NETWORK)
    assert configuration["architecture"]["arch_kwargs"] == arguments
    assert configuration["median_image_size_in_voxels"] == [56, 56, 56]
    assert configuration["normalization_schemes"] == ["CTNormalization"] and configuration["batch_size"] >= 2
    # all of the file fits the network that our trainer builds for these plans
    content = json.loads((folders / "nnUNet_raw" / dataset / "dataset.json").read_text())
    plans["continue_training"] = False
    trainer = SparKFinetuneTrainer(plans, "3d_fullres", 0, content, torch.device("cpu"))
    network = by_configuration(trainer.configuration_manager).build(1, 2, True)
    report = transfer_weights(network, read_weights(file).state, str(file))
    assert report.encoder_share == 1 and not [e for e in report.entries if e.fate == "adapted"]


def test_a_file_without_spacing(
    folders: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "theirs.pth"
    write_nnssl(file, None)
    assert main(["plan", "-d", "6", "--like", str(file)]) == 0
    said = capsys.readouterr().out
    assert "does not say the spacing" in said and "target spacing of Dataset006_Big, 0.8 x 0.7 x 0.7 mm" in said
    spacing = written(folders, dataset, "nnUNetPlansLikeFile")["configurations"]["3d_fullres"]["spacing"]
    assert spacing == pytest.approx([0.8, 0.7, 0.7])
    words = ("-overwrite_target_spacing", "1", "1", "1", "-overwrite_plans_name", "Mine")
    assert main(["plan", "-d", "6", "--like", str(file), *words]) == 0
    assert written(folders, dataset, "Mine")["configurations"]["3d_fullres"]["spacing"] == [1.0] * 3


def test_a_file_with_its_plans(
    planned_by_nnunet: dict[str, Any], folders: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of our trainers or of nnU-Net's: as --like with the dataset of the training."""
    source = copy.deepcopy(planned_by_nnunet) | {"dataset_name": "Dataset060_Scans"}
    fullres = source["configurations"]["3d_fullres"]
    fullres["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 6, 8, 8]
    source["configurations"] = {"3d_fullres": fullres}
    file = write_checkpoint(source, tmp_path / "checkpoint_final.pth")
    for words in (("-p", "nnUNetPlans"), ("-like_plans", "nnUNetPlans"), ("-overwrite_target_spacing", "1", "1", "1")):
        assert main(["plan", "-d", "6", "--like", str(file), *words]) == 1
    assert main(["plan", "-d", "6", "--like", str(file), "-gpu_memory_target", "8"]) == 0
    mine = written(folders, dataset, "nnUNetResEncUNetPlansLike060")["configurations"]["3d_fullres"]
    assert all(mine[same] == fullres[same] for same in ("spacing", "patch_size", "architecture"))
    assert mine["spark"]["pretrain"]["batch_size"] >= 2
    # a file must not choose where is written
    content = torch.load(file, weights_only=False)
    content["init_args"]["plans"]["plans_name"] = "../../mine"
    torch.save(content, tmp_path / "elsewhere.pth")
    capsys.readouterr()
    assert main(["plan", "-d", "6", "--like", str(tmp_path / "elsewhere.pth"), "-gpu_memory_target", "8"]) == 1
    assert "have the name '../../mineLike060', which cannot be a file's" in capsys.readouterr().err
    # the plans in a file may be of another network
    content = torch.load(file, weights_only=False)
    content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "a.PlainUNet"
    torch.save(content, file)
    assert FilePlans(str(file)).plans is None


def test_files_that_say_too_little(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pth"
    torch.save(HySparKUNet(num_classes=2, **small_arguments()).state_dict(), file)
    assert main(["plan", "-d", "6", "--like", str(file)]) == 1
    assert "holds HySparK's network, but not the plans" in capsys.readouterr().err
    write_nnssl(file, [1.0] * 3, [])
    assert main(["plan", "-d", "6", "--like", str(file)]) == 1
    assert "does not say the patch size" in capsys.readouterr().err
    assert main(["plan", "-d", "6", "--like", str(tmp_path / "missing.pth")]) == 1
    assert "no checkpoint file at" in capsys.readouterr().err
