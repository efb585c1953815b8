"""How much memory a training step takes, found without taking it.

The networks themselves run, forward and backward, on tensors that have a shape and no storage (torch's FakeTensorMode),
while a mode adds up what is alive. So nothing here knows how the networks are made: what they save for the
backward pass, recompute or free is counted as it happens, transient buffers included.

The same numbers come out on every machine, with or without a GPU: a plan must not depend on where it was made.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyspark_nnunet.masking import num_visible_units
from hyspark_nnunet.training.loss import reconstruction_loss

GIB = 2**30
# CUDA's context and cuDNN's workspaces, which no tensor holds
CUDA_RESERVE = GIB
# what autocast computes in float32 on CUDA and not on the CPU, as far as our networks and nnU-Net's loss use it
FLOAT32_ON_CUDA = [(F, "layer_norm"), (F, "softmax"), (F, "cross_entropy"), (torch, "layer_norm"), (torch, "softmax")]


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it that are alive.

    Attributes:
        now: at the moment.
        peak: at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())  # views share one
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def pretraining_bytes(
    network: nn.Module,
    batch_size: int,
    input_channels: int,
    patch_size: Sequence[int],
    unit: Sequence[int],
    mask_ratio: float,
    mixed_precision: bool,
) -> int:
    """Peak memory of a step of pre-training, in bytes.

    Args:
        network: HySparKMaskedAutoencoder on the device "meta".
        batch_size: patches of the step.
        input_channels: of the network.
        patch_size: voxels per axis.
        unit: voxels of a mask unit per axis.
        mask_ratio: share of hidden units.
        mixed_precision: float16 where CUDA's autocast takes it; False: float32, as on a CPU.
    """
    grid = [p // u for p, u in zip(patch_size, unit, strict=True)]
    num_visible = num_visible_units(grid, mask_ratio)

    def loss(network: nn.Module) -> Tensor:
        image = torch.empty(batch_size, input_channels, *patch_size)
        visible = torch.empty(batch_size, 1, *grid, dtype=torch.bool)
        with torch.autocast("cpu", dtype=torch.float16, enabled=mixed_precision):
            reconstruction = network(image, visible, num_visible)
        return reconstruction_loss(reconstruction, image, visible)

    return step_bytes(network, loss)


def segmentation_bytes(
    network: nn.Module, batch_size: int, input_channels: int, patch_size: Sequence[int], mixed_precision: bool
) -> int:
    """Peak memory of a step of segmentation training with nnU-Net's loss, in bytes.

    Args:
        network: a network for ``nnUNetTrainer`` on the device "meta", with or without deep supervision.
        batch_size: as in ``pretraining_bytes``.
        input_channels: as in ``pretraining_bytes``.
        patch_size: as in ``pretraining_bytes``.
        mixed_precision: as in ``pretraining_bytes``.
    """

    def loss(network: nn.Module) -> Tensor:
        image = torch.empty(batch_size, input_channels, *patch_size)
        with torch.autocast("cpu", dtype=torch.float16, enabled=mixed_precision):
            return of_nnunets_loss(network(image))

    return step_bytes(network, loss)


def of_nnunets_loss(logits: Tensor | list[Tensor]) -> Tensor:
    """nnU-Net's Dice and cross-entropy against background alone, summed over the levels of deep supervision."""
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    levels = logits if isinstance(logits, list) else [logits]
    return torch.stack([loss(level, level.new_zeros(len(level), 1, *level.shape[2:])) for level in levels]).sum()


def step_bytes(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Peak memory of a training step: weights, gradients, AdamW's two moments, and what the step holds at most.

    Args:
        network: on the device "meta"; its parameters are replaced.
        loss: makes a batch and returns its loss.
    """
    with FakeTensorMode(), LiveBytes() as memory, _cuda_autocast_types():
        _materialise(network)
        optimizer = torch.optim.AdamW(network.parameters())
        # AdamW makes its moments in its first step: the second is like all others
        for _ in range(2):
            loss(network).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return memory.peak


def _materialise(network: nn.Module) -> None:
    """Fake tensors in place of those on the device "meta", which autocast and random numbers do not know."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


@contextmanager
def _cuda_autocast_types() -> Iterator[None]:
    """Makes the CPU's autocast take the types that CUDA's takes: LayerNorm and the losses in float32.

    The functions themselves are replaced, for a TorchFunctionMode is not there while the backward pass recomputes.
    """
    with ExitStack() as stack:
        for module, name in FLOAT32_ON_CUDA:
            stack.enter_context(patch.object(module, name, _in_float32(getattr(module, name))))
        yield


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def taken(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def called(*args: Any, **kwargs: Any) -> Tensor:
        return function(*map(taken, args), **{name: taken(value) for name, value in kwargs.items()})

    return called
