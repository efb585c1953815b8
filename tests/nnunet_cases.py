"""Synthetic datasets for what nnU-Net offers beyond labels on cubes: a ball in a ball, in noise."""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

FILE_ENDING = ".nii.gz"


def write_balls(
    raw: Path,
    dataset_id: int,
    name: str,
    labels: dict[str, Any],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    n_train: int = 5,
    n_test: int = 1,
    channels: tuple[str, ...] = ("MRI",),
    **more: Any,
) -> Path:
    """A dataset: label 1 is a shell, 2 the ball in it, 3 (the ignore label, if there is one) is not annotated.

    Args:
        raw: folder of raw datasets.
        dataset_id: number.
        name: of the dataset.
        labels: as dataset.json has them.
        shape: voxels (z, y, x).
        spacing: size of a voxel (z, y, x).
        n_train: cases with labels for training.
        n_test: cases without.
        channels: names of the image's channels; the first shows the ball bright, the others dark.
        more: entries of dataset.json.
    """
    folder = raw / f"Dataset{dataset_id:03d}_{name}"
    rng = np.random.default_rng(dataset_id)
    for split, count in (("Tr", n_train), ("Ts", n_test)):
        for kind in ("images", "labels"):
            (folder / f"{kind}{split}").mkdir(parents=True)
        for index in range(count):
            where = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
            centre = rng.uniform(-0.2, 0.2, 3)
            distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(where, centre, strict=True)))
            label = (distance < 0.7).astype(np.uint8) + (distance < 0.4)
            arrays = {
                f"images{split}/ball_{index}_{channel:04d}": (
                    (-1) ** channel * 100.0 * label + rng.normal(0, 20, shape)
                ).astype(np.float32)
                for channel in range(len(channels))
            }
            if "ignore" in labels:
                label[:, : shape[1] // 4] = labels["ignore"]
            for file, array in {**arrays, f"labels{split}/ball_{index}": label}.items():
                volume = sitk.GetImageFromArray(array)
                volume.SetSpacing(spacing[::-1])
                sitk.WriteImage(volume, str(folder / file) + FILE_ENDING)
    generate_dataset_json(
        str(folder), dict(enumerate(channels)), labels, n_train, FILE_ENDING, dataset_name=name, **more
    )
    return folder
