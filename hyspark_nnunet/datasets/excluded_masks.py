"""Masks of voxels that must not count in pre-training, such as blanked faces: finding them, and their label."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from hyspark_nnunet.datasets.case_checks import channel_differences, without_voxels
from hyspark_nnunet.datasets.dataset_json import IGNORE
from hyspark_nnunet.datasets.grouping import SUFFIX, Case
from hyspark_nnunet.datasets.scanning import find_scans
from hyspark_nnunet.datasets.volumes import channel_volumes, read_counted


def masks_of_cases(folder: Path, cases: Sequence[Case], processes: int) -> dict[str, str]:
    """The mask file of each case that has one, by case name.

    A mask has the path of the scan below its folder, with or without the suffix of the channel and with any ending; or
    the same file name anywhere, if only one mask and only one scan have this name.

    Args:
        folder: of the masks.
        cases: of the dataset.
        processes: that read in parallel.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: no mask fits any scan, or several masks fit one.
    """
    masks = find_scans(folder, processes=processes).scans
    by_path: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}
    for mask in masks:
        if not mask.is_series:
            by_path.setdefault(mask.relative, set()).add(mask.files[0])
            by_name.setdefault(_last(mask.relative), set()).add(mask.files[0])
    names_of = {case.name: _names(case) for case in cases}
    called = Counter(name for names in names_of.values() for name in {_last(name) for name in names})
    found = {}
    for case in cases:
        names = names_of[case.name]
        files = {file for name in names for file in by_path.get(name, ())}
        for name in map(_last, names if not files else []):
            same = by_name.get(name, set())
            # p1/ct must not take the mask p2/ct because it has none of its own
            files |= same if len(same) == 1 and called[name] == 1 else set()
        if len(files) > 1:
            raise ValueError(
                f"{len(files)} masks in {folder} fit the scan {case.scans[0].relative}: {', '.join(sorted(files))}. "
                "Remove all but one"
            )
        if files:
            found[case.name] = files.pop()
    if not found:
        raise ValueError(
            f"none of the {len(by_path)} masks in {folder} is called as a scan, such as {cases[0].scans[0].relative}: "
            "give each the path or the file name of its scan"
        )
    used = set(found.values())
    unused = sorted(path for path, files in by_path.items() if not files & used)
    others = f"; {len(unused)} masks fit no scan, such as {unused[0]}" if unused else ""
    print(f"{folder}: masks for {len(found)} of {len(cases)} cases{others}")
    return found


def _names(case: Case) -> list[str]:
    """Paths that a mask of the case may have."""
    relative = case.scans[0].relative
    match = SUFFIX.fullmatch(relative)
    return [relative, *([match[1]] if match else []), case.name]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def with_ignored(label: sitk.Image, mask_file: str) -> sitk.Image:
    """The label with the ignore label where the mask is not zero.

    Raises:
        ValueError: the mask cannot be read, or lies elsewhere than the image.
    """
    (mask, *_) = channel_volumes(read_counted(mask_file).image)
    faults = channel_differences([without_voxels(label), without_voxels(mask)])
    if faults:
        raise ValueError(f"{mask_file}: {'; '.join(faults).replace('channels 0 and 1', 'image and mask')}")
    array = sitk.GetArrayFromImage(label)
    array[sitk.GetArrayFromImage(mask) != 0] = IGNORE
    marked = sitk.GetImageFromArray(array.astype(np.uint8))
    marked.CopyInformation(label)
    return marked
