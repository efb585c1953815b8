"""Matching segmentation heads by the names of their labels.

A head is one output channel of a 1^3 convolution. nnU-Net's heads are labels (softmax, in the order of their values)
or, if the dataset has regions, regions (sigmoid, in the order of dataset.json).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# beginning of the names of segmentation heads, of our networks and of nnU-Net's
HEADS = "decoder.seg_layers."


def head_labels(labels: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Names of a dataset's heads, in order, and whether they are regions.

    Mirrors nnunetv2/utilities/label_handling/label_handling.py: the label "ignore" has no head; with regions the
    background has none either.

    Args:
        labels: of dataset.json: value of each name, or the values of a region.
    """
    values = {name: np.unique(value).tolist() for name, value in labels.items() if name != "ignore"}
    # as in nnU-Net: a list of one value is not a region
    if any(isinstance(value, list | tuple) and len(value) > 1 for value in labels.values()):
        return [name for name, value in values.items() if value != [0]], True
    return sorted(values, key=lambda name: values[name][0]), False


def matching_heads(
    source_description: Mapping[str, Any], target_description: Mapping[str, Any], n_source: int, n_target: int
) -> tuple[dict[int, int], str]:
    """Assigns heads of the file to heads of the network.

    Args:
        source_description: of the file's network: ``labels`` (names of the heads) and ``regions``.
        target_description: of this network.
        n_source: heads in the file.
        n_target: heads of the network.

    Returns:
        head of the file by head of the network, and why the other heads have none.
    """
    source, target = source_description.get("labels"), target_description.get("labels")
    if not _names(source, n_source):
        return {}, "the file does not name its labels"
    if not _names(target, n_target):
        return {}, "the labels of this network are not known"
    assert source is not None and target is not None  # for the type checker
    if bool(source_description.get("regions")) != bool(target_description.get("regions")):
        kinds = ("regions", "labels") if source_description.get("regions") else ("labels", "regions")
        return {}, f"heads of {kinds[0]} in the file, of {kinds[1]} here"
    common = {target.index(name): source.index(name) for name in target if name in source}
    return common, f"labels not in the file: {', '.join(name for name in target if name not in source)}"


def _names(labels: Sequence[str] | None, count: int) -> bool:
    return isinstance(labels, list | tuple) and len(labels) == count and len(set(labels)) == count
