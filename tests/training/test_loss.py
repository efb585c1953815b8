"""The loss against the plain definition, unit by unit."""

import numpy as np
import pytest
import torch

from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.training.loss import loss_of_predicting_means, reconstruction_loss


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "grid"), [((8, 12, 4), (2, 3, 2)), ((6, 6), (3, 2))])
def test_against_numpy(channels: int, size: tuple, grid: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
    # channels of very different scale: each must be standardised on its own
    image *= torch.tensor([1.0, 50.0, 0.1], dtype=torch.float64)[:channels].view(1, -1, *[1] * len(size))
    reconstruction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    visible = sample_visible(2, grid, 0.6, generator)
    unit = [n // g for n, g in zip(size, grid, strict=True)]
    errors = []
    for sample in range(2):
        for place in np.ndindex(*grid):
            if visible[sample, 0][place]:
                continue
            block = tuple(slice(p * u, (p + 1) * u) for p, u in zip(place, unit, strict=True))
            per_channel = []
            for channel in range(channels):
                x, y = (a[sample, channel][block].numpy() for a in (image, reconstruction))
                per_channel.append(np.mean((y - (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6)) ** 2))
            errors.append(np.mean(per_channel))
    assert reconstruction_loss(reconstruction, image, visible).item() == pytest.approx(np.mean(errors), rel=1e-12)


def test_predicting_the_mean_gives_one() -> None:
    image = torch.randn(1, 1, 32, 32, 32)
    visible = sample_visible(1, (2, 2, 2), 0.75)
    loss = reconstruction_loss(torch.zeros_like(image), image, visible)
    assert loss.item() == pytest.approx(1 - 1 / 16**3, abs=1e-5)


def test_a_unit_without_structure_is_finite() -> None:
    image, visible = torch.zeros(1, 1, 4, 4, 4), sample_visible(1, (2, 2, 2), 0.75)
    prediction = torch.zeros_like(image, requires_grad=True)
    loss = reconstruction_loss(prediction, image, visible)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(prediction.grad).all()


def test_visible_units_do_not_count() -> None:
    image, visible = torch.randn(1, 1, 4, 4, 4), sample_visible(1, (2, 2, 2), 0.5)
    mask = visible
    for axis in (2, 3, 4):
        mask = mask.repeat_interleave(2, axis)
    zero = torch.zeros_like(image)
    spoilt = torch.where(mask, torch.tensor(float("nan")), zero)
    assert reconstruction_loss(spoilt, image, visible) == reconstruction_loss(zero, image, visible)


def test_targets_that_are_not_standardised_are_the_image() -> None:
    image, visible = 50 * torch.randn(2, 1, 4, 4, 4), sample_visible(2, (2, 2, 2), 0.5)
    assert reconstruction_loss(image, image, visible, standardised=False) == 0
    off = reconstruction_loss(image + 3, image, visible, standardised=False)
    assert off.item() == pytest.approx(9, rel=1e-4)
    assert reconstruction_loss(image, image, visible) > 1


@pytest.mark.parametrize(("standardised", "of_structure"), [(True, 1.0), (False, 9.0)])
def test_predicting_means(standardised: bool, of_structure: float) -> None:
    image = 3 * torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) + 7
    image[:, :, 8:] = 7.0  # blocks without structure, as in padding, have their mean everywhere
    visible = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    visible[:, :, 0, 0] = True
    found = loss_of_predicting_means(image, visible, standardised)
    # of six hidden blocks four are constant
    assert found == pytest.approx(of_structure / 3, rel=0.05)
    blocks = image.unfold(2, 8, 8).unfold(3, 8, 8).unfold(4, 8, 8)
    means = blocks.mean((-1, -2, -3)).repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    prediction = torch.zeros_like(image) if standardised else means
    assert found == pytest.approx(reconstruction_loss(prediction, image, visible, standardised).item(), rel=1e-5)


def with_ignored(size: tuple, grid: tuple) -> torch.Tensor:
    """Which voxels count: none of the first unit, one of the second, two thirds of the others."""
    counted = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(7)) < 0.67
    unit = [n // g for n, g in zip(size, grid, strict=True)]
    rest = tuple(slice(0, u) for u in unit[1:])
    counted[(slice(None), 0, slice(0, 2 * unit[0]), *rest)] = False
    counted[(slice(None), 0, unit[0], *[0] * len(rest))] = True
    return counted


@pytest.mark.parametrize("standardised", [True, False])
@pytest.mark.parametrize(("size", "grid"), [((8, 12, 4), (2, 3, 2)), ((6, 6), (3, 2))])
def test_ignored_voxels_against_numpy(size: tuple, grid: tuple, standardised: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, *size, generator=generator, dtype=torch.float64) * 30 + 5
    reconstruction = torch.randn(image.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    visible = sample_visible(2, grid, 0.6, generator)
    visible[:, 0, :2] = False  # the two special units are hidden
    counted = with_ignored(size, grid)
    # what does not count may be anything
    image = torch.where(counted, image, float("nan"))
    unit = [n // g for n, g in zip(size, grid, strict=True)]
    errors, judged = [], np.zeros(image.shape, dtype=bool)
    for sample in range(2):
        for place in np.ndindex(*grid):
            block = tuple(slice(p * u, (p + 1) * u) for p, u in zip(place, unit, strict=True))
            counts = counted[sample, 0][block].numpy()
            if visible[sample, 0][place] or not counts.any():
                continue
            per_channel = []
            for channel in range(2):
                judged[(sample, channel, *block)] = counts
                x, y = (a[sample, channel][block].detach().numpy()[counts] for a in (image, reconstruction))
                if standardised:
                    x = (x - x.mean()) / np.sqrt((x.var(ddof=1) if len(x) > 1 else 0) + 1e-6)
                per_channel.append(np.mean((y - x) ** 2))
            errors.append(np.mean(per_channel))
    loss = reconstruction_loss(reconstruction, image, visible, standardised, counted)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-12)
    loss.backward()
    assert ((reconstruction.grad != 0).numpy() == judged).all() and reconstruction.grad.isfinite().all()


def test_all_voxels_or_none_count() -> None:
    image, visible = torch.randn(2, 1, 8, 8, 8), sample_visible(2, (2, 2, 2), 0.5)
    prediction = torch.randn(image.shape, requires_grad=True)
    every = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    with_mask = reconstruction_loss(prediction, image, visible, counted=every)
    assert with_mask.item() == pytest.approx(reconstruction_loss(prediction, image, visible).item(), rel=1e-5)
    none = reconstruction_loss(prediction, image, visible, counted=~every)
    none.backward()
    assert none.item() == 0 and not prediction.grad.any()
    assert loss_of_predicting_means(image, visible, counted=~every) == 0
    assert loss_of_predicting_means(image, visible, counted=every) == pytest.approx(
        loss_of_predicting_means(image, visible), rel=1e-5
    )
    some = torch.rand(every.shape) < 0.5
    means = loss_of_predicting_means(image, visible, counted=some)
    zero = reconstruction_loss(torch.zeros_like(image), image, visible, counted=some)
    assert means == pytest.approx(zero.item(), rel=1e-5)
