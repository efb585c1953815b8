"""The upsampling and the convolution after it as one convolution."""

import re
import shutil

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.building_blocks.merged_upsampling import MergedUpsampling
from hyspark_nnunet.masking import mask_grid, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss

TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
CONVOLUTION = {2: F.conv2d, 3: F.conv3d}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("stride", "kernel", "spatial"),
    [
        ((2, 2, 2), (3, 3, 3), (3, 4, 2)),
        ((2, 2, 2), (3, 3, 3), (1, 1, 1)),
        ((1, 2, 2), (1, 3, 3), (3, 4, 2)),
        ((1, 2, 2), (3, 3, 3), (2, 2, 5)),
        ((3, 4, 2), (5, 3, 3), (3, 2, 2)),
        ((2, 1, 2), (1, 3, 5), (2, 1, 4)),
        ((2, 2), (3, 5), (4, 3)),
    ],
)
@pytest.mark.parametrize("compiling", [False, True])
def test_equals_the_two_layers(
    stride: tuple, kernel: tuple, spatial: tuple, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the form for the compiler."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    dims, generator = len(stride), torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    image, up_weight, up_bias = parameter(2, 4, *spatial), parameter(4, 5, *stride), parameter(5)
    weight, bias = parameter(3, 5, *kernel), parameter(3)
    inputs = (image, up_weight, up_bias, weight, bias)
    up = TRANSPOSED[dims](image, up_weight, up_bias, stride=stride)
    expected = CONVOLUTION[dims](up, weight, bias, padding=[k // 2 for k in kernel])
    found = MergedUpsampling(stride, kernel)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    outside = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad(found, inputs, outside), torch.autograd.grad(expected, inputs, outside), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@needs_compiler
def test_compiles_to_one_pass() -> None:
    """Border and parities in the kernel that writes the result, instead of a pass over all of it for each of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, 6, 6, 6), (16, 16, 2, 2, 2), (16,), (8, 16, 3, 3, 3), (8,)
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    outside = torch.randn(2, 8, 12, 12, 12, generator=generator, dtype=torch.float64)
    merged = MergedUpsampling((2, 2, 2), (3, 3, 3))

    def values(function) -> list[torch.Tensor]:
        result = function(*inputs)
        return [result, *torch.autograd.grad(result, inputs, outside)]

    torch._dynamo.reset()
    with inductor.patch(compile_threads=1, fx_graph_cache=False):
        found, codes = run_and_get_code(values, torch.compile(merged, fullgraph=True))
    for a, b in zip(found, values(merged), strict=True):
        torch.testing.assert_close(a, b, rtol=4e-14, atol=4e-14 * float(b.detach().abs().max()))
    code = "".join(codes)
    assert len(code) < 150_000
    full = re.findall(r"= empty_strided_cpu\(\((?:2, 12, 12, 12, 8|2, 8, 12, 12, 12)\)", code)
    assert len(full) == 1


def test_the_whole_network_is_the_same_either_way(geometry) -> None:
    torch.manual_seed(0)
    width = 2 ** len(geometry.strides)
    network = HySparKMaskedAutoencoder(**geometry.arguments(), decoder_width=width).double()
    # biases at zero would hide what the border does to them
    for parameter in network.parameters():
        if parameter.ndim <= 1:
            torch.nn.init.normal_(parameter, std=0.5)
    image = torch.randn(2, geometry.input_channels, *geometry.image_size, dtype=torch.float64)
    visible = sample_visible(2, mask_grid(geometry.image_size, network.encoder.unit), 0.7)
    losses, gradients = [], []
    for merge in (True, False):
        for level in network.decoder.levels:
            level.merge = merge
        network.zero_grad()
        loss = reconstruction_loss(network(image, visible), image, visible)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for (name, _), a, b in zip(network.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_merging_where_it_pays() -> None:
    merged = MergedUpsampling((2, 2, 2), (3, 3, 3))
    # the levels of preset B at 96^3, fine to coarse: voxels after the upsampling, channels before
    assert [merged.pays(96**3 // 8**k, 96 * 2**k, 48 * 2**k) for k in range(4)] == [True, True, False, False]
    # the kernels are merged once for the whole batch
    assert merged.pays(8 * 24**3, 384, 192)
    # fewer operations from three patches on, but the merged kernels take more memory than they save
    assert not merged.pays(4 * 24**3, 384, 192)
    assert not MergedUpsampling((1, 1, 1), (3, 3, 3)).pays(1000, 96, 48)
