"""Activation checkpointing: what the backward pass needs is computed again instead of being kept.

There are three depths. "none" recomputes nothing. "light" recomputes cheap operations: halos, GELU, normalisation and
ReLU. "full" recomputes complete blocks and decoder levels: it saves most of the memory for about one more forward pass.
Source: torch.utils.checkpoint; arXiv 1604.06174.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

DEPTHS = ("none", "light", "full")


class Recomputing(nn.Module):
    """A module with activations that can be recomputed.

    Attributes:
        recompute: "none", "light" or "full"; set for a whole network by ``set_recomputation``.
    """

    recompute: str = "none"

    def light(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Calls a function; under "light" and "full", what it keeps for the backward pass is computed again there.

        The operation that ends the function is not repeated: recomputation stops at the last input that is missing.
        """
        return self._call("light", function, inputs)

    def full(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Calls a function; under "full", it is computed again in the backward pass."""
        return self._call("full", function, inputs)

    def _call(self, depth: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        if DEPTHS.index(self.recompute) < DEPTHS.index(depth):
            return function(*inputs)
        if torch.compiler.is_compiling():
            # the compiler takes the same choices, and applies what changes a buffer once; left to itself it would keep
            # halos, GELU and ReLU. Layouts are prepared before: a recomputed function must not change them
            return checkpoint(function, *inputs, use_reentrant=False)
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
            context_fn=partial(_contexts, self),
        )


def set_recomputation(network: nn.Module, depth: str) -> None:
    """Sets the depth for every part of a network that can recompute.

    Args:
        network: of either kind.
        depth: "none", "light" or "full".

    Raises:
        ValueError: another depth.
    """
    if depth not in DEPTHS:
        raise ValueError(f"activation checkpointing {depth!r} is not one of {', '.join(DEPTHS)}")
    for module in network.modules():
        if isinstance(module, Recomputing):
            module.recompute = depth


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the forward pass and of the recomputation."""
    return nullcontext(), _untracked(module)


@contextmanager
def _untracked(module: nn.Module) -> Iterator[None]:
    """Running statistics have seen the batch already: with momentum 0 they stay."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    # they count on a counter that is thrown away, on the CPU: on CUDA, restoring theirs would be hundreds of launches
    counter = torch.zeros((), dtype=torch.long)
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, counter
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
