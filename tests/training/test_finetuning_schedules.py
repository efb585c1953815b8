"""Learning rates of fine-tuning: the recipe's fields as the trainer acts on them; the curves: test_schedules.py."""

import copy
import re
from typing import Any

import pytest
import torch

from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer
from hyspark_nnunet.training.resuming import group_mismatch
from hyspark_nnunet.training.stepping import take_step
from tests.nnunet_plans import CUBIC, make_plans
from tests.training.conftest import make_trainer


class TestFinetuningSchedules:
    """The recipe's fields as the trainer acts on them; the schedules themselves: test_optimization.py."""

    def trainer(self, **fields):
        section = {"preset": "S", "num_epochs": 10, "warmup_fraction": 0.0, "finetune": fields}
        trainer = make_trainer(HySparKFinetuneTrainer, make_plans([16, 16, 16], CUBIC, hyspark=section))
        plans, settings = trainer.plans_manager, trainer.configuration_manager
        trainer.network = HySparKFinetuneTrainer.build_network_architecture(plans, settings, 1, 2)
        trainer.reset_optimizer()
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

    def test_frozen_beyond_the_warm_up_of_the_decoder(self) -> None:
        trainer = self.trainer(encoder_hold_epochs=6, decoder_warmup_epochs=2)
        assert self.rates(trainer, 1) == {"decoder": pytest.approx(1e-4 * 1.005 / 2), "encoder": 0}
        assert self.rates(trainer, 2) == {"decoder": pytest.approx(1e-4), "encoder": 0}
        late = self.rates(trainer, 7)
        assert late["encoder"] == late["decoder"] > 0
        notes = trainer.group_notes()["encoder"]
        assert notes == "frozen for 2 epochs while the decoder warms up, frozen for 6 epochs"

    def test_frozen_for_longer_than_the_schedule_that_is_continued(self) -> None:
        """The recipe's own check knows the new length only."""
        trainer = self.trainer(encoder_hold_epochs=6, num_epochs=20)
        assert "stay frozen for 6 epochs" in trainer.schedule_mismatch(5) and "made for 5: set fewer" in (
            trainer.schedule_mismatch(5)
        )
        assert trainer.schedule_mismatch(7) is None

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
        trainer.on_pretrained_weights_loaded(self.report(trainer, at_random="encoder.stages.3."))
        rates = self.rate_of_layers(trainer)
        # stem, four stages, two transformer blocks
        assert rates["decoder"] == 1 and rates["transformer block 1"] == 0.5 and rates["stem"] == 0.5**7
        assert rates["stage 3"] == 1  # new, unlike the layers around it
        trainer.on_pretrained_weights_loaded(self.report(trainer, adapted="encoder.stem."))
        rates = self.rate_of_layers(trainer)
        assert rates["stem"] == 1 and rates["stage 0"] == 0.5**6
        trainer.lr_scheduler.step(5)  # the schedule is that of the new groups
        lrs = {group["name"].partition(":")[0]: group["lr"] for group in trainer.optimizer.param_groups}
        assert lrs["transformer block 1"] == pytest.approx(0.5 * lrs["decoder"]) and lrs["decoder"] < 1e-4

    @pytest.mark.parametrize("fields", [{}, {"layer_decay": 0.75}, {"layer_decay": 1.0}])
    def test_a_continued_training_keeps_the_rates_of_layers(self, fields: dict[str, float]) -> None:
        for with_weights in (False, True):
            trainer, again = (self.trainer(**fields) for _ in range(2))
            if with_weights:
                trainer.on_pretrained_weights_loaded(self.report(trainer, at_random="encoder.stages.3."))
            checkpoint = {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
            again.on_load_checkpoint(checkpoint)
            assert group_mismatch(checkpoint, again.optimizer.param_groups) is None
            assert self.rate_of_layers(again) == pytest.approx(self.rate_of_layers(trainer))

    def test_a_continued_training_takes_a_decay_that_is_set_now(self) -> None:
        trainer, again = self.trainer(layer_decay=0.5), self.trainer(layer_decay=0.75)
        again.on_load_checkpoint(
            {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
        )
        assert self.rate_of_layers(again)["transformer block 1"] == 0.75

    def test_new_layers_keep_the_whole_rate_under_a_decay_that_is_set_now(self) -> None:
        trainer, again = self.trainer(), self.trainer(layer_decay=0.75)
        trainer.on_pretrained_weights_loaded(self.report(trainer, at_random="encoder.stages.3."))
        checkpoint = {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
        again.on_load_checkpoint(checkpoint)
        assert group_mismatch(checkpoint, again.optimizer.param_groups) is None
        rates = self.rate_of_layers(again)
        assert rates["stage 3"] == 1
        assert (rates["transformer block 0"], rates["stage 2"]) == pytest.approx((0.75**2, 0.75**4))

    def test_a_decay_that_was_set_and_is_no_longer_is_asked_for(self) -> None:
        trainer, again = self.trainer(layer_decay=0.75), self.trainer()
        checkpoint = {"optimizer_state": trainer.optimizer.state_dict(), "recipe": trainer.recipe.as_dict()}
        again.on_load_checkpoint(checkpoint)
        assert "set layer_decay" in group_mismatch(checkpoint, again.optimizer.param_groups)

    def test_names_of_a_compiled_network(self) -> None:
        trainer = self.trainer()
        trainer.network = torch.compile(trainer.network)
        groups = trainer.parameter_groups()
        assert [group["name"] for group in groups] == ["weights", "norms, biases, mask tokens"]
        trainer.recipe = type(trainer.recipe)(layer_decay=0.5)
        assert {group["part"] for group in trainer.parameter_groups()} == {"encoder", "decoder"}

    def test_other_groups_are_not_continued(self) -> None:
        trainer, other = self.trainer(), self.trainer(layer_decay=0.5)
        message = group_mismatch({"optimizer_state": trainer.optimizer.state_dict()}, other.optimizer.param_groups)
        assert re.search("groups weights, norms.* this recipe gives decoder: weights.*layer_decay", message)
        assert group_mismatch({"optimizer_state": other.optimizer.state_dict()}, other.optimizer.param_groups) is None

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
            taken = take_step(
                trainer.network,
                trainer.optimizer,
                scaler,
                lambda _: sum(p.sum() for p in other) * 1e-4 + factor * sum(p.sum() for p in encoder),
                [{}],
                1.0,
                trainer.drop_gradients,
            ).taken
            gradients = [float(p.grad.abs().max()) for p in other if p.grad is not None]
            trainer.optimizer.load_state_dict(state)
            return taken, gradients

        expected = [pytest.approx(1e-4)] * len(other)
        assert step(0) == step(1e6) == (True, expected)
        # at a rate of zero for all, which a warm-up begins with, a gradient scaler needs gradients
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0
        assert step(1, torch.amp.GradScaler("cpu"))[0]
