"""The random numbers of a training, and how they continue after an interruption.

nnU-Net draws cases and crops from NumPy's global generator and augments with those of NumPy and torch; other
transforms may use Python's. They are seeded in every epoch from seed, epoch and rank: an epoch does not depend on
earlier ones, and ranks draw different crops. A checkpoint inside an epoch contains the generators' states. Trainings
are thus reproducible if crops are drawn in the training process (``nnUNet_n_proc_DA=0``). Loader processes have their
own generators and return batches in the order in which they finish.
"""

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, epoch: int, rank: int, step: int = 0, *, masks: torch.Generator) -> None:
    """Seeds the generators of Python, NumPy and torch and the generator of the masks, each with a different number."""
    numbers = np.random.SeedSequence((seed, epoch, rank, step)).generate_state(4, np.uint64) >> np.uint64(1)
    random.seed(int(numbers[0]))
    np.random.seed(int(numbers[1] % 2**32))
    torch.manual_seed(int(numbers[2]))
    # a separate generator: the masks do not depend on the number of loader processes
    masks.manual_seed(int(numbers[3]))


def generator_states(masks: torch.Generator) -> dict[str, Any]:
    """The states of the generators that ``seed_generators`` seeds, for a checkpoint."""
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
    """Restores what ``generator_states`` returned."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"].cpu())
    masks.set_state(states["masks"].cpu())
