"""Schedules: their values at the start, at the end of the warm-up and at the end, and what the scheduler sets."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from hyspark_nnunet.training.schedules import (
    COSINE_END,
    WARMUP_START,
    ProgressScheduler,
    cosine_between,
    warmup_cosine,
    warmup_polynomial,
)

WARMUPS = [0.0, 0.05, 0.4, 0.9]
CURVES = {"cosine": (warmup_cosine, COSINE_END), "polynomial": (warmup_polynomial, 0.0)}


def optimizer(*groups: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW with a group for each (learning rate, weight decay)."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in groups]
    return torch.optim.AdamW(
        [{"params": [p], "lr": lr, "weight_decay": wd} for p, (lr, wd) in zip(parameters, groups, strict=True)]
    )


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("curve", CURVES)
class TestLearningRateFactor:
    def test_starts_small_peaks_after_the_warm_up_and_ends_low(self, curve, warmup):
        factor, end = CURVES[curve]
        assert factor(0.0, warmup) == pytest.approx(WARMUP_START if warmup else 1.0)
        assert factor(warmup, warmup) == pytest.approx(1.0)
        assert factor(1.0, warmup) == pytest.approx(end)

    def test_rises_then_falls(self, curve, warmup):
        factor, _ = CURVES[curve]
        for earlier, later in pairwise(i / 200 for i in range(201)):
            if later <= warmup:
                assert factor(earlier, warmup) < factor(later, warmup)
            elif earlier >= warmup:
                assert factor(earlier, warmup) > factor(later, warmup)

    def test_has_no_jump(self, curve, warmup):
        factor, _ = CURVES[curve]
        assert factor(max(warmup - 1e-9, 0.0), warmup) == pytest.approx(factor(warmup + 1e-9, warmup), abs=1e-6)


@pytest.mark.parametrize("warmup", WARMUPS[1:])
@pytest.mark.parametrize("curve", CURVES)
def test_is_a_line_while_warming_up(curve, warmup):
    factor, _ = CURVES[curve]
    assert factor(warmup / 2, warmup) == pytest.approx((1 + WARMUP_START) / 2)


def test_cosine_is_halfway_between_the_warm_up_and_the_end():
    assert warmup_cosine(0.7, 0.4) == pytest.approx((1 + COSINE_END) / 2)


@pytest.mark.parametrize("epoch", [0, 1, 500, 999])
def test_polynomial_without_warm_up_is_nnunets(epoch):
    ours, theirs = optimizer((0.01, 0.0)), optimizer((0.01, 0.0))
    ProgressScheduler(ours, 1000, partial(warmup_polynomial, warmup_fraction=0.0)).step(epoch)
    PolyLRScheduler(theirs, 0.01, 1000).step(epoch)
    assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.04), (0.5, 0.12), (1.0, 0.2), (0.25, 0.12 - 0.08 * 0.5**0.5)]
)
def test_weight_decay_rises_on_half_a_cosine(progress, expected):
    assert cosine_between(progress, 0.04, 0.2) == pytest.approx(expected)


class TestProgressScheduler:
    def test_sets_every_group_by_its_own_peak(self):
        opt = optimizer((1e-4, 0.04), (1e-2, 0.04))
        ProgressScheduler(opt, 10, lambda progress: 1 - progress).step(2.5)
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.75e-4, 0.75e-2])
        assert [g["initial_lr"] for g in opt.param_groups] == [1e-4, 1e-2]

    def test_starts_at_the_first_epoch(self):
        opt = optimizer((1e-4, 0.04))
        ProgressScheduler(opt, 10, partial(warmup_cosine, warmup_fraction=0.4), lambda progress: 0.1)
        assert opt.param_groups[0]["lr"] == pytest.approx(1e-4 * WARMUP_START)
        assert opt.param_groups[0]["weight_decay"] == 0.1

    def test_groups_without_weight_decay_stay_without(self):
        opt = optimizer((1e-4, 0.04), (1e-4, 0.0))
        scheduler = ProgressScheduler(opt, 10, lambda progress: 1.0, partial(cosine_between, start=0.04, end=0.2))
        for epoch, expected in [(0, 0.04), (5, 0.12), (10, 0.2)]:
            scheduler.step(epoch)
            assert [g["weight_decay"] for g in opt.param_groups] == pytest.approx([expected, 0.0])

    def test_a_weight_decay_that_passes_zero_comes_back(self):
        opt = optimizer((1e-4, 0.04))
        scheduler = ProgressScheduler(opt, 10, lambda progress: 1.0, lambda progress: abs(progress - 0.5))
        scheduler.step(5)
        assert opt.param_groups[0]["weight_decay"] == 0
        scheduler.step(10)
        assert opt.param_groups[0]["weight_decay"] == 0.5

    def test_without_a_schedule_weight_decay_stays(self):
        opt = optimizer((1e-4, 0.04))
        ProgressScheduler(opt, 10, lambda progress: 1.0).step(5)
        assert opt.param_groups[0]["weight_decay"] == 0.04

    @pytest.mark.parametrize(("epoch", "progress"), [(-1, 0.0), (0, 0.0), (12, 1.0)])
    def test_progress_stays_in_range(self, epoch, progress):
        seen = []
        scheduler = ProgressScheduler(optimizer((1e-4, 0.0)), 10, lambda value: seen.append(value) or 1.0)
        scheduler.step(epoch)
        assert seen[-1] == progress

    def test_a_continued_training_stays_on_the_curve(self):
        factor = partial(warmup_cosine, warmup_fraction=0.4)
        first, second = optimizer((1e-4, 0.04)), optimizer((1e-4, 0.04))
        schedule = ProgressScheduler(first, 10, factor)
        continued = ProgressScheduler(second, 10, factor)
        schedule.step(6)
        second.load_state_dict(first.state_dict())
        schedule.step(7.5)
        continued.step(7.5)
        assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]

    def test_the_learning_rate_in_force_wins_over_the_one_of_a_checkpoint(self):
        before, now = optimizer((1e-4, 0.04)), optimizer((1e-3, 0.04))
        ProgressScheduler(before, 10, lambda progress: 1.0)
        scheduler = ProgressScheduler(now, 10, lambda progress: 1.0)
        now.load_state_dict(before.state_dict())
        scheduler.step(3)
        assert now.param_groups[0]["lr"] == 1e-3

    def test_a_weight_decay_of_zero_wins_over_the_one_of_a_checkpoint(self):
        before, now = optimizer((1e-3, 0.04)), optimizer((1e-3, 0.0))
        scheduler = ProgressScheduler(now, 10, lambda progress: 1.0, lambda progress: 0.0)
        now.load_state_dict(before.state_dict())
        scheduler.step(3)
        assert now.param_groups[0]["weight_decay"] == 0

    def test_a_second_scheduler_starts_from_the_same_peak(self):
        opt = optimizer((1e-4, 0.04))
        ProgressScheduler(opt, 10, lambda progress: 0.1)
        ProgressScheduler(opt, 10, lambda progress: 1.0)
        assert opt.param_groups[0]["lr"] == 1e-4

    def test_refuses_a_training_without_epochs(self):
        with pytest.raises(ValueError, match="num_epochs is 0, but a schedule needs at least 1 epoch"):
            ProgressScheduler(optimizer((1e-4, 0.0)), 0, lambda progress: 1.0)


class TestContinuing:
    """The learning rate where a training is continued with another number of epochs."""

    def scheduler(self, num_epochs: int) -> ProgressScheduler:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3, weight_decay=0.04)
        curve, decay = partial(warmup_cosine, warmup_fraction=0.4), partial(cosine_between, start=0.04, end=0.2)
        return ProgressScheduler(optimizer, num_epochs, curve, decay)

    def values(self, scheduler: ProgressScheduler, epoch: float) -> tuple[float, float]:
        scheduler.step(epoch)
        group = scheduler.optimizer.param_groups[0]
        return group["lr"], group["weight_decay"]

    def test_with_the_same_number_nothing_changes(self):
        first, again = self.scheduler(10), self.scheduler(10)
        again.continue_from(first.state_dict(), 3.5)
        assert [self.values(again, e / 4) for e in range(41)] == [self.values(first, e / 4) for e in range(41)]

    @pytest.mark.parametrize("epoch", [0, 2.5, 4, 7.25, 10])
    def test_with_more_it_does_not_jump_and_ends_where_it_would_have(self, epoch):
        first, more, still_more = self.scheduler(10), self.scheduler(30), self.scheduler(50)
        more.continue_from(first.state_dict(), epoch)
        assert self.values(more, epoch) == pytest.approx(self.values(first, epoch), rel=1e-12)
        assert self.values(more, 30) == pytest.approx(self.values(first, 10))
        # and once again
        still_more.continue_from(more.state_dict(), 20)
        assert self.values(still_more, 20) == pytest.approx(self.values(more, 20), rel=1e-12)
        rates = [self.values(still_more, 20 + e / 100)[0] for e in range(3001)]
        # a warm-up stretched over 20 times the epochs of this one is the steepest there is
        assert max(abs(a - b) for a, b in zip(rates[1:], rates[:-1], strict=True)) < 1e-3 / 400

    def test_with_fewer_it_reaches_its_end_earlier(self):
        first, fewer = self.scheduler(10), self.scheduler(6)
        fewer.continue_from(first.state_dict(), 5)
        assert self.values(fewer, 5) == pytest.approx(self.values(first, 5))
        assert self.values(fewer, 6) == pytest.approx(self.values(first, 10))

    def test_beyond_the_end_it_stays_at_its_end(self):
        first, fewer = self.scheduler(10), self.scheduler(6)
        fewer.continue_from(first.state_dict(), 8)
        assert self.values(fewer, 8) == pytest.approx(self.values(first, 10))
