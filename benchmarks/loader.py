"""Patches per second of nnU-Net's augmentation for pre-training, per loader process.

    python -m benchmarks.loader

A synthetic image with three labels; reading from disk is not included. Prints a table and writes
benchmarks/results/loader.csv.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from benchmarks.measuring import machine, table, write_csv
from benchmarks.step import RESULTS
from benchmarks.step_cases import CUBE, HIPPOCAMPUS, LARGE
from hyspark_nnunet.recipe.fields import NO_AUGMENTATION
from hyspark_nnunet.training.data.image_transforms import pretraining_transforms

ROTATION = (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)  # nnU-Net's, for a cube
SCALES = [[1.0] * 3, [0.5] * 3, [0.25] * 3, [0.125] * 3]


def variants(patch: Sequence[int]) -> dict[str, BasicTransform]:
    """nnU-Net's transforms, and what pre-training leaves of them."""
    everything = nnUNetTrainer.get_training_transforms(tuple(patch), ROTATION, SCALES, (0, 1, 2), False, [False])
    image_only = pretraining_transforms(everything, NO_AUGMENTATION)
    return {
        "nnU-Net's augmentation": everything,
        "spatial transforms": image_only.transforms,
        "spatial transforms, no labels": image_only,
    }


def sample(patch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and labels (1, *initial patch size of nnU-Net)."""
    size = [int(n) for n in get_patch_size(tuple(patch), ROTATION, ROTATION, ROTATION, (0.85, 1.25))]
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1, *size, dtype=torch.int16)
    middle = [slice(n // 4, 3 * n // 4) for n in size]
    for label, begin in enumerate((0, 1, 2), start=1):
        part = slice(middle[2].start + begin * size[2] // 6, middle[2].start + (begin + 1) * size[2] // 6)
        labels[0, middle[0], middle[1], part] = label
    return torch.randn(1, *size, generator=generator), labels


def measure(patch: Sequence[int], patches: int) -> list[dict[str, Any]]:
    """Rows of a table; each variant draws the same random numbers."""
    image, labels = sample(patch)
    seconds = {}
    for name, transforms in variants(patch).items():
        np.random.seed(0)
        torch.manual_seed(0)
        begin = time.perf_counter()
        for _ in range(patches):
            transforms(image=image.clone(), segmentation=labels.clone())
        seconds[name] = (time.perf_counter() - begin) / patches
    first = next(iter(seconds.values()))
    return [
        {
            "augmentation": name,
            "patch": "x".join(map(str, patch)),
            "ms per patch": f"{1000 * taken:.1f}",
            "patches/s": f"{1 / taken:.1f}",
            "speed-up": f"{first / taken:.2f}",
        }
        for name, taken in seconds.items()
    ]


def main() -> None:
    """Runs all patch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=100, help="per variant (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in nnU-Net's loader processes
    print(machine(torch.device("cpu")))
    rows = [row for shape in (CUBE, LARGE, HIPPOCAMPUS) for row in measure(shape.patch, arguments.patches)]
    print(table(rows))
    write_csv(RESULTS / "loader.csv", rows)


if __name__ == "__main__":
    main()
