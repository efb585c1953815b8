"""Activation checkpointing changes memory and nothing else; torch.compile takes the network whole."""

import copy

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.architectures.masked_autoencoder import MaskedAutoencoder
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.building_blocks.recomputation import DEPTHS, set_recomputation
from hyspark_nnunet.masking import mask_grid, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from tests.small_networks import plan_network, small_arguments

KINDS = ("HySparK", "PlainConvUNet", "ResidualEncoderUNet")


def make_step(geometry, kind: str = "HySparK", dtype: torch.dtype = torch.float32):
    """A network, and a function that gives the loss of a copy of it."""
    torch.manual_seed(0)
    network: MaskedAutoencoder
    if kind == "HySparK":
        network = HySparKMaskedAutoencoder(**geometry.arguments(), decoder_width=2 ** len(geometry.strides))
    else:
        network = SparKMaskedAutoencoder(plan_network(geometry, kind, "BatchNorm"), geometry.input_channels)
    grid = mask_grid(geometry.image_size, network.encoder.unit)
    image = torch.randn(2, geometry.input_channels, *geometry.image_size).to(dtype)
    visible = sample_visible(2, grid, 0.7)
    num_visible = int(visible[0].sum())
    return network.to(dtype), lambda n: reconstruction_loss(n(image, visible, num_visible), image, visible)


def state_after(network: nn.Module, loss: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in network.parameters()], dict(network.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_stay(geometry, kind: str) -> None:
    network, loss_of = make_step(geometry, kind)
    found = []
    for depth in DEPTHS:
        other = copy.deepcopy(network)
        set_recomputation(other, depth)
        found.append(state_after(other, loss_of(other)))
    for loss, gradients, buffers in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))
        # running statistics have seen the batch once
        assert all(torch.equal(buffers[name], found[0][2][name]) for name in found[0][2])
        assert {int(b) for name, b in buffers.items() if name.endswith("num_batches_tracked")} == {1}


class CopiesOfCounters(TorchDispatchMode):
    """Copies of integers without axes: of numbers of batches, here."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_):
            self.count += args[0].dtype == torch.long and args[0].ndim == 0
        return function(*args, **(kwargs or {}))


def test_numbers_of_batches_are_not_copied() -> None:
    """On CUDA each copy would be a launch, hundreds of them a step."""
    network, loss_of = make_step(Wide)
    set_recomputation(network, "light")
    loss = loss_of(network)
    with CopiesOfCounters() as copies:
        loss.backward()
    assert copies.count == 0


class CreatedStorages(TorchDispatchMode):
    """Every piece of memory that operations allocate, as long as somebody keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self) -> int:
        """Bytes."""
        return sum(size for reference, size in self.sizes.items() if not reference.expired())


def kept_bytes(run) -> int:
    """Bytes that are kept between the forward and the backward pass."""
    with CreatedStorages() as created:
        result = run()
    assert result.requires_grad
    return created.alive()


class Wide:
    """96 channels and one level more than the geometries, so that features outweigh everything else."""

    image_size, input_channels = (32, 32, 32), 1
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    kernel_sizes = ((3, 3, 3),) * 3

    @staticmethod
    def arguments() -> dict:
        return small_arguments(
            features_per_stage=(16, 32, 64), n_blocks_per_stage=(1, 1, 1), expansion_per_stage=(2, 2, 2)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_each_depth_keeps_less(kind: str) -> None:
    network, loss_of = make_step(Wide, kind)
    kept = []
    for depth in DEPTHS:
        set_recomputation(network, depth)
        kept.append(kept_bytes(lambda: loss_of(network)))
    # full checkpointing of nnU-Net's decoder, with one convolution per level, is light checkpointing
    factor = 1.2 if kind == "HySparK" else 1.0
    assert kept[0] > 1.2 * kept[1] and kept[1] > factor * kept[2] > 0, kept


def test_segmentation_too(geometry) -> None:
    torch.manual_seed(0)
    network = HySparKUNet(**geometry.arguments(), num_classes=3)
    image = torch.randn(1, geometry.input_channels, *geometry.image_size)
    gradients = []
    for depth in DEPTHS:
        set_recomputation(network, depth)
        network.zero_grad()
        network(image).square().mean().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in network.parameters()])
    for other in gradients[1:]:
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="'deep' is not one of none, light, full"):
        set_recomputation(nn.Linear(1, 1), "deep")


class SavedByCompiler:
    """A backend that differentiates as the default one does, notes what is saved for the backward pass, runs eagerly.

    It needs no C++ compiler.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.backend = aot_autograd(fw_compiler=nop, partition_fn=self._partition, decompositions=select_decomp_table())

    def _partition(self, graph, inputs, *, num_fwd_outputs, **more):
        joint_graph_passes(graph)
        parts = min_cut_rematerialization_partition(graph, inputs, num_fwd_outputs=num_fwd_outputs, **more)
        outputs = parts[0].graph.find_nodes(op="output")[0].args[0]
        saved = {node for node in outputs[num_fwd_outputs:] if node.op != "placeholder"}
        self.bytes = sum(node.meta["val"].nbytes for node in saved if isinstance(node.meta["val"], Tensor))
        return parts


@pytest.mark.parametrize("kind", ["HySparK", "ResidualEncoderUNet"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_compiles_without_graph_breaks(depth: str, kind: str) -> None:
    """And keeps no more for the backward pass than without the compiler, which the plan counts.

    In float64: the compiler's batch norm rounds differently, which in float32 shows in running means near zero.
    """
    network, loss_of = make_step(Wide, kind, torch.float64)
    set_recomputation(network, depth)
    torch._dynamo.reset()
    saved = SavedByCompiler()
    compiled = torch.compile(network, backend=saved.backend, fullgraph=True)
    loss, gradients, buffers = state_after(network, loss_of(compiled))
    plain = make_step(Wide, kind, torch.float64)[0]
    set_recomputation(plain, depth)
    uncompiled = copy.deepcopy(plain)
    assert 0 < saved.bytes <= kept_bytes(lambda: loss_of(uncompiled))
    expected = state_after(plain, loss_of(plain))
    torch.testing.assert_close(loss, expected[0])
    for a, b in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[2][name], rtol=1e-10, atol=1e-14, msg=name)
