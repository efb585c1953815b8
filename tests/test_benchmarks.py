"""What the benchmarks compare with is the same network, and they run."""

import pytest
import torch

from benchmarks.loader import measure as measure_loader
from benchmarks.plain_network import PlainNetwork
from benchmarks.step import ANISOTROPIC, CUBE, HIPPOCAMPUS, LADDER, Case, Shape, compare, isotropic
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.masking import mask_grid, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss


def test_the_plain_way_gives_the_same_numbers(geometry) -> None:
    torch.manual_seed(0)
    network = HySparKMaskedAutoencoder(**geometry.arguments(), decoder_width=2 ** len(geometry.strides)).double()
    plain = PlainNetwork(network).double()
    image = torch.randn(2, geometry.input_channels, *geometry.image_size, dtype=torch.float64)
    visible = sample_visible(2, mask_grid(geometry.image_size, network.encoder.unit), 0.7)
    for ours, theirs in zip(network.encoder(image, visible), plain.features(image, visible), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    losses, gradients = [], []
    for way in (network, plain):
        network.zero_grad()
        loss = reconstruction_loss(way(image, visible), image, visible)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for (name, _), a, b in zip(network.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


def test_every_variant_of_the_step_agrees() -> None:
    case = Case(isotropic((32, 32, 32), n_stages=4), preset="S", batch_size=2)
    rows = compare(case, LADDER, rounds=1)
    assert [row["variant"] for row in rows] == [variant.name for variant in LADDER]
    assert all(float(row["loss difference"]) < 1e-5 for row in rows)
    assert all(float(row["total [s]"]) > 0 and float(row["memory [GB]"]) > 0 for row in rows)
    # visible blocks and merging save operations, the dropped branch costs some
    operations = [float(row["TFLOP"]) for row in rows]
    assert operations[0] > operations[1] > operations[2] > 0


@pytest.mark.parametrize("shape", [CUBE, HIPPOCAMPUS, ANISOTROPIC], ids=lambda shape: shape.name)
def test_the_shapes_are_whole_numbers_of_mask_units(shape: Shape) -> None:
    network = Case(shape, preset="S").network()
    assert all(n > 1 for n in mask_grid(shape.patch, network.encoder.unit))


def test_the_loader_without_labels_is_measured() -> None:
    rows = measure_loader((16, 16, 16), patches=4)
    assert [float(row["patches/s"]) > 0 for row in rows] == [True] * 3
