"""nnU-Net's transforms for pre-training: without labels, with or without changes of intensity."""

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from hyspark_nnunet.recipe.fields import NO_AUGMENTATION, OF_INPUT

# transforms that do not change intensities
SPATIAL_TRANSFORMS = (
    Convert3DTo2DTransform,
    Convert2DTo3DTransform,
    SpatialTransform,
    MirrorTransform,
    MaskImageTransform,
)


def pretraining_transforms(
    transforms: ComposeTransforms, intensity_augmentation: str, ignore_label: int | None = None
) -> BasicTransform:
    """The transforms of pre-training, selected from those of nnU-Net's training.

    Args:
        transforms: of ``nnUNetTrainer.get_training_transforms``.
        intensity_augmentation: of the recipe: "none", "input" or "both".
        ignore_label: of the dataset; its voxels move with the image, so that the loss can leave them out.
    """
    parts = transforms.transforms
    needs_labels = any(isinstance(transform, MaskImageTransform) for transform in parts)
    if intensity_augmentation == OF_INPUT:
        spatial = [t for t in parts if isinstance(t, SPATIAL_TRANSFORMS)]
        intensity = [t for t in parts if isinstance(t, RandomTransform)]
        masking = [t for t in parts if isinstance(t, MaskImageTransform)]
        moved = ComposeTransforms(spatial)
        if ignore_label is not None:
            moved = CountedVoxels(moved, ignore_label, needs_labels)
        return CleanTarget(moved, ComposeTransforms([*intensity, *masking]), needs_labels, ignore_label is not None)
    if intensity_augmentation == NO_AUGMENTATION:
        transforms = ComposeTransforms([t for t in parts if isinstance(t, SPATIAL_TRANSFORMS)])
    if ignore_label is not None:
        return CountedVoxels(transforms, ignore_label, needs_labels)
    return transforms if needs_labels else ImageOnly(transforms)


class ImageOnly(BasicTransform):
    """Transforms only the image; the segmentation becomes an empty tensor.

    Labels are interpolated one by one, which takes longer than the image (benchmarks/loader.py).

    Args:
        transforms: for the image.
    """

    def __init__(self, transforms: BasicTransform) -> None:
        super().__init__()
        self.transforms = transforms

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """Returns the transformed image (C, *spatial) and an empty segmentation."""
        transformed = self.transforms(image=sample["image"])
        # nnU-Net's loader stacks the segmentations
        return {"image": transformed["image"], "segmentation": torch.empty(0, dtype=torch.int16)}


class CountedVoxels(BasicTransform):
    """Transforms the image, and which voxels do not have the ignore label.

    Args:
        transforms: for image and segmentation.
        ignore_label: of the dataset.
        needs_labels: they need the segmentation; otherwise only the ignore label is interpolated, which saves the time
            for all others.
    """

    def __init__(self, transforms: BasicTransform, ignore_label: int, needs_labels: bool) -> None:
        super().__init__()
        self.transforms, self.ignore_label, self.needs_labels = transforms, ignore_label, needs_labels

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """Returns the transformed image, and as "segmentation" a BoolTensor (1, *spatial), True = counts."""
        labels = sample["segmentation"]
        if not self.needs_labels:
            labels = torch.where(labels == self.ignore_label, labels, 0)
        transformed = self.transforms(image=sample["image"], segmentation=labels)
        counted = transformed["segmentation"][:1] != self.ignore_label
        return {**transformed, "segmentation": counted, "labels": transformed["segmentation"]}


class CleanTarget(BasicTransform):
    """Moves voxels, then changes intensities; the image before this change is returned as segmentation.

    The network sees the changed image and reconstructs the clean one. Source: AMAES (arXiv 2408.00640), section 2.

    Args:
        spatial: transforms that move voxels.
        intensity: transforms that change intensities.
        needs_labels: they need the segmentation (nnU-Net's "use_mask_for_norm").
        with_counted: ``spatial`` are ``CountedVoxels``.
    """

    def __init__(
        self, spatial: BasicTransform, intensity: BasicTransform, needs_labels: bool, with_counted: bool = False
    ) -> None:
        super().__init__()
        self.spatial, self.intensity, self.needs_labels = spatial, intensity, needs_labels
        self.with_counted = with_counted

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """Returns the changed image (C, *spatial), and the clean image as "segmentation".

        With ``with_counted``, a further channel of the clean image is 1 where a voxel counts.
        """
        labels = self.needs_labels or self.with_counted
        moved = self.spatial(**sample) if labels else self.spatial(image=sample["image"])
        clean: Tensor = moved["image"]
        target = torch.cat([clean, moved["segmentation"].to(clean.dtype)]) if self.with_counted else clean
        altered = self.intensity(image=clean.clone(), **_segmentation_of(moved))
        return {"image": altered["image"], "segmentation": target}


def _segmentation_of(moved: dict[str, Any]) -> dict[str, Any]:
    """What a transform of intensities may need of what was moved: the labels."""
    found = moved.get("labels", moved.get("segmentation"))
    return {} if found is None else {"segmentation": found}
