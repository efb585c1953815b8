"""The trainers without a data set: what they refuse, and what they build of a plan."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.architectures.from_plans import n_stages_taken
from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.training.continuing import BEST, FINAL, LATEST, PREVIOUS
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.stepping import take_step
from tests.nnunet_plans import CUBIC, DATASET, DATASET_JSON, make_plans


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def make_trainer(trainer_class, plans: dict):
    return trainer_class(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))


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


def test_a_decoder_width_that_cannot_be_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYSPARK_DECODER_WIDTH", "100")
    with pytest.raises(ValueError, match="decoder_width 100 cannot be halved 3 times.*multiple of 8"):
        make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC))


def test_the_second_stage_of_a_cascade_is_not_pretrained() -> None:
    plans = make_plans([16, 16, 16], CUBIC, previous_stage="3d_lowres")
    with pytest.raises(ValueError, match="second stage of a cascade.*pre-train on '3d_lowres'"):
        make_trainer(HySparKPretrainTrainer, plans)


@BOTH
def test_a_data_set_that_is_not_preprocessed(trainer_class) -> None:
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC))
    with pytest.raises(
        FileNotFoundError, match=f"{DATASET} is not preprocessed .* Run: nnUNetv2_preprocess -d 7 -c 3d"
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


class TestFinetuningSchedules:
    """The recipe's fields as the trainer acts on them; the schedules themselves: test_optimization.py."""

    def trainer(self, **fields):
        section = {"preset": "S", "num_epochs": 10, "warmup_fraction": 0.0, "finetune": fields}
        trainer = make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC, hyspark=section))
        plans, settings = trainer.plans_manager, trainer.configuration_manager
        trainer.network = HySparKFinetuneTrainer.build_network_architecture(plans, settings, 1, 2)
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        return trainer

    def rates(self, trainer, epoch: float) -> dict[str, float]:
        trainer.lr_scheduler.step(epoch)
        return {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}

    def test_frozen_encoder(self, capsys: pytest.CaptureFixture) -> None:
        trainer = self.trainer(encoder_hold_epochs=4)
        assert self.rates(trainer, 3.9)["encoder"] == 0 < self.rates(trainer, 3.9)["decoder"]
        rates = self.rates(trainer, 4)
        assert rates["encoder"] == rates["decoder"] == pytest.approx(1e-4 * 0.6**0.9)
        trainer.print_groups()
        printed = capsys.readouterr().out
        assert printed.count("parameter group ") == 1 and printed.count("frozen for 4 epochs") == 2
        # the hook that drops gradients of a rate of zero
        self.rates(trainer, 0)
        for parameter in trainer.network.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = copy.deepcopy(trainer.network.state_dict())
        trainer.optimizer.step()
        for name, tensor in trainer.network.state_dict().items():
            assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name

    def test_lower_rate_and_warm_up_of_the_decoder(self) -> None:
        trainer = self.trainer(encoder_hold_epochs=6, encoder_hold_factor=0.25, decoder_warmup_epochs=2)
        assert self.rates(trainer, 1) == {"decoder": pytest.approx(1e-4 * 1.005 / 2), "encoder": 0}
        assert self.rates(trainer, 2) == {"decoder": pytest.approx(1e-4), "encoder": pytest.approx(0.25e-4)}
        late = self.rates(trainer, 7)
        assert late["encoder"] == late["decoder"] > 0
        notes = trainer.group_notes()["encoder"]
        assert notes == "frozen for 2 epochs while the decoder warms up, 0.25 of the rate for 6 epochs"

    def test_layer_decay_and_the_rate_nnunet_logs(self) -> None:
        trainer = self.trainer(layer_decay=0.5)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates[0] == 1e-4 == max(rates)
        # stem, four stages, two transformer blocks
        assert min(rates) == pytest.approx(1e-4 * 0.5**7)

    def report(self, trainer, at_random: str = "none", adapted: str = "none") -> TransferReport:
        report = TransferReport()
        for name, parameter in trainer.network.named_parameters():
            fate = "random" if name.startswith(at_random) else "adapted" if name.startswith(adapted) else "loaded"
            report.add(name, fate, parameter.numel())
        return report

    def rate_of_layers(self, trainer) -> dict[str, float]:
        groups = trainer.optimizer.param_groups
        return {group["name"].partition(":")[0]: group["initial_lr"] / groups[0]["initial_lr"] for group in groups}

    def test_with_weights_of_a_file_layers_have_rates_of_their_own(self) -> None:
        trainer = self.trainer()
        assert {group["part"] for group in trainer.optimizer.param_groups} == {"decoder"}  # all alike
        trainer.weights_came(self.report(trainer, at_random="encoder.stages.3."))
        rates = self.rate_of_layers(trainer)
        # stem, four stages, two transformer blocks
        assert rates["decoder"] == 1 and rates["transformer block 1"] == 0.5 and rates["stem"] == 0.5**7
        assert rates["stage 3"] == 1  # new, unlike the layers around it
        trainer.weights_came(self.report(trainer, adapted="encoder.stem."))
        rates = self.rate_of_layers(trainer)
        assert rates["stem"] == 1 and rates["stage 0"] == 0.5**6
        trainer.lr_scheduler.step(5)  # the schedule is that of the new groups
        lrs = {group["name"].partition(":")[0]: group["lr"] for group in trainer.optimizer.param_groups}
        assert lrs["transformer block 1"] == pytest.approx(0.5 * lrs["decoder"]) and lrs["decoder"] < 1e-4

    @pytest.mark.parametrize("fields", [{}, {"layer_decay": 0.75}, {"layer_decay": 1.0}])
    def test_a_continued_training_keeps_the_rates_of_layers(self, fields: dict[str, float]) -> None:
        for begun_with_weights in (False, True):
            trainer, again = (self.trainer(**fields) for _ in range(2))
            if begun_with_weights:
                trainer.weights_came(self.report(trainer, at_random="encoder.stages.3."))
            checkpoint = {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
            again.follow_optimizer(checkpoint)
            again._check_same_groups(checkpoint)
            assert self.rate_of_layers(again) == pytest.approx(self.rate_of_layers(trainer))

    def test_a_continued_training_takes_a_decay_that_is_set_now(self) -> None:
        trainer, again = self.trainer(layer_decay=0.5), self.trainer(layer_decay=0.75)
        again.follow_optimizer({"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()})
        assert self.rate_of_layers(again)["transformer block 1"] == 0.75

    def test_new_layers_keep_the_whole_rate_under_a_decay_that_is_set_now(self) -> None:
        trainer, again = self.trainer(), self.trainer(layer_decay=0.75)
        trainer.weights_came(self.report(trainer, at_random="encoder.stages.3."))
        checkpoint = {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
        again.follow_optimizer(checkpoint)
        again._check_same_groups(checkpoint)
        rates = self.rate_of_layers(again)
        assert rates["stage 3"] == 1
        assert (rates["transformer block 0"], rates["stage 2"]) == pytest.approx((0.75**2, 0.75**4))

    def test_a_decay_that_was_set_and_is_no_longer_is_asked_for(self) -> None:
        trainer, again = self.trainer(layer_decay=0.75), self.trainer()
        checkpoint = {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
        again.follow_optimizer(checkpoint)
        with pytest.raises(ValueError, match="set layer_decay"):
            again._check_same_groups(checkpoint)

    def test_names_of_a_compiled_network(self) -> None:
        trainer = self.trainer()
        trainer.network = torch.compile(trainer.network)
        groups = trainer.parameter_groups()
        assert [group["name"] for group in groups] == ["weights", "norms, biases, mask tokens"]
        trainer.recipe = type(trainer.recipe)(layer_decay=0.5)
        assert {group["part"] for group in trainer.parameter_groups()} == {"encoder", "decoder"}

    def test_other_groups_are_not_continued(self) -> None:
        trainer, other = self.trainer(), self.trainer(layer_decay=0.5)
        with pytest.raises(ValueError, match="groups weights, norms.* this recipe makes decoder: weights.*layer_decay"):
            other._check_same_groups({"optimizer_state": trainer.optimizer.state_dict()})
        other._check_same_groups({"optimizer_state": other.optimizer.state_dict()})

    def test_the_rates_survive_a_continued_training(self) -> None:
        trainer, again = (self.trainer(layer_decay=0.5, encoder_hold_epochs=2) for _ in range(2))
        self.rates(trainer, 1)
        again.optimizer.load_state_dict(trainer.optimizer.state_dict())
        for epoch in (1.5, 3):
            trainer.lr_scheduler.step(epoch)
            again.lr_scheduler.step(epoch)
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            assert [group["lr"] for group in again.optimizer.param_groups] == rates
            assert len(set(rates)) == (2 if epoch < 2 else 8)

    def test_gradients_of_a_frozen_encoder_do_not_scale_down_those_of_the_decoder(self) -> None:
        """Nor do they count as a loss that is not finite."""
        trainer = self.trainer(encoder_hold_epochs=4)
        encoder, other = (
            [p for name, p in trainer.network.named_parameters() if name.startswith("encoder.") == wanted]
            for wanted in (True, False)
        )
        self.rates(trainer, 1)

        def step(factor: float, scaler: Any = None) -> tuple[bool, list[float]]:
            state = copy.deepcopy(trainer.optimizer.state_dict())
            _, taken = take_step(
                trainer.network,
                trainer.optimizer,
                scaler,
                lambda _: sum(p.sum() for p in other) * 1e-4 + factor * sum(p.sum() for p in encoder),
                [{}],
                1.0,
                trainer.drop_gradients,
            )
            gradients = [float(p.grad.abs().max()) for p in other if p.grad is not None]
            trainer.optimizer.load_state_dict(state)
            return taken, gradients

        expected = [pytest.approx(1e-4)] * len(other)
        assert step(0) == step(1e6) == (True, expected)
        # at a rate of zero for all, which a warm-up begins with, a gradient scaler needs gradients
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0
        assert step(1, torch.amp.GradScaler("cpu"))[0]


class TestLoading:
    """A checkpoint meets a trainer whose recipe is another."""

    def trainer(self, trainer_class=HySparKFinetuneTrainer, going_on: bool = False, **fields):
        section = {"preset": "S", trainer_class.recipe_class.kind: fields}
        plans = make_plans([16, 16, 16], CUBIC, hyspark=section) | {"continue_training": going_on}
        trainer = make_trainer(trainer_class, plans)
        settings = trainer.configuration_manager
        trainer.network = trainer_class.build_network_architecture(trainer.plans_manager, settings, 1, 2)
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        trainer.num_input_channels, trainer.was_initialized = 1, True
        return trainer

    def saved(self, trainer, name: str = FINAL, epochs: int = 1) -> str:
        trainer.write_checkpoint(str(Path(trainer.output_folder, name)), epochs)
        return str(Path(trainer.output_folder, name))

    def test_a_validation_needs_no_optimizer(self) -> None:
        trained = self.trainer(layer_decay=0.5)
        path = self.saved(trained)
        validating = self.trainer()
        validating.load_checkpoint(path)
        for name, tensor in trained.network.state_dict().items():
            assert torch.equal(validating.network.state_dict()[name], tensor)
        message = "the checkpoint was trained with the parameter groups"
        with pytest.raises(ValueError, match=message):
            validating.begin()
        with pytest.raises(ValueError, match=message):
            self.trainer(going_on=True).load_checkpoint(path)

    def test_a_checkpoint_does_not_say_where_the_scans_lie(self) -> None:
        trainer = self.trainer()
        given = trainer.my_init_kwargs["dataset_json"] | {
            "dataset": {"a": {"images": ["/clinic/a.nii.gz"], "label": "labelsTr/a.nii.gz"}},
            "hyspark_nnunet": {"left_out": {"b": "/clinic/b.nii.gz cannot be read"}},
        }
        trainer.my_init_kwargs["dataset_json"] = dict(given)
        arguments = read_checkpoint(Path(self.saved(trainer)))["init_args"]
        assert "/clinic" not in str(arguments)
        assert arguments["dataset_json"]["labels"] == given["labels"]
        assert trainer.my_init_kwargs["dataset_json"] == given

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_trial_that_writes_nothing_removes_nothing(self, kept: bool) -> None:
        trainer = self.trainer()
        files = [Path(self.saved(trainer, name)) for name in (LATEST, LATEST)] + [Path(trainer.output_folder, PREVIOUS)]
        trainer.disable_checkpointing = kept
        trainer.on_train_end()
        assert [file.exists() for file in files] == [kept] * 3
        assert Path(trainer.output_folder, FINAL).exists() != kept

    def test_what_describes_earlier_checkpoints_stays_till_they_are_set_aside(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        earlier = self.trainer()
        fingerprint = Path(earlier.preprocessed_dataset_folder_base, "dataset_fingerprint.json")
        fingerprint.parent.mkdir(parents=True)
        fingerprint.write_text("{}")
        earlier.begin_files_beside()
        plans = Path(earlier.output_folder_base, "plans.json")
        before = plans.read_text()
        path = self.saved(earlier)
        trial = self.trainer()
        trial.plans_manager.plans["configurations"]["3d_fullres"]["hyspark"] = {"preset": "L"}
        trial.begin_files_beside()
        assert plans.read_text() == before and Path(path).exists()
        with monkeypatch.context() as full:
            full.setattr(Path, "mkdir", no_space)
            with pytest.raises(OSError, match="No space left"):
                self.saved(trial, LATEST)
        assert plans.read_text() == before and Path(path).exists()
        self.saved(trial, LATEST)
        assert '"L"' in plans.read_text() and not Path(path).exists()
        assert list(Path(trial.output_folder).glob(f"earlier_*/{FINAL}"))

    def test_the_table_of_groups_has_the_rates_to_come(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Not those of the checkpoint, whose recipe was another."""
        path = self.saved(self.trainer(initial_lr=1e-3, layer_decay=0.5))
        again = self.trainer(going_on=True, initial_lr=2e-4, layer_decay=0.75)
        again.load_checkpoint(path)
        capsys.readouterr()
        again.print_groups()
        peaks = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if ": weights" in line]
        assert peaks == [f"{2e-4 * 0.75**distance:.3g}" for distance in range(8)]

    def test_what_differs_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.saved(self.trainer(initial_lr=2e-3, warmup_fraction=0.1, seed=3))
        again = self.trainer(warmup_fraction=0.1, num_epochs=7)
        capsys.readouterr()
        again.load_checkpoint(path)
        said = capsys.readouterr().out
        assert "not that of the checkpoint: initial_lr 0.0001 (there: 0.002). To go on as before: " in said
        assert said.count("HYSPARK_") == 1 and "HYSPARK_INITIAL_LR=0.002\n" in said

    def test_weights_that_mean_something_else_are_refused(self) -> None:
        path = self.saved(self.trainer(HySparKPretrainTrainer, standardise_targets=False))
        with pytest.raises(
            ValueError, match=r"standardise_targets no, .* says yes; set HYSPARK_STANDARDISE_TARGETS=no"
        ):
            self.trainer(HySparKPretrainTrainer).load_checkpoint(path)

    def test_the_best_is_the_best_after_a_training_that_was_to_continue_and_found_nothing(self) -> None:
        """``--c --val_best`` in an empty folder, as a script for a queue has it."""
        trainer = self.trainer(going_on=True)
        trainer.begin()
        best, _ = self.saved(trainer, BEST, 1), self.saved(trainer, FINAL, 2)
        trainer.load_checkpoint(best)
        assert trainer.current_epoch == 1


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


@pytest.mark.parametrize(
    ("trainer_class", "compiled"), [(HySparKPretrainTrainer, False), (HySparKFinetuneTrainer, True)]
)
def test_networks_with_batchnorm_are_not_compiled_over_several_gpus(
    trainer_class, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_compile", raising=False)
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))
    trainer.network = trainer_class.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 2
    )
    trainer.device = torch.device("cuda")  # nnU-Net compiles nowhere else
    assert trainer._do_i_compile()
    trainer.is_ddp = True
    assert trainer._do_i_compile()  # torchrun with one process
    monkeypatch.setattr("hyspark_nnunet.training.distributed.world_size", lambda: 2)
    assert trainer._do_i_compile() == compiled
