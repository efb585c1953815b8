"""Where a training's random numbers come from, and how they go on where it was interrupted.

nnU-Net draws cases and crops from NumPy's global generator and augments with NumPy's, torch's and Python's. They are
seeded anew in every epoch, from seed, epoch and rank: an epoch depends on nothing that happened before it, and no rank
repeats another's crops. Within an epoch a checkpoint holds the generators' states. Both say all there is to say where
crops are drawn in the training process (``nnUNet_n_proc_DA=0``); loader processes have generators of their own and
hand over batches in the order in which they finish.
"""

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, epoch: int, rank: int, step: int = 0, *, masks: torch.Generator) -> None:
    """Seeds the generators of Python, NumPy and torch, and that of the masks, each with a number of its own."""
    numbers = np.random.SeedSequence((seed, epoch, rank, step)).generate_state(4, np.uint64) >> np.uint64(1)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[1] % 2**32))
    torch.manual_seed(int(numbers[2]))
    # a generator of its own: the masks are the same, however many processes load data
    masks.manual_seed(int(numbers[3]))


def generator_states(masks: torch.Generator) -> dict[str, Any]:
    """The states of the generators that ``seed_generators`` seeds, as a checkpoint holds them."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.array(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "masks": masks.get_state(),
    }


def restore_generators(states: dict[str, Any], masks: torch.Generator) -> None:
    """The other side of ``generator_states``."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"].cpu())
    masks.set_state(states["masks"].cpu())
