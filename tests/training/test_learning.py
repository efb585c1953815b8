"""Steps of the pre-trainer on made patches: the loss falls, the weights move, masks are as they should be."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.training.hyspark import HySparKPretrainTrainer
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.stepping import NonFiniteLoss
from tests.host_reads import HostReads
from tests.nnunet_plans import CUBIC, make_plans
from tests.training.conftest import make_trainer


@pytest.fixture
def trainer(request: pytest.FixtureRequest) -> HySparKPretrainTrainer:
    """A trainer with a network, as ``initialize`` makes it, but without a dataset; fields of its recipe by param."""
    recipe = {
        "preset": "S",
        "num_epochs": 2,
        "num_iterations_per_epoch": 60,
        "warmup_fraction": 0.0,
        "pretrain": {"seed": 5, "decoder_width": 32, "initial_lr": 5e-3} | getattr(request, "param", {}),
    }
    plans = make_plans([16, 16, 16], CUBIC, hyspark=recipe)
    trainer = make_trainer(HySparKPretrainTrainer, plans)
    trainer._write_recipe_to_plans()
    torch.manual_seed(0)
    trainer.network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)
    trainer.reset_optimizer()
    trainer.loss = trainer._build_loss()
    return trainer


def smooth_patches() -> torch.Tensor:
    """Patches a network can learn to continue: waves along the axes."""
    axis = torch.linspace(0, 12, 16)
    wave = axis.sin()[:, None, None] + (axis / 2).cos()[:, None] + axis
    return torch.stack([wave, 2 * wave.flip(0)])[:, None]


def test_training_lowers_the_loss_and_moves_every_weight(trainer: HySparKPretrainTrainer) -> None:
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.on_train_epoch_start()
    losses = [float(trainer.train_step({"data": smooth_patches()})["loss"]) for _ in range(60)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(dict(trainer.network.named_parameters()))


@pytest.mark.parametrize("trainer", [{"intensity_augmentation": "input"}], indirect=True)
def test_the_clean_image_is_rebuilt_from_the_altered_one(trainer: HySparKPretrainTrainer) -> None:
    """The loss is against the target of the batch, and falls though the input says nothing of its scale."""
    trainer.on_train_epoch_start()
    altered, clean = smooth_patches().neg(), smooth_patches()
    losses = [float(trainer.train_step({"data": altered, "target": clean})["loss"]) for _ in range(60)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    trainer.network.eval()
    visible = sample_visible(2, trainer.grid, 0.75, torch.Generator().manual_seed(0))
    assert trainer._loss_of(altered, visible, clean) < trainer._loss_of(altered, visible)


@pytest.mark.parametrize("trainer", [{"standardise_targets": False}], indirect=True)
def test_without_standardising_the_reconstruction_is_in_intensities(trainer: HySparKPretrainTrainer) -> None:
    zero, visible = torch.zeros(2, 1, 16, 16, 16), torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[:, :, 0] = True
    image = torch.full_like(zero, 3.0)
    assert trainer.loss(zero, image, visible).item() == pytest.approx(9)


@pytest.mark.parametrize("trainer", [{"mask_block": 2}], indirect=True)
def test_masks_of_a_trainer_are_of_blocks(trainer: HySparKPretrainTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def record(*args: object, **kwargs: int) -> torch.Tensor:
        drawn.append(kwargs["block"])
        return sample_visible(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("hyspark_nnunet.training.pretrain.sample_visible", record)
    trainer.on_train_epoch_start()
    trainer.train_step({"data": smooth_patches()})
    assert drawn == [2]


def test_the_learning_rate_moves_with_every_step(trainer: HySparKPretrainTrainer) -> None:
    trainer.on_train_epoch_start()
    rates = []
    for _ in range(3):
        trainer.train_step({"data": smooth_patches()})
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] > rates[1] > rates[2]


def test_masks_differ_between_steps_epochs_and_ranks_and_repeat_when_continued(
    trainer: HySparKPretrainTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def masks(epoch: int, rank: int = 0) -> list[torch.Tensor]:
        trainer.current_epoch = epoch
        with monkeypatch.context() as process:
            process.setattr("hyspark_nnunet.training.loop.global_rank", lambda: rank)
            trainer.on_train_epoch_start()
        return [sample_visible(2, trainer.grid, 0.75, trainer.mask_generator) for _ in range(4)]

    first, second, other_rank = masks(0), masks(1), masks(1, rank=1)
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, other_rank, strict=True))
    trainer.logger.local_logger.my_fantastic_logging["lrs"].pop()
    assert all(torch.equal(a, b) for a, b in zip(masks(1), second, strict=True))


def test_accumulated_gradients_are_those_of_the_larger_batch(trainer: HySparKPretrainTrainer) -> None:
    """Three batches, float64, BatchNorm in eval."""
    trainer.on_train_epoch_start()
    trainer.network.double().eval()
    generator = torch.Generator().manual_seed(2)
    batches = [{"data": torch.randn(2, 1, 16, 16, 16, generator=generator).double()} for _ in range(3)]
    state = trainer.mask_generator.get_state()
    joint = copy.deepcopy(trainer.network)
    masks = torch.cat([sample_visible(2, trainer.grid, 0.75, trainer.mask_generator) for _ in batches])
    images = torch.cat([batch["data"] for batch in batches])
    loss = reconstruction_loss(joint(images, masks, trainer.num_visible), images, masks)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(joint.parameters(), trainer.recipe.gradient_clip)
    trainer.mask_generator.set_state(state)
    assert trainer.train_step(*batches)["loss"] == pytest.approx(float(loss), rel=1e-6)
    for (name, one), (_, other) in zip(joint.named_parameters(), trainer.network.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_a_step_that_is_not_finite_leaves_nothing_behind(trainer: HySparKPretrainTrainer) -> None:
    """Also where only the second of two batches is not: neither weights nor moments nor BatchNorm's statistics."""
    trainer.on_train_epoch_start()
    trainer.train_step({"data": smooth_patches()})
    before = copy.deepcopy((trainer.network.state_dict(), trainer.optimizer.state_dict()["state"]))
    broken = {"data": smooth_patches().index_fill(0, torch.tensor(1), float("nan")), "keys": ["a", "b"]}
    for skipped in (1, 2):
        assert np.isnan(trainer.train_step({"data": smooth_patches(), "keys": ["c", "d"]}, broken)["loss"])
        assert trainer._nonfinite_in_row == skipped
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, before[0][name]), name
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[name], before[1][number][name]) for name in moments)
    trainer.train_step({"data": smooth_patches()})
    assert trainer._nonfinite_in_row == 0


def test_infinite_gradients_end_a_training_once_the_gradient_scale_is_low(
    trainer: HySparKPretrainTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new scaler skips its first steps because its scale is too large: these do not count."""
    trainer.on_train_epoch_start()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8)
    trainer.recipe = dataclasses.replace(trainer.recipe, max_nonfinite_steps=1)
    monkeypatch.setattr(trainer, "_write_inside_epoch", lambda state: None)
    before, batch_loss = copy.deepcopy(trainer.network.state_dict()), trainer.batch_loss

    def overflowing(batch: dict) -> torch.Tensor:
        loss = batch_loss(batch)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(trainer, "batch_loss", overflowing)
    counted = []
    for _ in range(4):
        assert np.isnan(trainer.train_step({"data": smooth_patches()})["loss"])
        counted.append((trainer._nonfinite_in_row, trainer.grad_scaler.get_scale()))
    assert counted == [(0, 4), (0, 2), (0, 1), (1, 0.5)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())
    with pytest.raises(NonFiniteLoss, match="in 2 consecutive steps, more than max_nonfinite_steps 1"):
        trainer.train_step({"data": smooth_patches()})


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=1)])
def test_a_step_waits_for_the_device_once(trainer: HySparKPretrainTrainer, scaler) -> None:
    trainer.on_train_epoch_start()
    trainer.grad_scaler = scaler
    # AdamW reads the number of its step, which is on the CPU in any case
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.1)
    trainer.advance_schedule = lambda: None
    with HostReads() as reads:
        assert np.isfinite(trainer.train_step({"data": smooth_patches()}, {"data": smooth_patches()})["loss"])
    assert reads.count == 1
