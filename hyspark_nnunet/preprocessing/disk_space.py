"""How much disk space preprocessed cases take, estimated before the first is written."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from hyspark_nnunet.preprocessing.records import Record

GB = 1e9
ENOUGH_CASES = 10  # whose sizes say more than the fingerprint
BEST_COMPRESSION = 4  # of images by blosc2; beyond it, scans do not fit however well they compress


def check_disk_space(
    folder: Path,
    n_cases: int,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    done: Iterable[Record],
) -> str:
    """Compares the space that is needed with what is free.

    Args:
        folder: of the preprocessed cases, which is there.
        n_cases: that will be written.
        plans_manager, configuration_manager: of the plans.
        done: records of cases with these settings.

    Returns:
        a line that says both.

    Raises:
        OSError: the cases will not fit.
    """
    free = shutil.disk_usage(folder).free
    sizes = [sum(record.files.values()) for record in done]
    if len(sizes) >= ENOUGH_CASES:
        needed = least = n_cases * float(np.mean(sizes))
        how = f"about {needed / GB:.1f} GB, by the {len(sizes)} cases that are done"
    else:
        voxels = _voxels_of_a_case(folder.parent, plans_manager, configuration_manager)
        if voxels is None:
            return f"Disk space: not estimated, because there is no fingerprint; {free / GB:.1f} GB are free"
        channels = len(configuration_manager.normalization_schemes)
        needed = n_cases * voxels * channels * 4  # float32; labels hardly count when compressed
        least = needed / BEST_COMPRESSION
        how = f"at most {needed / GB:.1f} GB, by the fingerprint and without compression"
    line = f"Disk space for {n_cases} cases: {how}; {free / GB:.1f} GB are free"
    if least > free:
        raise OSError(f"{line}, too little: make room in {folder}")
    return line if needed <= free else f"{line}, which may be too little"


def _voxels_of_a_case(
    dataset_folder: Path, plans_manager: PlansManager, configuration_manager: ConfigurationManager
) -> float | None:
    file = dataset_folder / "dataset_fingerprint.json"
    if not file.exists():
        return None
    fingerprint = json.loads(file.read_text(encoding="utf-8"))
    order = plans_manager.transpose_forward
    voxels = []
    for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True):
        old = [spacing[axis] for axis in order]
        target = list(configuration_manager.spacing)
        if len(target) < len(old):
            target = [old[0], *target]
        voxels.append(np.prod(compute_new_shape([shape[axis] for axis in order], old, target), dtype=np.float64))
    return float(np.mean(voxels))
