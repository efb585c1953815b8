"""The two networks as a whole."""

import pytest
import torch
from dynamic_network_architectures.architectures.abstract_arch import test_submodules_loadable as check_keys
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from benchmarks.dense_baseline import DenseBaseline
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.masking import mask_grid, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from tests.small_networks import small_arguments


def make_autoencoder(geometry, **changes) -> HySparKMaskedAutoencoder:
    torch.manual_seed(0)
    width = 3 * 2 ** (len(geometry.strides) - 1)
    return HySparKMaskedAutoencoder(**(geometry.arguments() | {"decoder_width": width} | changes))


def make_batch(geometry, network: HySparKMaskedAutoencoder, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, geometry.input_channels, *geometry.image_size, generator=generator, dtype=dtype)
    return image, sample_visible(2, mask_grid(geometry.image_size, network.encoder.unit), 0.7, generator)


def test_every_parameter_gets_a_gradient(geometry) -> None:
    network = make_autoencoder(geometry)
    image, visible = make_batch(geometry, network)
    reconstruction = network(image, visible)
    assert reconstruction.shape == image.shape
    reconstruction_loss(reconstruction, image, visible).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("vit_n_blocks", [2, 0])
def test_loss_and_gradients_equal_the_dense_baseline(geometry, vit_n_blocks: int) -> None:
    network = make_autoencoder(geometry, vit_n_blocks=vit_n_blocks).double()
    image, visible = make_batch(geometry, network, torch.float64)
    losses, gradients = [], []
    for way in (network, DenseBaseline(network).double()):
        network.zero_grad()
        loss = reconstruction_loss(way(image, visible), image, visible)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for (name, _), a, b in zip(network.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    assert any(name.startswith("encoder.vit.blocks") for name in network.state_dict()) == (vit_n_blocks > 0)


def test_hidden_voxels_do_not_reach_the_reconstruction(geometry) -> None:
    network = make_autoencoder(geometry).eval()
    image, visible = make_batch(geometry, network)
    unit = network.encoder.unit
    mask = visible
    for axis, width in enumerate(unit):
        mask = mask.repeat_interleave(width, axis + 2)
    changed = torch.where(mask, image, torch.tensor(float("nan")))
    assert torch.equal(network(image, visible), network(changed, visible))


def test_projection_is_left_out_where_the_widths_agree(geometry) -> None:
    deepest = geometry.arguments()["features_per_stage"][-1]
    network = make_autoencoder(geometry, decoder_width=16 if deepest == 16 else None)
    has_projection = "densify.projections.0.weight" in network.state_dict()
    assert has_projection == (deepest != network.decoder.levels[0].upsample.in_channels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # a CT patch: its variance overflows float16
    image = 1000 * torch.randn(2, 1, 8, 8, 8)
    reconstruction = torch.randn(2, 1, 8, 8, 8)
    visible = sample_visible(2, (2, 2, 2), 0.75)
    expected = reconstruction_loss(reconstruction, image, visible)
    with torch.autocast("cpu", dtype=dtype):
        loss = reconstruction_loss(reconstruction, image, visible)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    half = reconstruction_loss(reconstruction.to(dtype), image, visible)
    assert half.dtype == torch.float32 and torch.isfinite(half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast(geometry, dtype: torch.dtype) -> None:
    network = make_autoencoder(geometry)
    image, visible = make_batch(geometry, network)
    exact = reconstruction_loss(network(image, visible), image, visible)
    with torch.autocast("cpu", dtype=dtype):
        reconstruction = network(image, visible)
        loss = reconstruction_loss(reconstruction, image, visible)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_decoder_width_that_cannot_be_halved() -> None:
    arguments = small_arguments(decoder_width=10)
    with pytest.raises(ValueError, match="decoder_width 10 cannot be halved 2 times: choose a multiple of 4"):
        HySparKMaskedAutoencoder(**arguments)
    with pytest.raises(ValueError, match=r"strides\[1\] is \(2, 2\), but Conv3d has 3 axes"):
        HySparKMaskedAutoencoder(**(arguments | {"strides": ((1, 1, 1), (2, 2), (2, 2, 2))}))


def test_logits_have_the_sizes_of_deep_supervision(geometry) -> None:
    torch.manual_seed(0)
    network = HySparKUNet(**geometry.arguments(), num_classes=3, deep_supervision=True)
    image = torch.randn(2, geometry.input_channels, *geometry.image_size)
    logits = network(image)
    size = torch.tensor(geometry.image_size)
    assert len(logits) == len(geometry.strides) - 1
    for level, stride in zip(logits, geometry.strides, strict=False):
        size = size // torch.tensor(stride)
        assert level.shape == (2, 3, *size.tolist())
    sum(level.square().mean() for level in logits).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(image), logits[0])


def test_a_batch_of_one_has_the_gradient_of_two_equal_samples(geometry) -> None:
    """On a CPU torch 2.13 is wrong about InstanceNorm of one channels-first sample with a channels-last gradient."""
    torch.manual_seed(0)
    network = HySparKUNet(**geometry.arguments(), num_classes=2, deep_supervision=True).double()
    one = torch.randn(1, geometry.input_channels, *geometry.image_size, dtype=torch.float64)
    found = []
    for image in (one, torch.cat([one, one])):
        network.zero_grad()
        # of channels-last logits: so comes their gradient
        sum(logits.movedim(1, -1).contiguous().sin().mean() for logits in network(image)).backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_encoders_of_both_networks_have_the_same_names(geometry) -> None:
    shapes = [
        {name: p.shape for name, p in network.encoder.state_dict().items()}
        for network in (make_autoencoder(geometry), HySparKUNet(**geometry.arguments(), num_classes=2))
    ]
    assert shapes[0] == shapes[1]


def test_unet_is_an_architecture_of_nnunet(geometry) -> None:
    arguments = geometry.arguments()
    arguments["conv_op"] = f"torch.nn.{arguments['conv_op'].__name__}"
    channels = arguments.pop("input_channels")
    network = get_network_from_plans(
        "hyspark_nnunet.architectures.HySparKUNet", arguments, ["conv_op"], channels, 4, deep_supervision=False
    )
    assert isinstance(network, HySparKUNet)
    check_keys(network)
    assert network.get_submodule(network.key_to_encoder) is network.encoder
    assert network(torch.randn(1, channels, *geometry.image_size)).shape == (1, 4, *geometry.image_size)


def test_feature_map_size_counts_what_is_written() -> None:
    """Against the sizes that hooks see in a forward pass."""
    torch.manual_seed(0)
    network = HySparKUNet(**small_arguments(), num_classes=3, deep_supervision=True)
    written = []

    def count(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        written.append(output.numel())

    for name, module in network.named_modules():
        if "norm" not in name and "weight" in dict(module.named_parameters(recurse=False)):
            module.register_forward_hook(count)
    network(torch.zeros(1, 1, 8, 12, 8))
    assert network.compute_conv_feature_map_size((8, 12, 8)) == sum(written)
