"""SparK's trainers, without data."""

import copy
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.hyspark import HySparKPretrainTrainer
from hyspark_nnunet.training.optimization import encoder_layers
from hyspark_nnunet.training.resuming import check_network
from hyspark_nnunet.training.spark import SparKFinetuneTrainer, SparKPretrainTrainer
from tests.nnunet_plans import CUBIC, REQUIRING_IMPORT, make_plans, network_arguments
from tests.training.conftest import make_trainer

BLOCKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
BOTH = pytest.mark.parametrize("trainer_class", [SparKPretrainTrainer, SparKFinetuneTrainer])


def spark_plans(network: str = "PlainConvUNet", strides: list = CUBIC, size: int = 32, **section) -> dict:
    plans = make_plans([size] * 3, strides, hyspark=section)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{network}"
    architecture["arch_kwargs"] |= {
        "features_per_stage": [4 * 2**stage for stage in range(len(strides))],
        BLOCKS.get(network, "n_blocks"): [1] * len(strides),
        **network_arguments(3, len(strides)),
    }
    architecture["_kw_requires_import"] = [*REQUIRING_IMPORT]
    return plans


def network_of(trainer_class, plans: dict) -> torch.nn.Module:
    trainer = make_trainer(trainer_class, copy.deepcopy(plans))  # nnU-Net changes them
    return trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (spark_plans("ResidualUNet"), "names .*ResidualUNet, but SparK's trainers train PlainConvUNet and"),
        (spark_plans(preset="S"), r"preset is set to S \(by the plan\), but the plan says the sizes"),
        (spark_plans(strides=CUBIC[:1]), "has 1 stage, but SparK needs at least 2"),
    ],
)
@BOTH
def test_what_neither_trains(trainer_class, plans: dict, message: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer_class, plans)
    assert not (folders / "nnUNet_results").exists()


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (spark_plans(pretrain={"decoder_width": 64}), r"decoder_width is set to 64 .*\(decoder unet\): remove it"),
        (spark_plans(pretrain={"mask_ratio": 0.99}), r"1 of \(4, 4, 4\) mask units is visible .* at least 2"),
        (spark_plans(pretrain={"decoder": "reconstruction", "decoder_width": 20}), "20"),
        (spark_plans(size=8), "leaves no visible unit on the grid"),
    ],
)
def test_what_cannot_be_pretrained(plans: dict, message: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(SparKPretrainTrainer, plans)
    assert not (folders / "nnUNet_results").exists()


def test_hyspark_has_no_choice_of_decoders() -> None:
    with pytest.raises(ValueError, match=r"decoder is set to unet .* only SparKPretrainTrainer has a choice"):
        make_trainer(HySparKPretrainTrainer, spark_plans(pretrain={"decoder": "unet"}))


@BOTH
def test_plans_of_hyspark_name_their_trainer(trainer_class) -> None:
    plans = spark_plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "hyspark_nnunet.architectures.HySparKUNet"
    with pytest.raises(ValueError, match="HySparKUNet, which .* -tr HySparKPretrainTrainer and -tr HySparKFinetune"):
        make_trainer(trainer_class, plans)


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("PlainConvUNet", [f"stage {n}" for n in range(4)]),
        ("ResidualEncoderUNet", ["stem", *(f"stage {n}" for n in range(4))]),
    ],
)
def test_encoder_and_decoder_go_along(network: str, layers: list[str]) -> None:
    plans = spark_plans(network)
    pretrained, tuned = (network_of(c, plans) for c in (SparKPretrainTrainer, SparKFinetuneTrainer))
    assert list(encoder_layers(tuned)) == list(encoder_layers(pretrained)) == layers
    state = pretrained.state_dict()
    report = transfer_weights(tuned, state, "file.pth")
    fates = {entry.name: entry.fate for entry in report.entries}
    names = {name for name, _ in tuned.named_parameters()}
    assert {name for name, fate in fates.items() if fate == "random"} == {n for n in names if ".seg_layers." in n}
    assert {name for name, fate in fates.items() if fate == "loaded"} == {n for n in names if ".seg_layers." not in n}
    image, found = torch.randn(1, 1, 32, 32, 32), tuned.state_dict()
    assert all(torch.equal(found[name], state[name]) for name, fate in fates.items() if fate == "loaded")
    for one, other in zip(pretrained.encoder(image), tuned.encoder(image), strict=True):
        assert torch.equal(one, other)


def test_hysparks_decoder_leaves_the_plans_decoder_at_random() -> None:
    plans = spark_plans(pretrain={"decoder": "reconstruction", "decoder_width": 32})
    pretrained, tuned = (network_of(c, plans) for c in (SparKPretrainTrainer, SparKFinetuneTrainer))
    report = transfer_weights(tuned, pretrained.state_dict(), "file.pth")
    assert report.encoder_share == 1
    assert not [e for e in report.entries if e.fate == "loaded" and not e.name.startswith("encoder.")]


def test_heads_without_weight_in_the_loss_are_unused() -> None:
    trainer = make_trainer(SparKFinetuneTrainer, spark_plans())
    trainer.network = network_of(SparKFinetuneTrainer, spark_plans())
    assert trainer.enable_deep_supervision
    trainer.loss = trainer._build_loss()
    used = torch.randn(2, 1, 32, 32, 32)
    targets = [torch.ones(2, 1, *[32 // 2**level] * 3) for level in range(3)]
    trainer.loss(trainer.network(used), targets).backward()
    without = {id(p) for p in trainer.network.parameters() if p.ndim > 1 and (p.grad is None or not p.grad.any())}
    assert {id(p) for p in trainer.unused_parameters() if p.ndim > 1} == without


def test_sgd_brings_nnunets_defaults_unless_they_are_set() -> None:
    recipe = resolve_recipe(FinetuneRecipe, {"finetune": {"optimizer": "sgd", "initial_lr": 3e-3}}, {})
    assert (recipe.initial_lr, recipe.weight_decay) == (3e-3, 3e-5)
    assert recipe.source_of("weight_decay") == "default of optimizer sgd"
    assert resolve_recipe(PretrainRecipe, {"finetune": {"optimizer": "sgd"}}, {}).initial_lr == 1e-4


def test_an_estimate_that_fails_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(SparKPretrainTrainer, spark_plans())
    trainer.num_input_channels, trainer.batch_size = 1, 2
    said: list[str] = []
    trainer.print_to_log_file = lambda *words, **_: said.append(" ".join(words))
    generator = torch.get_rng_state()
    trainer._log_memory()
    assert torch.equal(torch.get_rng_state(), generator) and "is estimated to take 0." in said[-1]
    monkeypatch.setattr("hyspark_nnunet.training.pretrain.pretraining_bytes", lambda *_: 1 // 0)
    trainer._log_memory()
    assert "could not be estimated: ZeroDivisionError" in said[-1]


def test_the_section_of_these_networks_overrides_the_shared_one() -> None:
    plans = spark_plans(num_epochs=7, pretrain={"batch_size": 3, "mask_ratio": 0.5})
    plans["configurations"]["3d_fullres"]["spark"] = {"pretrain": {"batch_size": 5}}
    recipe = make_trainer(SparKPretrainTrainer, plans).recipe
    assert (recipe.num_epochs, recipe.batch_size, recipe.mask_ratio) == (7, 5, 0.5)
    for section, words in (({"batch": 5}, "unknown name batch"), ("S", "is 'S', but it must be a dictionary")):
        plans["configurations"]["3d_fullres"]["spark"] = section
        with pytest.raises(ValueError, match=words) as refused:
            make_trainer(SparKPretrainTrainer, plans)
        assert 'the plan\'s section "hyspark" or "spark"' in str(refused.value)


def test_a_plan_whose_norm_has_changed_is_not_continued() -> None:
    """The weights would load, and compute something else."""
    plans = spark_plans()
    described = make_trainer(SparKFinetuneTrainer, copy.deepcopy(plans)).describe_network()
    check_network({"hyspark": described}, described)
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["norm_op_kwargs"] = {"eps": 1e-3, "affine": True}
    with pytest.raises(ValueError, match="differs: norm_op_kwargs is .*1e-05.* in the file, .*0.001"):
        check_network({"hyspark": described}, make_trainer(SparKFinetuneTrainer, plans).describe_network())
