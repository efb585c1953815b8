"""The planner on datasets that are a fingerprint: large images without the images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.architectures import HySparKUNet
from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.cli import main
from hyspark_nnunet.commands import plan_options
from hyspark_nnunet.masking import mask_grid, unit_size
from hyspark_nnunet.planning.like import plan_like, source_plans_of
from hyspark_nnunet.planning.planner import MEMORY_TARGET, PLANS_NAME, HySparKPlanner
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.memory.step_bytes import GIB
from tests.planning.conftest import make_dataset, written


def test_patch_and_batches_fit_and_are_as_large_as_fits(folders: Path) -> None:
    dataset = make_dataset(folders, 31, (300, 400, 400), (1.5, 1.0, 1.0))
    planner = HySparKPlanner(31, 6, preset="S")
    planner.plan_experiment()
    plans = written(folders, dataset, "nnUNetHySparKSPlans")
    assert set(plans["configurations"]) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    for name in ("2d", "3d_fullres", "3d_lowres"):
        configuration = plans["configurations"][name]
        patch, strides = configuration["patch_size"], configuration["architecture"]["arch_kwargs"]["strides"]
        assert min(mask_grid(patch, unit_size(strides))) >= 4
        assert configuration["hyspark"]["preset"] == "S"
        batches = (configuration["hyspark"]["pretrain"]["batch_size"], configuration["batch_size"])
        for memory, batch in zip(planner.memory(configuration), batches, strict=True):
            assert memory.bytes_of(patch, batch) <= 5 * GIB < memory.bytes_of(patch, batch + 1) and batch >= 2
    # of the 3d patch two samples fill more than half of what is there
    fine = plans["configurations"]["3d_fullres"]
    assert planner.memory(fine)[1].bytes_of(fine["patch_size"], 2) > 2.5 * GIB
    manager = PlansManager(plans)
    with torch.device("meta"):
        cascade = manager.get_configuration("3d_cascade_fullres")
        network = HySparKFinetuneTrainer.build_network_architecture(manager, cascade, 2, 2)
    assert isinstance(network, HySparKUNet) and network.encoder.stem.weight.shape[0] == 16


def test_small_datasets_have_small_batches_and_keep_the_whole_image(folders: Path) -> None:
    dataset = make_dataset(folders, 32, (36, 50, 36), (1.0, 1.0, 1.0), n=100)
    HySparKPlanner(32, preset="S", plans_name="Mine").plan_experiment()
    fullres = written(folders, dataset, "Mine")["configurations"]["3d_fullres"]
    assert fullres["patch_size"] == [40, 56, 40]
    # 5 % of a hundred images of 36 x 50 x 36 voxels
    assert fullres["batch_size"] == fullres["hyspark"]["pretrain"]["batch_size"] == round(0.05 * 100 * 64800 / 89600)
    # the preprocessed data of nnU-Net's own plans serve
    assert fullres["data_identifier"] == "nnUNetPlans_3d_fullres"


def test_the_commands_offer_the_presets() -> None:
    assert set(plan_options.PRESETS) == set(PRESETS) == set(MEMORY_TARGET) == set(PLANS_NAME)


def test_nothing_fits(folders: Path) -> None:
    make_dataset(folders, 33, (100, 120, 120), (1.5, 1.0, 1.0))
    with pytest.raises(
        ValueError, match="no patch fits: .* memory target of 0.9 GB .* use a larger -gpu_memory_target$"
    ):
        HySparKPlanner(33, 0.9, preset="S").plan_experiment()
    with pytest.raises(ValueError, match="preset is 'XL', but it must be one of S, B, L"):
        HySparKPlanner(33, preset="XL")


def test_like_another_dataset(folders: Path) -> None:
    """Topology and spacing of the one, normalisation and statistics of the other."""
    theirs = make_dataset(folders, 34, (20, 100, 100), (5.0, 1.0, 1.0), channels=("MRI",))
    ours = make_dataset(folders, 35, (120, 128, 128), (1.0, 1.0, 1.0), n=1000, channels=("CT", "CT"))
    HySparKPlanner(34, preset="S").plan_experiment()
    with pytest.raises(
        FileNotFoundError,
        match="no plans nnUNetHySparKPlans.json. It has nnUNetHySparKSPlans: .* hyspark_nnunet plan -d 34 -preset B",
    ):
        source_plans_of("34", "B", None)
    with pytest.raises(
        FileNotFoundError, match="has no plans nnUNetHySparKSPlans.json. Plan it first: .* plan -d 35 -preset S$"
    ):
        source_plans_of("35", "S", None)
    with pytest.raises(FileNotFoundError, match="has no plans nnUNetPlans.json. .* first: nnUNetv2_plan_experiment"):
        source_plans_of("34", "S", "nnUNetPlans")
    source = source_plans_of("34", "S", None)
    name = plan_like(HySparKPlanner(35, preset="S"), source)
    plans = written(folders, ours, name)
    assert (name, plans["dataset_name"], theirs) == ("nnUNetHySparKSPlansLike034", ours, source["dataset_name"])
    assert plans["foreground_intensity_properties_per_channel"]["1"]["mean"] == 35
    mine, like = plans["configurations"]["3d_fullres"], source["configurations"]["3d_fullres"]
    for same in ("spacing", "patch_size", "architecture"):
        assert mine[same] == like[same]
    assert mine["normalization_schemes"] == ["CTNormalization"] * 2
    assert mine["median_image_size_in_voxels"] == [24, 128, 128]
    assert mine["data_identifier"] == "nnUNetHySparKSPlansLike034_3d_fullres"
    assert mine["hyspark"]["pretrain"]["batch_size"] >= like["hyspark"]["pretrain"]["batch_size"]
    with pytest.raises(ValueError, match="names Dataset034_Big itself"):
        plan_like(HySparKPlanner(34, preset="S"), source)


def in_the_format_before_nnunet_2_5(configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration of today's plans without the key "architecture"."""
    network = configuration["architecture"]["arch_kwargs"]
    others = {key: value for key, value in configuration.items() if key not in ("architecture", "hyspark")}
    return others | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": [2] * network["n_stages"],
        "n_conv_per_stage_decoder": [2] * (network["n_stages"] - 1),
        "num_pool_per_axis": [network["n_stages"] - 1] * 3,
        "pool_op_kernel_sizes": network["strides"],
        "conv_kernel_sizes": network["kernel_sizes"],
    }


@pytest.mark.parametrize("old_format", [False, True])
def test_like_reads_plans_as_nnunet_does(folders: Path, old_format: bool) -> None:
    """A configuration that inherits and sets only a patch, and plans of nnU-Net before 2.5."""
    dataset = make_dataset(folders, 37, (36, 50, 36), (1.0, 1.0, 1.0), channels=("MRI",))
    make_dataset(folders, 38, (48, 48, 48), (1.0, 1.0, 1.0), channels=("MRI",))
    HySparKPlanner(37, preset="S", plans_name="Mine").plan_experiment()
    source = written(folders, dataset, "Mine")
    fullres = source["configurations"]["3d_fullres"]
    if old_format:
        fullres = in_the_format_before_nnunet_2_5(fullres)
    source["configurations"] = {
        "3d_fullres": fullres,
        "small": {"inherits_from": "3d_fullres", "patch_size": [24, 32, 24]},
        "large_batch": {"inherits_from": "3d_fullres", "batch_size": 9},
    }
    planner = HySparKPlanner(38, preset="S")
    plans = json.loads((planner.plans_folder / f"{plan_like(planner, source)}.json").read_text())
    assert plans["configurations"]["large_batch"] == source["configurations"]["large_batch"]
    assert plans["configurations"]["small"]["inherits_from"] == "3d_fullres"
    resolved = {name: PlansManager(plans).get_configuration(name) for name in ("3d_fullres", "small")}
    assert resolved["small"].patch_size == [24, 32, 24] and resolved["3d_fullres"].patch_size == [40, 56, 40]
    assert resolved["small"].data_identifier == resolved["3d_fullres"].data_identifier == "MineLike037_3d_fullres"
    for configuration in resolved.values():
        strides = configuration.network_arch_init_kwargs["strides"]
        assert strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
        assert configuration.configuration["hyspark"]["preset"] == "S" and configuration.batch_size >= 2


@pytest.mark.parametrize("more", [("-overwrite_target_spacing", "1", "1", "1"), ("-preprocessor_name", "Mine")])
def test_like_refuses_what_it_would_not_heed(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-d", "60", "--like", "6", *more]) == 1
    said = capsys.readouterr().err
    assert "spacing and preprocessor from dataset 6: omit" in said and more[0] in said
    assert main(["plan", "-d", "60", "-like_plans", "nnUNetPlans"]) == 1
    assert "-like_plans nnUNetPlans names plans of another dataset" in capsys.readouterr().err


def test_a_plan_that_names_our_architecture_has_its_preset(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(folders, 36, (36, 50, 36), (1.0, 1.0, 1.0))
    HySparKPlanner(36, preset="S").plan_experiment()
    plans = {**written(folders, dataset, "nnUNetHySparKSPlans"), "continue_training": False}
    content = json.loads((folders / "nnUNet_raw" / dataset / "dataset.json").read_text())
    for trainer in (HySparKPretrainTrainer, HySparKFinetuneTrainer):
        assert trainer(dict(plans), "3d_fullres", 0, content, torch.device("cpu")).recipe.preset == "S"
        monkeypatch.setenv("HYSPARK_PRESET", "L")
        with pytest.raises(ValueError, match=r"stages \(16, 32, 64, 128\) of preset S, but the recipe says preset L"):
            trainer(dict(plans), "3d_fullres", 0, content, torch.device("cpu"))
        monkeypatch.delenv("HYSPARK_PRESET")
