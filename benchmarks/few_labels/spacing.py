"""What a spacing costs in Dice: python -m benchmarks.few_labels.spacing LABELS SPACING...

LABELS is a folder of label files; a spacing is three numbers in quotes, in mm, for the axes of the arrays (z, y, x).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape


def dice_of_resampled_labels(folder: Path, spacing: Sequence[float]) -> float:
    """The Dice that a perfect network of this spacing reaches at the scans' own spacing.

    Each label is resampled there and back by nnU-Net's linear interpolation, as the network's output is.

    Args:
        folder: of labels.
        spacing: in mm, for the axes as nnU-Net reads them, before its plan transposes them.

    Returns:
        the mean over labels of the mean over cases.

    Raises:
        FileNotFoundError: the folder holds no labels.
    """
    found: dict[int, list[float]] = {}
    for file in sorted(file for file in folder.glob("*") if file.suffix != ".json"):
        segmentation, properties = SimpleITKIO().read_seg(str(file))
        own, shape = properties["spacing"], segmentation.shape[1:]
        labels = [int(label) for label in np.unique(segmentation)]
        one_hot = np.concatenate([segmentation == label for label in labels]).astype(np.float32)
        coarse = compute_new_shape(shape, own, spacing)
        there = resample_data_or_seg_to_shape(one_hot, coarse, own, spacing, order=1, order_z=0)
        back = resample_data_or_seg_to_shape(there, shape, spacing, own, order=1, order_z=0).argmax(0)
        for channel, label in enumerate(labels):
            if label:
                before, after = segmentation[0] == label, back == channel
                found.setdefault(label, []).append(float(2 * (before & after).sum() / (before.sum() + after.sum())))
    if not found:
        raise FileNotFoundError(f"{folder} holds no labels: name the labelsTr of a dataset in nnU-Net's raw layout")
    return float(np.mean([np.mean(dice) for dice in found.values()]))


if __name__ == "__main__":
    for each in sys.argv[2:]:
        dice = dice_of_resampled_labels(Path(sys.argv[1]), [float(word) for word in each.split()])
        print(f"{each}: {100 * dice:.1f}")
