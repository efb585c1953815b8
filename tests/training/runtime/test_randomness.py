"""The random numbers of an epoch, and how they go on after an interruption."""

import random
from pathlib import Path

import numpy as np
import torch

from hyspark_nnunet.checkpoints.storage import read_checkpoint, write_atomically
from hyspark_nnunet.training.runtime.randomness import generator_states, restore_generators, seed_generators


def draw(masks: torch.Generator) -> list[float]:
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), float(torch.rand(()))]
    return [*drawn, float(torch.rand((), generator=masks))]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    masks = torch.Generator()
    seed_generators(5, 2, 0, masks=masks)
    draw(masks)
    write_atomically(generator_states(masks), tmp_path / "states.pth")
    expected = [draw(masks) for _ in range(3)]
    seed_generators(6, 0, 0, masks=masks)
    restore_generators(read_checkpoint(tmp_path / "states.pth"), masks)
    assert [draw(masks) for _ in range(3)] == expected


def test_every_epoch_and_rank_has_its_own_numbers() -> None:
    masks = torch.Generator()
    drawn = []
    for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (1, 0, 1), (2**63 - 1, 9, 9)]:
        seed_generators(*where, masks=masks)
        drawn.append(draw(masks))
        seed_generators(*where, masks=masks)
        assert draw(masks) == drawn[-1]
    numbers = [number for numbers in drawn for number in numbers]
    assert len(set(numbers)) == len(numbers)
