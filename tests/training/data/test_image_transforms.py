"""nnU-Net's transforms as pre-training uses them."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from hyspark_nnunet.training.data.image_transforms import ImageOnly, pretraining_transforms

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
    with_labels, without = transforms(dummy_2d), pretraining_transforms(transforms(dummy_2d), "both")
    assert isinstance(without, ImageOnly)
    moved = 0
    for seed in range(8):
        expected, found = draw(with_labels, seed, size(dummy_2d)), draw(without, seed, size(dummy_2d))
        assert found["image"].shape == (2, *PATCH) and torch.equal(found["image"], expected["image"])
        assert expected["segmentation"].shape == (1, *PATCH) and found["segmentation"].numel() == 0
        moved += not torch.equal(found["image"], draw(without, 0, size(dummy_2d))["image"])
    assert moved > 0


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_only_transforms_that_move_voxels_remain(dummy_2d: bool) -> None:
    everything = transforms(dummy_2d)
    kept = [type(t).__name__ for t in pretraining_transforms(everything, "none").transforms.transforms]
    expected = ["SpatialTransform", "MirrorTransform"]
    if dummy_2d:
        expected = ["Convert3DTo2DTransform", "SpatialTransform", "Convert2DTo3DTransform", "MirrorTransform"]
    assert kept == expected
    assert len(everything.transforms) > len(kept)


@pytest.mark.parametrize("use_mask_for_norm", [(False, False), (True, False)])
@pytest.mark.parametrize("dummy_2d", [False, True])
def test_the_input_is_altered_and_the_target_is_clean(
    dummy_2d: bool, use_mask_for_norm: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brightness alone, always: the target is what remains of it divided out again."""
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    def halved(self, **sample):
        return sample | {"image": sample["image"] / 2}

    monkeypatch.setattr(RandomTransform, "__call__", halved)
    made = transforms(dummy_2d, use_mask_for_norm)
    times = 2 ** sum(isinstance(t, RandomTransform) for t in made.transforms)
    found = draw(pretraining_transforms(made, "input"), 3, size(dummy_2d))
    assert found["segmentation"].shape == found["image"].shape == (2, *PATCH)
    assert found["segmentation"].abs().max() > 1 and times > 1
    torch.testing.assert_close(found["image"] * times, found["segmentation"])
    # the clean image is that of a training without intensity changes, moved alike
    clean = draw(pretraining_transforms(transforms(dummy_2d, use_mask_for_norm), "none"), 3, size(dummy_2d))["image"]
    torch.testing.assert_close(found["segmentation"], clean)


def test_labels_stay_where_nnunet_masks_the_image_by_them() -> None:
    masked = transforms(use_mask_for_norm=(True, False))
    assert pretraining_transforms(masked, "both") is masked
    for augmentation in ("none", "input"):
        for seed in range(4):
            found = draw(pretraining_transforms(masked, augmentation), seed)
            where = draw(masked, seed)["image"]
            if augmentation == "none":
                assert found["segmentation"].shape == (1, *PATCH)
            assert found["image"].shape == where.shape and found["image"].isfinite().all()


def test_outside_of_the_mask_is_zero_in_the_clean_image_and_in_the_altered_one() -> None:
    transform = pretraining_transforms(transforms(use_mask_for_norm=(True, False)), "input")
    image, outside = torch.randn(2, 14, 20, 20), torch.full((1, 14, 20, 20), -1, dtype=torch.int16)
    for seed in range(8):
        np.random.seed(seed)
        torch.manual_seed(seed)
        found = transform(image=image.clone(), segmentation=outside)
        for part in found.values():
            assert part[0].abs().max() == 0 and part[1].abs().max() > 0


@pytest.mark.parametrize("use_mask_for_norm", [(False, False), (True, False)])
@pytest.mark.parametrize("augmentation", ["none", "input", "both"])
def test_the_ignore_label_moves_with_the_image(augmentation: str, use_mask_for_norm: tuple[bool, ...]) -> None:
    """The second channel is large where the label is: moved alike, both agree but for the border."""
    transform = pretraining_transforms(transforms(use_mask_for_norm=use_mask_for_norm), augmentation, ignore_label=3)
    labels = torch.ones(1, 14, 20, 20, dtype=torch.int16)
    labels[:, 2:10, 4:12, 3:17] = 3
    image = torch.where(labels == 3, 100.0, 1.0).repeat(2, 1, 1, 1)
    for seed in range(6):
        np.random.seed(seed)
        torch.manual_seed(seed)
        found = transform(image=image.clone(), segmentation=labels)
        target = found["segmentation"]
        assert target.shape == ((3 if augmentation == "input" else 1), *PATCH)
        ignored = ~target[-1:].bool()
        clean = target[1] if augmentation == "input" else found["image"][1]
        if augmentation == "both":
            continue  # intensities have changed
        assert 0.05 < ignored.float().mean() < 0.95
        assert ((clean > 50) == ignored[0]).float().mean() > 0.97


def size(dummy_2d: bool) -> tuple[int, ...]:
    # slices are not moved across each other
    return (PATCH[0] if dummy_2d else 14, 20, 20)
