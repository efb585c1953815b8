"""Class heads: nnU-Net's order of them, and which are taken over."""

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from hyspark_nnunet.checkpoints.heads import head_labels, matching_heads

LABELS = {"background": 0, "liver": 2, "spleen": 1, "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


@pytest.mark.parametrize(
    ("labels", "names", "are_regions"),
    [
        (LABELS, ["background", "spleen", "liver"], False),
        (REGIONS, ["whole", "core", "enhancing"], True),
        # a list of one value is no region to nnU-Net
        ({"background": 0, "organ": [1]}, ["background", "organ"], False),
    ],
)
def test_as_nnunet_orders_them(labels: dict, names: list[str], are_regions: bool) -> None:
    assert head_labels(labels) == (names, are_regions)
    manager = LabelManager(labels, [1, 2, 3] if are_regions else None)
    assert manager.has_regions == are_regions and manager.num_segmentation_heads == len(names)
    if are_regions:
        values = [tuple(r) if isinstance(r, list) else r for r in (labels[name] for name in names)]
        assert manager.foreground_regions == values


def description(labels: list[str], regions: bool = False) -> dict:
    return {"labels": labels, "regions": regions}


def test_by_name_wherever_they_stand() -> None:
    source, target = description(["background", "spleen", "liver"]), description(["background", "liver", "kidney"])
    heads, why = matching_heads(source, target, 3, 3)
    assert heads == {0: 0, 1: 2} and why == "labels not in the file: kidney"


def test_regions_are_no_labels() -> None:
    heads, why = matching_heads(description(["whole"], True), description(["whole"]), 1, 1)
    assert heads == {} and why == "heads of regions in the file, of labels here"


@pytest.mark.parametrize("source", [{}, description(["background"]), description(["a", "a"])])
def test_files_that_do_not_name_their_labels(source: dict) -> None:
    assert matching_heads(source, description(["a", "b"]), 2, 2) == ({}, "the file does not name its labels")
