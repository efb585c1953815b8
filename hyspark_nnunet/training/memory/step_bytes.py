"""Estimates the memory of a training step without taking it.

The networks run forward and backward on tensors without storage (``shape_only``), while the bytes of the tensors alive
are added up. So nothing here knows how the networks are built: what they save for the backward pass, recompute or free
is counted as it happens, transient buffers included.

The numbers are the same on every machine, with or without a GPU: a plan must not depend on where it was made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyspark_nnunet.architectures.masked_autoencoder import MaskedAutoencoder
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.masking import num_visible_units
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.memory.shape_only import LiveBytes

GIB = 2**30
# CUDA's context and cuDNN's workspaces, which no tensor holds
CUDA_RESERVE = GIB
# functions of our networks and of nnU-Net's loss that autocast computes in float32 on CUDA but not on the CPU
FLOAT32_ON_CUDA = [(F, "layer_norm"), (F, "softmax"), (F, "cross_entropy"), (torch, "layer_norm"), (torch, "softmax")]
# the reverse: in float32 on the CPU alone
AS_GIVEN_ON_CUDA = [(torch, "max_pool3d"), (F, "avg_pool3d")]


def pretraining_bytes(
    build: Callable[[], MaskedAutoencoder],
    batch_size: int,
    input_channels: int,
    patch_size: Sequence[int],
    mask_ratio: float,
    activation_checkpointing: str,
    mixed_precision: bool,
) -> int:
    """Peak memory of a step of pre-training, in bytes.

    Args:
        build: makes the network; it is called on the device "meta".
        batch_size: patches of the step.
        input_channels: of the network.
        patch_size: voxels per axis.
        mask_ratio: share of hidden units.
        activation_checkpointing: as in the recipe.
        mixed_precision: half precision where CUDA's autocast takes it, float16 and bfloat16 alike; False: float32, as
            on a CPU.
    """
    with torch.device("meta"):
        network = build()
    set_recomputation(network, activation_checkpointing)
    grid = [p // u for p, u in zip(patch_size, network.encoder.unit, strict=True)]
    num_visible = num_visible_units(grid, mask_ratio)

    def loss(network: nn.Module) -> Tensor:
        image = torch.empty(batch_size, input_channels, *patch_size)
        visible = torch.empty(batch_size, 1, *grid, dtype=torch.bool)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision):
            reconstruction = network(image, visible, num_visible)
        return reconstruction_loss(reconstruction, image, visible)

    return step_bytes(network, loss)


def segmentation_bytes(
    build: Callable[[], nn.Module],
    batch_size: int,
    input_channels: int,
    patch_size: Sequence[int],
    mixed_precision: bool,
) -> int:
    """Peak memory of a step of segmentation training with nnU-Net's loss, in bytes.

    Args:
        build: makes a network for ``nnUNetTrainer``, with or without deep supervision; called on the device "meta".
        batch_size: as in ``pretraining_bytes``.
        input_channels: as in ``pretraining_bytes``.
        patch_size: as in ``pretraining_bytes``.
        mixed_precision: as in ``pretraining_bytes``.
    """
    with torch.device("meta"):
        network = build()

    def loss(network: nn.Module) -> Tensor:
        image = torch.empty(batch_size, input_channels, *patch_size)
        with torch.autocast("cpu", dtype=torch.float16, enabled=mixed_precision):
            return of_nnunets_loss(network(image))

    return step_bytes(network, loss)


def of_nnunets_loss(logits: Tensor | list[Tensor]) -> Tensor:
    """nnU-Net's Dice and cross-entropy against background alone, summed over the levels of deep supervision."""
    # here: memory of pre-training is counted without nnU-Net, too (benchmarks/gpu_check.py)
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    levels = logits if isinstance(logits, list) else [logits]
    return torch.stack([loss(level, level.new_zeros(len(level), 1, *level.shape[2:])) for level in levels]).sum()


def step_bytes(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Peak memory of a training step in bytes: weights, gradients, AdamW's two moments, activations.

    The step of AdamW itself is not run: where activations matter, the peak is in the backward pass.

    Args:
        network: on the device "meta"; its parameters are replaced.
        loss: makes a batch and returns its loss.
    """
    with LiveBytes() as memory, _cuda_autocast_types():
        materialise(network)
        moments = [torch.empty_like(parameter) for parameter in network.parameters() for _ in range(2)]
        loss(network).backward()
        del moments
    return memory.peak


def materialise(network: nn.Module) -> None:
    """Replaces tensors on the device "meta", which autocast ignores, by those of the mode that is active."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


@contextmanager
def _cuda_autocast_types() -> Iterator[None]:
    """Makes the CPU's autocast use the types of CUDA's: LayerNorm and losses in float32, pooling in its input's type.

    The functions themselves are replaced: a TorchFunctionMode is not active while the backward pass recomputes.
    """
    with ExitStack() as stack:
        for module, name in FLOAT32_ON_CUDA:
            stack.enter_context(patch.object(module, name, _in_float32(getattr(module, name))))
        for module, name in AS_GIVEN_ON_CUDA:
            stack.enter_context(patch.object(module, name, _as_given(getattr(module, name))))
        yield


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def taken(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def called(*args: Any, **kwargs: Any) -> Tensor:
        return function(*map(taken, args), **{name: taken(value) for name, value in kwargs.items()})

    return called


def _as_given(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return called
