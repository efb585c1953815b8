"""The two ways through the encoder, on several geometries."""

from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

from benchmarks.dense_baseline import dense_features
from hyspark_nnunet.building_blocks.encoder import HybridEncoder
from hyspark_nnunet.building_blocks.visible_units import VisibleUnits, from_units, halo_index, to_units
from hyspark_nnunet.masking import mask_grid, sample_visible, view_at
from tests.small_networks import small_arguments


def make_encoder(geometry, dtype: torch.dtype = torch.float64) -> HybridEncoder:
    torch.manual_seed(0)
    arguments = geometry.arguments()
    del arguments["conv_op"]
    encoder = HybridEncoder(**arguments).to(dtype)
    # biases and norms at zero would hide a leak of a bias
    for parameter in encoder.parameters():
        if parameter.ndim <= 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def make_batch(geometry, encoder: HybridEncoder, batch_size: int, ratio: float = 0.7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = encoder.stem.weight.dtype
    image = torch.randn(batch_size, geometry.input_channels, *geometry.image_size, generator=generator, dtype=dtype)
    return image, sample_visible(batch_size, mask_grid(geometry.image_size, encoder.unit), ratio, generator)


def hide(image: Tensor, visible: Tensor, encoder: HybridEncoder, value: Tensor | float) -> Tensor:
    return torch.where(view_at(visible, encoder.unit), image, torch.as_tensor(value, dtype=image.dtype))


@pytest.mark.parametrize("value", ["noise", float("nan"), float("inf"), 1e30])
def test_hidden_voxels_do_not_leak(geometry, value) -> None:
    encoder = make_encoder(geometry, torch.float32)
    image, visible = make_batch(geometry, encoder, 2)
    value = torch.randn_like(image) * 100 if value == "noise" else value
    changed = hide(image, visible, encoder, value)
    assert not torch.equal(image, changed)
    before, after = encoder(image, visible), encoder(changed, visible)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.isfinite(a).all() and a.abs().sum() > 0
        assert torch.equal(a, b), f"feature {i} changed"


def test_visible_voxels_do_matter(geometry) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 2)
    changed = torch.where(view_at(visible, encoder.unit), image + 1, image)
    assert all(not torch.equal(a, b) for a, b in zip(encoder(image, visible), encoder(changed, visible), strict=True))


def test_visible_blocks_equal_the_dense_baseline(geometry) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 3)
    outcomes = []
    for way in (encoder, partial(dense_features, encoder)):
        encoder.zero_grad()
        features = way(image, visible)
        sum((f * torch.cos(f.detach())).sum() for f in features).backward()
        outcomes.append((features, [p.grad.clone() for p in encoder.parameters()]))
    for ours, dense in zip(*[o[0] for o in outcomes], strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
    for ours, dense in zip(*[o[1] for o in outcomes], strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)


def test_hidden_positions_of_the_features_are_zero(geometry) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 2)
    for feature in encoder(image, visible):
        block = [n // g for n, g in zip(feature.shape[2:], visible.shape[2:], strict=True)]
        assert torch.where(view_at(visible, block), 0, feature).abs().max() == 0


@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_equals_its_samples(geometry, masked: bool) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 3)
    together = encoder(image, visible if masked else None)
    for i in range(3):
        alone = encoder(image[i : i + 1], visible[i : i + 1] if masked else None)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-10, atol=1e-10)


def test_everything_visible_equals_the_dense_encoder(geometry) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 2)
    for a, b in zip(encoder(image, torch.ones_like(visible)), encoder(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_features_have_the_strides_and_channels_of_the_plan(geometry) -> None:
    encoder = make_encoder(geometry)
    image, _ = make_batch(geometry, encoder, 1)
    size = torch.tensor(geometry.image_size)
    for feature, channels, stride in zip(encoder(image), encoder.output_channels, geometry.strides, strict=True):
        size = size // torch.tensor(stride)
        assert feature.shape == (1, channels, *size.tolist())


def test_a_known_number_of_visible_units_changes_nothing(geometry) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 2)
    known = encoder.features(image, visible, num_visible=int(visible[0].sum()))
    for a, b in zip(known, encoder(image, visible), strict=True):
        assert torch.equal(a.image(), b)


def test_units_are_cut_and_put_together() -> None:
    field = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    units = to_units(field, (2, 3))
    assert units.shape == (2, 4, 2, 3, 3)
    assert torch.equal(units[1, 3], field[1, 2:, 3:])
    assert torch.equal(from_units(units, (2, 2)), field)


def test_kernel_beyond_the_neighbours() -> None:
    neighbours = VisibleUnits(torch.ones(1, 1, 2, 2, dtype=torch.bool)).neighbours()
    with pytest.raises(ValueError, match=r"kernel \(7, 3\) reaches beyond the neighbours of blocks of \(2, 2\)"):
        halo_index(neighbours, (2, 2), (7, 3))


def test_samples_with_different_numbers_of_visible_units() -> None:
    visible = torch.tensor([[True, False], [True, True]]).view(2, 1, 1, 2)
    with pytest.raises(ValueError, match=r"same number of visible units, at least one; got \[1, 2\]"):
        VisibleUnits(visible)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_stages": 1}, "n_stages is 1, but HySparK needs at least 2"),
        ({"features_per_stage": (4, 8, 8)}, "features_per_stage has 3 entries, but n_stages is 2"),
        ({"strides": ((2, 2, 2), (2, 2, 2))}, r"first stage's stride is \(2, 2, 2\)"),
        ({"kernel_sizes": ((2, 2, 2), (3, 3, 3))}, r"kernel size \(2, 2, 2\) is even"),
        ({"vit_num_heads": None}, "the last stage has 6 channels, no multiple of the head size 32"),
        ({"vit_num_heads": 4}, "4 attention heads do not divide 6 channels"),
        ({"features_per_stage": (4, 4), "vit_num_heads": 1}, "4 channels cannot hold positions on 3 axes"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    arguments = small_arguments(2, vit_n_blocks=1, vit_num_heads=1)
    del arguments["conv_op"]
    with pytest.raises(ValueError, match=message):
        HybridEncoder(**(arguments | change))(torch.zeros(1, 1, 4, 4, 4))


def test_mask_of_another_grid(geometry) -> None:
    encoder = make_encoder(geometry)
    image, visible = make_batch(geometry, encoder, 2)
    with pytest.raises(ValueError, match="the mask has shape .* needs"):
        encoder(image, visible[:1])


def test_gradients_of_hidden_voxels_are_spread() -> None:
    """On CUDA, gradients that are added to one row wait for each other; hidden voxels are the most of a small block."""
    generator = torch.Generator().manual_seed(0)
    units = VisibleUnits(sample_visible(2, (6, 6, 6), 0.75, generator), 54)
    for block in ((1, 1, 1), (2, 2, 2), (4, 4, 4)):
        rows = units.num_blocks * prod(block)
        known = halo_index(units.neighbours(), block, (3, 3, 3))
        index = units.halo_index(block, (3, 3, 3), (1, 1, 1))
        hidden = known == rows
        assert hidden.any() and torch.equal(index[~hidden].long(), known[~hidden])
        reads = (index[hidden] - rows).bincount(minlength=units.zero_rows(block))
        assert len(reads) == units.zero_rows(block)
        assert reads.max() < 3 * known.numel() / len(reads)
