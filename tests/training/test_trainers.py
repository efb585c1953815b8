"""The trainers without a dataset: what they refuse, and what they build of a plan."""

import copy
import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.architectures.from_plans import n_stages_taken
from hyspark_nnunet.building_blocks.depthwise import depthwise_convolutions
from hyspark_nnunet.training import pretrain
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.pretrained_weights import route_pretrained_weights
from tests.nnunet_plans import CUBIC, DATASET, DATASET_JSON, make_plans
from tests.training.conftest import make_trainer

BOTH = pytest.mark.parametrize("trainer_class", [HySparKPretrainTrainer, HySparKFinetuneTrainer])


@BOTH
def test_the_network_of_a_2d_plan(trainer_class) -> None:
    """Plans of nnU-Net have up to eight stages in 2d: as many are taken as reach stride 16."""
    trainer = make_trainer(trainer_class, make_plans([256, 192], [[1, 1]] + [[2, 2]] * 6))
    plans, settings = trainer.plans_manager, trainer.configuration_manager
    with torch.device("meta"):
        network = trainer_class.build_network_architecture(plans, settings, 1, 2)
    assert network.encoder.unit == (16, 16) and network.encoder.stem.weight.shape == (32, 1, 3, 3)


@BOTH
def test_a_patch_that_the_strides_do_not_divide(trainer_class, folders: Path) -> None:
    with pytest.raises(ValueError, match=r"patch size \(40, 52, 40\) is not divisible by the mask unit \(8, 8, 8\)"):
        make_trainer(trainer_class, make_plans([40, 52, 40], CUBIC))
    assert not (folders / "nnUNet_results").exists()


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("0", "mask_ratio is 0.0, but it must lie strictly between 0 and 1"),
        ("1", "mask_ratio is 1.0, but it must lie strictly between 0 and 1"),
        ("0.999", r"mask_ratio 0.999 leaves no visible unit on the grid \(2, 2, 2\) of 8 mask units"),
        ("0.01", r"mask_ratio 0.01 leaves no hidden unit on the grid \(2, 2, 2\) of 8 mask units"),
        ("much", "HYSPARK_MASK_RATIO is 'much', but it must be a number"),
    ],
)
def test_a_mask_ratio_that_cannot_be(ratio: str, message: str, monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    monkeypatch.setenv("HYSPARK_MASK_RATIO", ratio)
    with pytest.raises(ValueError, match=message):
        make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC))
    assert not (folders / "nnUNet_results").exists()


@BOTH
def test_a_recipe_field_that_does_not_exist(trainer_class, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown name mask_ration in the plan.*did you mean mask_ratio"):
        make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, hyspark={"mask_ration": 0.5}))
    monkeypatch.setenv("HYSPARK_EPOCHS", "3")
    with pytest.raises(ValueError, match="unknown name HYSPARK_EPOCHS among the environment variables"):
        make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC))


def test_no_folder_for_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(ValueError, match="nnUNet_results is not set: export nnUNet_results=FOLDER"):
        make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC))


def test_a_decoder_width_that_cannot_be_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYSPARK_DECODER_WIDTH", "100")
    with pytest.raises(ValueError, match="decoder_width 100 cannot be halved 3 times.*multiple of 8"):
        make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC))


def test_the_second_stage_of_a_cascade_is_not_pretrained() -> None:
    plans = make_plans([16, 16, 16], CUBIC, previous_stage="3d_lowres")
    with pytest.raises(ValueError, match="second stage of a cascade.*pre-train on '3d_lowres'"):
        make_trainer(HySparKPretrainTrainer, plans)


@BOTH
def test_a_dataset_that_is_not_preprocessed(trainer_class) -> None:
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC))
    with pytest.raises(
        FileNotFoundError, match=f"{DATASET} is not preprocessed .* Run: hyspark_nnunet preprocess -d 7 -c 3d"
    ):
        trainer.initialize()


def test_settings_of_the_plan_and_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYSPARK_NUM_EPOCHS", "7")
    section = {"num_epochs": 3, "preset": "S", "pretrain": {"initial_lr": 2e-4}}
    trainer = make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC, hyspark=section))
    assert (trainer.num_epochs, trainer.recipe.preset, trainer.initial_lr) == (7, "S", 2e-4)


@pytest.mark.parametrize("environment", [{}, {"HYSPARK_PRESET": "S"}, {"HYSPARK_DECODER_WIDTH": "64"}])
@pytest.mark.parametrize("section", [None, {"preset": "L"}, {"pretrain": {"preset": "S"}, "finetune": {"preset": "S"}}])
@BOTH
def test_the_network_can_be_built_again_from_the_results_plans(
    trainer_class, section, environment: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What prediction does: from the plans that were saved, without the environment of the training."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, **({"hyspark": section} if section else {})))
    trainer._write_recipe_to_plans()
    preset = trainer.recipe.preset
    for name in environment:
        monkeypatch.delenv(name)
    plans = PlansManager(json.loads(json.dumps(trainer.plans_manager.plans)))
    with torch.device("meta"):
        network = trainer_class.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 2, False)
    assert network.encoder.stem.weight.shape[0] == {"S": 16, "B": 32, "L": 48}[preset]
    if trainer_class is HySparKPretrainTrainer:
        width = network.decoder.levels[0].upsample.in_channels
        assert width == (64 if "HYSPARK_DECODER_WIDTH" in environment else {"S": 192, "B": 384, "L": 384}[preset])


@pytest.mark.parametrize(
    ("strides", "taken"),
    [
        ([[1, 1, 1]] + [[2, 2, 2]] * 3, 4),
        ([[1, 1, 1]] + [[2, 2, 2]] * 5, 5),
        ([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]], 5),
        ([[1, 1, 1], [4, 4, 4], [4, 4, 4], [2, 2, 2]], 3),
        ([[1, 1, 1], [2, 4, 4], [1, 4, 4], [2, 1, 1], [2, 1, 1]], 5),
        ([[1, 1, 1], [2, 2, 2]], 2),
    ],
)
def test_stages_taken_of_a_plan(strides: list, taken: int) -> None:
    assert n_stages_taken(strides) == taken


def test_a_plan_of_one_stage() -> None:
    with pytest.raises(ValueError, match="the plan has 1 stage .* needs at least 2"):
        make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], [[1, 1, 1]]))


def test_the_network_of_an_anisotropic_plan() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3]] + [[3, 3, 3]] * 4
    plans = PlansManager(make_plans([28, 192, 192], strides, kernels))
    configuration = plans.get_configuration("3d_fullres")
    with torch.device("meta"):
        network = HySparKPretrainTrainer.build_network_architecture(plans, configuration, 2, 3)
    assert network.encoder.unit == (4, 16, 16)
    assert [tuple(stage.blocks[0].conv.weight.shape[2:]) for stage in network.encoder.stages][:3] == [
        (1, 3, 3),
        (1, 3, 3),
        (3, 3, 3),
    ]
    assert [len(stage.blocks) for stage in network.encoder.stages] == [1, 1, 3, 3, 1]
    assert network.decoder.levels[0].upsample.in_channels == 768
    assert [p.numel() for n, p in network.named_parameters() if n == "encoder.stem.weight"] == [32 * 2 * 9]


def test_a_network_of_two_stages_has_one_output_and_no_deep_supervision() -> None:
    """nnU-Net gives the coarsest output no weight: of a single output nothing would be left."""
    two = make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC[:2]))
    four = make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC))
    assert not two.enable_deep_supervision and two._get_deep_supervision_scales() is None
    assert four._get_deep_supervision_scales() == [[1, 1, 1], [0.5] * 3, [0.25] * 3]


@BOTH
def test_weights_decay_and_norms_biases_and_tokens_do_not(trainer_class) -> None:
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))
    plans = copy.deepcopy(trainer.plans_manager)
    trainer.network = trainer_class.build_network_architecture(plans, trainer.configuration_manager, 1, 2)
    optimizer, scheduler = trainer.configure_optimizers()
    names = {id(p): n for n, p in trainer.network.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert sum(map(len, groups.values())) == len(names)
    exempt = groups["norms, biases, mask tokens"]
    assert exempt == {n for n in names.values() if n.endswith("bias") or "norm" in n or "mask_tokens" in n} | {
        n for n in names.values() if trainer.network.get_parameter(n).ndim == 1
    }
    scheduler.step(trainer.num_epochs)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays["norms, biases, mask tokens"] == 0 and decays["weights"] > 0


@BOTH
def test_values_of_the_other_trainer_are_checked_too(trainer_class, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYSPARK_MASK_RATIO", "2")
    monkeypatch.setenv("HYSPARK_POLYNOMIAL_EXPONENT", "-1")
    with pytest.raises(
        ValueError, match="(mask_ratio is 2.0|polynomial_exponent is -1.0), but it must .* \\(set by the env"
    ):
        make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC))


@BOTH
def test_an_empty_section_is_no_section(trainer_class) -> None:
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, hyspark=None))
    trainer._write_recipe_to_plans()
    assert trainer.configuration_manager.configuration["hyspark"][trainer.recipe.kind]["preset"] == "B"


def test_a_validation_that_runs_out_of_memory_does_not_read_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC))
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", full)
    monkeypatch.setattr(trainer, "do_split", lambda: pytest.fail("the cases are read"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        trainer.perform_actual_validation()


def test_the_final_validation_leaves_out_a_case_whose_voxels_are_all_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = DATASET_JSON | {"labels": {"background": 0, "organ": 1, "ignore": 2}}
    plans = make_plans([16, 16, 16], CUBIC)
    trainer = HySparKPretrainTrainer(plans, "3d_fullres", 0, content, torch.device("cpu"))
    segmentations = {"all_ignored": np.full((1, 16, 16, 16), 2), "labelled": np.ones((1, 16, 16, 16), int)}
    monkeypatch.setattr(pretrain, "finite_case", lambda _, key: (torch.rand(1, 16, 16, 16), segmentations[key]))
    trainer.network, trainer.dataset_class = torch.nn.Identity(), lambda *_: None
    monkeypatch.setattr(trainer, "do_split", lambda: ([], [*segmentations]))
    monkeypatch.setattr(trainer, "_reconstruct", lambda image, _: torch.zeros_like(image))
    trainer.perform_actual_validation()
    assert "WARNING: case all_ignored has no hidden voxel without the ignore label" in capsys.readouterr().out
    summary = json.loads((Path(trainer.output_folder) / "validation/summary.json").read_text())
    assert [result["case"] for result in summary["metric_per_case"]] == ["labelled"]
    assert summary["mean"]["reconstruction_loss"] == pytest.approx(summary["mean"]["loss_of_predicting_means"])


def test_a_trainer_is_freed_after_its_training() -> None:
    """nnU-Net's module, which calls trainers to load weights, outlives them."""
    trainer = make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC))
    route_pretrained_weights(trainer)
    seen = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert seen() is None


def test_pretrained_weights_report_lies_with_the_checkpoints(tmp_path: Path) -> None:
    """Of a compiled network, with channels mapped by the recipe."""
    section = {"preset": "S", "input_channel_mapping": "T1=0, T2=0"}
    content = DATASET_JSON | {"channel_names": {"0": "T1", "1": "T2"}}
    plans = make_plans([16, 16, 16], CUBIC, hyspark=section)
    source = HySparKFinetuneTrainer.build_network_architecture(
        PlansManager(plans), PlansManager(plans).get_configuration("3d_fullres"), 1, 2
    )
    torch.save({"module._orig_mod." + n: t for n, t in source.state_dict().items()}, tmp_path / "weights.pth")
    trainer = HySparKFinetuneTrainer(plans, "3d_fullres", 0, content, torch.device("cpu"))
    trainer.num_input_channels, trainer.output_folder = 2, str(tmp_path)
    network = HySparKFinetuneTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 2, 2
    )
    trainer.network = torch.compile(network)
    trainer.load_pretrained_weights(str(tmp_path / "weights.pth"))
    half = source.encoder.stem.weight / 2
    assert torch.equal(network.encoder.stem.weight, torch.cat([half, half], 1))
    report = json.loads((tmp_path / "pretrained_weights_report.json").read_text())
    stem = next(entry for entry in report["tensors"] if entry["name"] == "encoder.stem.weight")
    assert stem["fate"] == "adapted" and stem["why"] == "input channels: T1 from 0, T2 from 0"
    assert trainer.describe_network()["labels"] == ["background", "organ"]


@BOTH
def test_a_training_logs_which_memory_format_its_depthwise_convolutions_take(
    trainer_class, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))
    trainer.network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)
    trainer.num_input_channels, trainer.batch_size = 1, 2
    log: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", log.append)

    def seconds(convolution, layout, field, channels_first):
        return 1.0 if channels_first == (field.shape[-1] > 16) else 2.0

    monkeypatch.setattr("hyspark_nnunet.building_blocks.depthwise.seconds_of", seconds)
    state, drawn = copy.deepcopy(trainer.network.state_dict()), torch.get_rng_state()
    trainer.choose_memory_formats()
    chosen = {len(c.weight): c.channels_first for c in depthwise_convolutions(trainer.network)}
    assert chosen == {width: width > 16 for width in chosen} and len(chosen) > 2
    assert len(log) == 1 and log[0].count("ms channels-first") >= len(chosen)
    # neither running statistics nor random numbers know of it
    assert all(torch.equal(value, state[name]) for name, value in trainer.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
