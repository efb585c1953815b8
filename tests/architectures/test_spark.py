"""The masked autoencoder around nnU-Net's own networks."""

import pytest
import torch
from torch import Tensor

from benchmarks.dense_spark import DenseSparK
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.masking import mask_grid, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from tests.small_networks import PLAN_NETWORKS, plan_network

every_network = pytest.mark.parametrize("kind", PLAN_NETWORKS)


def make_autoencoder(geometry, kind: str, decoder: str = "unet", **changes) -> SparKMaskedAutoencoder:
    network = SparKMaskedAutoencoder(plan_network(geometry, kind, **changes), geometry.input_channels, decoder)
    for token in network.densify.mask_tokens:
        torch.nn.init.normal_(token)
    return network


def make_batch(geometry, network: SparKMaskedAutoencoder, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    # the last stage has a voxel per visible unit: a norm of two voxels has no gradient
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, geometry.input_channels, *geometry.image_size, generator=generator, dtype=dtype)
    return image, sample_visible(2, mask_grid(geometry.image_size, network.encoder.unit), 0.4, generator)


@every_network
def test_loss_and_gradients_equal_the_dense_baseline(geometry, kind: str) -> None:
    network = make_autoencoder(geometry, kind).double()
    image, visible = make_batch(geometry, network, torch.float64)
    losses, gradients = [], []
    for way in (network, DenseSparK(network)):
        network.zero_grad()
        reconstruction = way(image, visible)
        assert reconstruction.shape == image.shape
        loss = reconstruction_loss(reconstruction, image, visible)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-10, msg=name)


@every_network
@pytest.mark.parametrize("decoder", ["unet", "reconstruction"])
def test_every_parameter_learns(geometry, kind: str, decoder: str) -> None:
    network = make_autoencoder(geometry, kind, decoder, conv_bias=False)
    image, visible = make_batch(geometry, network)
    reconstruction_loss(network(image, visible), image, visible).backward()
    # of HySparK's decoder every convolution has a bias; before a BatchNorm it changes nothing
    before_a_norm = [f"decoder.levels.{k}" for k in range(len(geometry.strides))]
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, name
        if not (name.endswith("bias") and name.startswith(tuple(before_a_norm))):
            assert parameter.grad.abs().max() > 1e-7, name
    assert not any("seg_layers" in name for name in network.state_dict())


@every_network
def test_tensors_are_stored_once_and_keep_nnunets_names(geometry, kind: str) -> None:
    stock = plan_network(geometry, kind)
    network = SparKMaskedAutoencoder(stock, geometry.input_channels)
    state = network.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert set(state) == {name for name, _ in network.named_parameters()}
    of_nnunet = {name for name in state if not name.startswith(("densify.", "decoder.head."))}
    theirs = {name for name, _ in stock.named_parameters() if not name.startswith("decoder.seg_layers.")}
    assert of_nnunet == theirs

    changed = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    network.load_state_dict(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in network.state_dict().items())
    # nnU-Net's modules were used, not copied
    found = stock.state_dict()
    assert all(torch.equal(found[name], changed[name]) for name in of_nnunet)
    network.load_state_dict(found, strict=False)  # all names
    del changed["densify.mask_tokens.0"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"densify.mask_tokens.0\"\. *$"):
        network.load_state_dict(changed)


def test_skips_begin_as_the_features(geometry) -> None:
    network = make_autoencoder(geometry, "PlainConvUNet")
    image, visible = make_batch(geometry, network)
    everything = torch.ones_like(visible)
    features = network.encoder(image, everything)
    skips = network.densify(network.encoder.features(image, everything)[::-1])
    for skip, feature in zip(skips, features[::-1], strict=True):
        torch.testing.assert_close(skip, feature, rtol=1e-5, atol=1e-5)


def test_another_decoder_is_refused(geometry) -> None:
    with pytest.raises(ValueError, match="decoder 'vit' is not one of unet, reconstruction"):
        make_autoencoder(geometry, "PlainConvUNet", "vit")


def test_without_a_mask(geometry) -> None:
    network = make_autoencoder(geometry, "PlainConvUNet")
    with pytest.raises(ValueError, match="SparKMaskedAutoencoder needs a mask.*-tr SparKFinetuneTrainer"):
        network(make_batch(geometry, network)[0])
