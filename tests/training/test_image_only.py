"""nnU-Net's transforms without labels."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from hyspark_nnunet.training.image_only import ImageOnly, without_labels

PATCH = (12, 16, 16)


def transforms(dummy_2d: bool = False, use_mask_for_norm: tuple[bool, ...] = (False, False)) -> ComposeTransforms:
    rotation = (-0.5, 0.5)
    return nnUNetTrainer.get_training_transforms(
        PATCH, rotation, None, (0, 1, 2), dummy_2d, use_mask_for_norm=list(use_mask_for_norm)
    )


def draw(transform, seed: int, size: tuple[int, ...] = (14, 20, 20)) -> dict:
    np.random.seed(seed)
    torch.manual_seed(seed)
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, *size, dtype=torch.int16)
    labels[:, 4:8, 5:15, 5:15] = 1
    return transform(image=image, segmentation=labels)


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_the_image_is_the_same_as_with_labels(dummy_2d: bool) -> None:
    with_labels, without = transforms(dummy_2d), without_labels(transforms(dummy_2d))
    assert isinstance(without, ImageOnly)
    size = (PATCH[0] if dummy_2d else 14, 20, 20)  # slices are not moved across each other
    moved = 0
    for seed in range(8):
        expected, found = draw(with_labels, seed, size), draw(without, seed, size)
        assert found["image"].shape == (2, *PATCH) and torch.equal(found["image"], expected["image"])
        assert expected["segmentation"].shape == (1, *PATCH) and found["segmentation"].numel() == 0
        moved += not torch.equal(found["image"], draw(without, 0, size)["image"])
    assert moved > 0


def test_labels_stay_where_nnunet_masks_the_image_by_them() -> None:
    masked = transforms(use_mask_for_norm=(True, False))
    assert without_labels(masked) is masked
