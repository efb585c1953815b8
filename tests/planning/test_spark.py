"""Batches of SparK's pre-training in nnU-Net's plans, and such plans for another dataset."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.architectures.from_plans import OWN_ARCHITECTURE
from hyspark_nnunet.cli import main
from hyspark_nnunet.planning.spark import SparKPlanner, memory_target_of, spark_pretraining_memory
from hyspark_nnunet.training.hyspark import HySparKPretrainTrainer
from hyspark_nnunet.training.memory.step_bytes import CUDA_RESERVE, GIB
from hyspark_nnunet.training.spark import SparKFinetuneTrainer, SparKPretrainTrainer
from tests.nnunet_plans import CUBIC, make_plans
from tests.planning.conftest import RESENC_PLANS as PLANS
from tests.planning.conftest import make_dataset, write_plans, written


def test_a_batch_is_added_and_nothing_else_changes(
    planned_by_nnunet: dict[str, Any],
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = make_dataset(folders, 41, (36, 50, 36), (1.0, 1.0, 1.0), n=10000)
    before = copy.deepcopy(planned_by_nnunet) | {"dataset_name": dataset}
    fine = before["configurations"]["3d_fullres"]
    larger = [2 * n for n in fine["patch_size"]]
    before["configurations"]["large"] = {"inherits_from": "3d_fullres", "patch_size": larger}
    before["configurations"]["odd"] = {"inherits_from": "3d_fullres", "patch_size": [20, 20, 20]}
    before["configurations"]["large_batch"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    write_plans(folders, dataset, before)
    assert main(["plan", "-d", "41", "-p", PLANS, "-gpu_memory_target", "6"]) == 0
    said = capsys.readouterr().out
    assert "for a GPU of 6 GB" in said and "odd: left as it is: patch size (20, 20, 20) is not divisible" in said
    assert "SparKPretrainTrainer" in said
    after = written(folders, dataset, PLANS)
    added = {name: c.pop("spark") for name, c in after["configurations"].items() if "spark" in c}
    assert json.dumps(after) == json.dumps(before)  # and in the same order
    assert set(added) == {"2d", "3d_fullres", "large"}
    batch, memory = added["3d_fullres"]["pretrain"]["batch_size"], spark_pretraining_memory(fine, 1)
    fits = memory.bytes_of(fine["patch_size"], batch) <= 6 * GIB - CUDA_RESERVE
    assert fits and memory.bytes_of(fine["patch_size"], batch + 1) > 6 * GIB - CUDA_RESERVE
    assert batch > fine["batch_size"] and added["large"]["pretrain"]["batch_size"] == batch // 8

    content = json.loads((folders / "nnUNet_raw" / dataset / "dataset.json").read_text())
    plans = {**written(folders, dataset, PLANS), "continue_training": False}
    device = torch.device("cpu")
    sizes = [
        trainer(copy.deepcopy(plans), "3d_fullres", 0, content, device).recipe.batch_size
        for trainer in (SparKPretrainTrainer, SparKFinetuneTrainer, HySparKPretrainTrainer)
    ]
    assert sizes == [batch, None, None]
    monkeypatch.setenv("HYSPARK_BATCH_SIZE", "3")
    assert SparKPretrainTrainer(plans, "3d_fullres", 0, content, device).recipe.batch_size == 3


def test_the_memory_target_is_that_of_nnunets_planner() -> None:
    known = {"plans_name": "Mine", "experiment_planner_used": "nnUNetPlannerResEncL"}
    assert memory_target_of(known, None) == 24 and memory_target_of(known, 11) == 11
    for planner in ({"experiment_planner_used": "MyPlanner"}, {}):
        with pytest.raises(ValueError, match="plans Mine name the planner .* give the memory of your GPU by -gpu_mem"):
            memory_target_of({"plans_name": "Mine", **planner}, None)


def test_what_cannot_be_planned_is_refused(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(folders, 42, (36, 50, 36), (1.0, 1.0, 1.0))
    before = make_plans([16] * 3, CUBIC) | {"dataset_name": dataset, "plans_name": "nnUNetHySparKSPlans"}
    before["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = OWN_ARCHITECTURE
    before["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [36, 50, 36]
    write_plans(folders, dataset, before)
    for words, said in (
        (("-p", PLANS), f"{PLANS}.json is missing: -p names plans that exist (nnUNetHySparKSPlans)"),
        (("-p", "nnUNetHySparKSPlans", "-gpu_memory_target", "8"), "the plan names HySparKUNet"),
        (("-p", PLANS, "-overwrite_plans_name", "Mine"), "changes nothing in these plans but the batch"),
        (("--like", "6", "-p", PLANS, "-like_plans", "nnUNetPlans"), "both name plans of dataset 6"),
    ):
        assert main(["plan", "-d", "42", *words]) == 1
        assert said in capsys.readouterr().err
    assert written(folders, dataset, "nnUNetHySparKSPlans") == before


def test_nnunets_network_for_another_dataset(planned_by_nnunet: dict[str, Any], folders: Path) -> None:
    """Network and patch of the labelled dataset, batches of the unlabelled one, in one command."""
    theirs = make_dataset(folders, 6, (36, 50, 36), (1.0, 1.0, 1.0), channels=("MRI",))
    ours = make_dataset(folders, 60, (80, 80, 80), (0.5, 0.5, 0.5), n=10000)
    source = copy.deepcopy(planned_by_nnunet)
    del source["configurations"]["2d"]
    write_plans(folders, theirs, source)
    assert main(["plan", "-d", "60", "--like", "6", "-p", PLANS]) == 0
    plans = written(folders, ours, f"{PLANS}Like006")
    mine, source_has = (p["configurations"]["3d_fullres"] for p in (plans, source))
    assert all(mine[same] == source_has[same] for same in ("spacing", "patch_size", "architecture"))
    assert mine["architecture"]["network_class_name"].endswith("ResidualEncoderUNet") and "hyspark" not in mine
    assert mine["normalization_schemes"] == ["CTNormalization"]
    planner, batch = SparKPlanner(60, 8), mine["spark"]["pretrain"]["batch_size"]
    memory = planner.memory(PlansManager(plans).get_configuration("3d_fullres").configuration)[0]
    room = planner.available_bytes
    assert memory.bytes_of(mine["patch_size"], batch) <= room < memory.bytes_of(mine["patch_size"], batch + 1)
    content = json.loads((folders / "nnUNet_raw" / ours / "dataset.json").read_text())
    trainer = SparKPretrainTrainer({**plans, "continue_training": False}, "3d_fullres", 0, content, torch.device("cpu"))
    assert trainer.recipe.batch_size == batch
