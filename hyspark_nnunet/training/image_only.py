"""nnU-Net's transforms without their work on labels."""

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform


class ImageOnly(BasicTransform):
    """Transforms the image alone; the segmentation becomes an empty tensor.

    Interpolating labels is done per label and takes longer than the image (benchmarks/loader.py).

    Args:
        transforms: for the image.
    """

    def __init__(self, transforms: BasicTransform) -> None:
        super().__init__()
        self.transforms = transforms

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """``image`` (C, *spatial) and ``segmentation`` to the transformed image and an empty segmentation."""
        transformed = self.transforms(image=sample["image"])
        # nnU-Net's loader stacks what it gets here
        return {"image": transformed["image"], "segmentation": torch.empty(0, dtype=torch.int16)}


def without_labels(transforms: ComposeTransforms) -> BasicTransform:
    """The transforms for images alone, unless one of them needs the segmentation (nnU-Net's "use_mask_for_norm")."""
    needs_labels = any(isinstance(transform, MaskImageTransform) for transform in transforms.transforms)
    return transforms if needs_labels else ImageOnly(transforms)
