"""Held-out patches and masks are the same in every epoch; whole cases are covered."""

import numpy as np
import pytest
import torch

from hyspark_nnunet.training.case_reconstruction import cases_to_reconstruct, reconstruct_case
from hyspark_nnunet.training.data.held_out import HeldOutPatches, fixed_mask


class RandomLoader:
    """Draws from NumPy's global generator, as nnU-Net's loader does."""

    def generate_train_batch(self) -> dict:
        image = torch.from_numpy(np.random.rand(2, 1, 4, 4, 4).astype(np.float32))
        return {"data": image, "target": None, "keys": [f"case_{np.random.randint(3)}" for _ in range(2)]}


def make(rank: int = 0) -> HeldOutPatches:
    return HeldOutPatches(RandomLoader(), 5, (2, 2, 2), 0.75, rank)


def epoch(patches: HeldOutPatches) -> list[dict]:
    patches.restart()
    return [next(patches) for _ in range(5)]


def test_every_epoch_and_every_run_sees_the_same() -> None:
    np.random.seed(3)
    patches = make()
    first, second = epoch(patches), epoch(patches)
    np.random.seed(4)
    again = epoch(make())
    for a, b, c in zip(first, second, again, strict=True):
        for other in (b, c):
            assert torch.equal(a["data"], other["data"]) and torch.equal(a["visible"], other["visible"])
    assert not torch.equal(first[0]["visible"], first[1]["visible"])


def test_ranks_see_other_patches_under_the_same_masks() -> None:
    for mine, theirs in zip(epoch(make(0)), epoch(make(1)), strict=True):
        assert not torch.equal(mine["data"], theirs["data"])
        assert torch.equal(mine["visible"], theirs["visible"])


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    make()
    assert np.random.rand() == expected


class OftenNotFinite(RandomLoader):
    """Of every batch the first patch, and of some both, are of a case with a voxel that is not finite."""

    def __init__(self, both_of: int) -> None:
        self.both_of, self.drawn = both_of, 0

    def generate_train_batch(self) -> dict:
        batch = super().generate_train_batch()
        self.drawn += 1
        for index in range(2 if self.drawn % self.both_of == 0 else 1):
            batch["data"][index, 0, 0, 0, 0] = (np.nan, np.inf)[index]
            batch["keys"][index] = f"broken_{index}"
        return batch


def test_patches_that_are_not_finite_are_drawn_again() -> None:
    patches = HeldOutPatches(OftenNotFinite(3), 5, (2, 2, 2), 0.75)
    assert patches.not_finite == {"broken_0", "broken_1"}
    for batch in epoch(patches):
        assert batch["data"].shape == (2, 1, 4, 4, 4) and batch["data"].isfinite().all()
        assert len(batch["keys"]) == 2 and not patches.not_finite & set(batch["keys"])
    with pytest.raises(ValueError, match=r"cases with such voxels: broken_0, broken_1\. See: hyspark_nnunet dataset"):
        HeldOutPatches(OftenNotFinite(1), 5, (2, 2, 2), 0.75)


def test_examples_are_of_different_cases_first() -> None:
    patches = make()
    names = [example.case for example in patches.examples(10)]
    different = len(set(names))
    assert len(names) == 10 and len(set(names[:different])) == different
    assert patches.examples(0) == []


def test_voxels_with_the_ignore_label_are_kept_with_their_patch() -> None:
    class Labelled(OftenNotFinite):
        def generate_train_batch(self) -> dict:
            batch = super().generate_train_batch()
            return batch | {"target": (batch["data"] > 0.6).to(torch.int16) * 3}

    patches = HeldOutPatches(Labelled(3), 5, (2, 2, 2), 0.75, ignore_label=3)
    for batch in patches.batches:
        assert torch.equal(batch["counted"], batch["data"] <= 0.6)
    _, image, _, counted = patches.examples(1)[0]
    assert torch.equal(counted, image <= 0.6)


@pytest.mark.parametrize("size", [(8, 8, 8), (3, 8, 9)])
def test_ignored_voxels_do_not_change_the_result_of_a_case(size: tuple) -> None:
    image = torch.rand(1, *size)
    counted = torch.rand(1, *size) < 0.6
    counted[:, :, :4] = False  # whole units

    def reconstruct(patch: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(patch)

    spoilt = torch.where(counted, image, 1e6)
    arguments = ((8, 8, 8), (4, 4, 4), 0.75, reconstruct)
    first, second = (reconstruct_case(volume, *arguments, counted=counted) for volume in (image, spoilt))
    assert first.metrics == pytest.approx(second.metrics) and 0.2 < first.loss <= 1
    assert first.counted is not None and first.counted.shape == (1, 8, 8, 8)


def test_a_case_without_a_hidden_voxel_that_counts_has_no_result() -> None:
    image, counted = torch.rand(1, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    case = reconstruct_case(
        image, (8, 8, 8), (4, 4, 4), 0.75, lambda patch, _: torch.zeros_like(patch), counted=counted
    )
    assert case is None


@pytest.mark.parametrize("size", [(8, 8, 8), (20, 8, 13), (3, 8, 9)])
def test_a_case_is_covered(size: tuple) -> None:
    image, seen = torch.rand(2, *size), []

    def reconstruct(patch: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        seen.append((patch, visible))
        return torch.zeros_like(patch)

    case = reconstruct_case(image, (8, 8, 8), (4, 4, 4), 0.75, reconstruct)
    assert case.n_patches == len(seen) == int(np.prod([max(1, -(-n // 8)) for n in size]))
    covered = {round(value.item(), 6) for patch, _ in seen for value in patch[0].flatten()}
    assert {round(value.item(), 6) for value in image[0].flatten()} <= covered
    for index, (patch, visible) in enumerate(seen):
        assert patch.shape == (2, 8, 8, 8) and torch.equal(visible, fixed_mask(index, 1, (2, 2, 2), 0.75)[0])
    # zeros are every unit's mean: a loss of one but for the unbiased variance and padded units
    full = 1 - 1 / 4**3
    assert case.loss == pytest.approx(full, abs=1e-3) if min(size) >= 8 else case.loss < full + 1e-3
    # the deviation from the units' means, over hidden units
    deviations = []
    for patch, visible in seen:
        units = patch.view(2, 2, 4, 2, 4, 2, 4)
        deviation = (units - units.mean((2, 4, 6), keepdim=True)).abs().mean((2, 4, 6))
        deviations.append(deviation[:, ~visible[0]].mean().item())
    assert case.mean_absolute_error == pytest.approx(np.mean(deviations), rel=1e-4)


def test_the_cases_of_the_last_validation_are_the_same_in_every_run() -> None:
    cases = [f"case{number}" for number in range(20)]
    some = cases_to_reconstruct(cases, 5)
    assert some == cases_to_reconstruct(cases[::-1], 5) == sorted(set(some)) and len(some) == 5
    assert cases_to_reconstruct(cases, 0) == []
    assert cases_to_reconstruct(cases, None) == cases_to_reconstruct(cases, 20) == sorted(cases)


def test_a_volume_is_covered_slice_by_slice() -> None:
    image, seen = torch.rand(2, 3, 8, 12), []

    def reconstruct(patch: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        seen.append(patch)
        return torch.zeros_like(patch)

    case = reconstruct_case(image, (8, 8), (4, 4), 0.75, reconstruct)
    assert case.n_patches == len(seen) == 3 * 2 and case.image.shape == (2, 8, 8) and case.visible.shape == (1, 2, 2)
    for index, patch in enumerate(seen):
        start = 4 * (index % 2)
        assert torch.equal(patch, image[:, index // 2, :, start : start + 8])
