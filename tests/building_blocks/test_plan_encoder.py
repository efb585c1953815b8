"""nnU-Net's own encoders on visible blocks."""

import copy
from functools import partial

import pytest
import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn

from benchmarks.dense_spark import dense_features
from hyspark_nnunet.building_blocks.layouts import FEW_SAMPLES
from hyspark_nnunet.building_blocks.plan_encoder import PlanEncoder
from hyspark_nnunet.masking import mask_grid, sample_visible, view_at
from tests.small_networks import PLAN_NETWORKS, plan_network

every_network = pytest.mark.parametrize("kind", PLAN_NETWORKS)


def make_encoder(geometry, kind: str, dtype: torch.dtype = torch.float64, norm: str = "InstanceNorm") -> PlanEncoder:
    return PlanEncoder(plan_network(geometry, kind, norm).to(dtype).encoder)


def make_batch(geometry, encoder: PlanEncoder, batch_size: int, ratio: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(encoder.parameters()).dtype
    image = torch.randn(batch_size, geometry.input_channels, *geometry.image_size, generator=generator, dtype=dtype)
    return image, sample_visible(batch_size, mask_grid(geometry.image_size, encoder.unit), ratio, generator)


def features_and_gradients(encoder: nn.Module, way) -> tuple[list[Tensor], dict[str, Tensor]]:
    encoder.zero_grad()
    features = way()
    sum((f * torch.cos(f.detach())).sum() for f in features).backward()
    return features, {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


def assert_same(encoder: nn.Module, way, other) -> None:
    (ours, our_gradients), (theirs, their_gradients) = (features_and_gradients(encoder, w) for w in (way, other))
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    scale = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-10, atol=1e-10 * scale, msg=name)


@every_network
@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchNorm"])
def test_visible_blocks_equal_the_dense_baseline(geometry, kind: str, norm: str) -> None:
    encoder = make_encoder(geometry, kind, norm=norm)
    image, visible = make_batch(geometry, encoder, 2)
    assert_same(encoder, partial(encoder, image, visible), partial(dense_features, encoder, image, visible))


@every_network
@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchNorm"])
def test_everything_visible_equals_nnunets_forward_pass(geometry, kind: str, norm: str) -> None:
    network = plan_network(geometry, kind, norm).double()
    encoder = PlanEncoder(network.encoder)
    image, visible = make_batch(geometry, encoder, 2)
    assert_same(encoder, partial(encoder, image, torch.ones_like(visible)), partial(network.encoder, image))
    for ours, theirs in zip(encoder(image), network.encoder(image), strict=True):
        assert torch.equal(ours, theirs)


@every_network
def test_hidden_voxels_do_not_leak(geometry, kind: str) -> None:
    encoder = make_encoder(geometry, kind, torch.float32)
    image, visible = make_batch(geometry, encoder, 2)
    mask = view_at(visible, encoder.unit)
    changed = torch.where(mask, image, torch.tensor(float("nan")))
    for before, after in zip(encoder(image, visible), encoder(changed, visible), strict=True):
        assert torch.isfinite(before).all() and before.abs().sum() > 0
        assert torch.equal(before, after)
    seen = torch.where(mask, image + 1, image)
    for before, after in zip(encoder(image, visible), encoder(seen, visible), strict=True):
        assert not torch.equal(before, after)


@pytest.mark.parametrize("batch_size", [3, FEW_SAMPLES + 1])
def test_a_batch_equals_its_samples(geometry, batch_size: int) -> None:
    encoder = make_encoder(geometry, "ResidualEncoderUNet")
    image, visible = make_batch(geometry, encoder, batch_size)
    together = encoder(image, visible)
    for i in range(batch_size):
        for a, b in zip(together, encoder(image[i : i + 1], visible[i : i + 1]), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-10, atol=1e-10)


def test_running_statistics_are_those_of_the_visible_voxels(geometry) -> None:
    encoder = make_encoder(geometry, "ResidualEncoderUNet", norm="BatchNorm")
    image, visible = make_batch(geometry, encoder, 2)
    other = copy.deepcopy(encoder)
    encoder(image, visible)
    dense_features(other, image, visible)
    for (name, ours), theirs in zip(encoder.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)
    encoder.eval()
    alone = [f[:1] for f in encoder(image, visible)]
    for a, b in zip(encoder(image[:1], visible[:1]), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


SIZES = {"input_channels": 1, "n_stages": 2, "features_per_stage": (4, 4), "conv_op": nn.Conv3d}
NORM = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
PLAIN = partial(PlainConvEncoder, **SIZES, **NORM, n_conv_per_stage=1)
RESIDUAL = partial(ResidualEncoder, **SIZES, **NORM, n_blocks_per_stage=1, strides=(1, 2), kernel_sizes=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(PLAIN, kernel_sizes=3, strides=(1, 2), dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.1}),
            r"encoder\.stages\.0\.0\.convs\.0\.dropout of the plan's network is a Dropout3d",
        ),
        (partial(PLAIN, kernel_sizes=3, strides=(1, 2), pool="max"), r"encoder\.stages\.1\.0 .* is a MaxPool3d"),
        (partial(PLAIN, kernel_sizes=3, strides=(1, 2), nonlin=nn.PReLU), r"nonlin .* is a PReLU"),
        (partial(RESIDUAL, squeeze_excitation=True), r"squeeze_excitation .* is a SqueezeExcite"),
        (partial(RESIDUAL, stochastic_depth_p=0.1), r"drop_path .* is a DropPath, .*HySparKPretrainTrainer"),
        (partial(PLAIN, kernel_sizes=2, strides=(1, 2)), r"conv .* is a convolution with kernel \(2, 2, 2\)"),
        (partial(PLAIN, kernel_sizes=3, strides=(2, 2)), r"the first stage's stride is \(2, 2, 2\)"),
        (partial(PLAIN, kernel_sizes=(3, 5), strides=(1, 2)), r"stage 1 has kernels of \(5, 5, 5\) voxels where"),
    ],
)
def test_what_cannot_run_on_visible_blocks_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanEncoder(make())


@every_network
def test_other_nonlinearities_and_their_order(geometry, kind: str) -> None:
    changes = {"nonlin": "torch.nn.ELU"} | ({"nonlin_first": True} if kind == "PlainConvUNet" else {})
    encoder = PlanEncoder(plan_network(geometry, kind, **changes).double().encoder)
    image, visible = make_batch(geometry, encoder, 2)
    assert_same(encoder, partial(encoder, image, visible), partial(dense_features, encoder, image, visible))
