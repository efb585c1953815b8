"""Whether scans are CT: by DICOM's modality, or by their intensities."""

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from hyspark_nnunet.datasets.foreground import CT
from hyspark_nnunet.datasets.grouping import Case
from hyspark_nnunet.datasets.scanning import Scan
from hyspark_nnunet.datasets.volumes import read_volume, voxels

SAMPLE = 5  # scans whose intensities are read to recognise the channel
NAME_THEM = (
    "name the channel with --channels CT or --channels MRI; nnU-Net normalises CT by the intensities of all scans, "
    "other channels scan by scan"
)


def recognised_channel(cases: Sequence[Case]) -> str:
    """CT, if most of the scans are: the modality of every DICOM series counts, and the intensities of a sample.

    ``ct_fault`` finds the others when they are read.

    Raises:
        ValueError: half of them or more are not CT.
    """
    scans = [case.scans[0] for case in cases]
    others = [scan for scan in scans if not scan.modality]
    picked = [others[i] for i in sorted({round(p) for p in np.linspace(0, len(others) - 1, SAMPLE)})] if others else []
    asked = [scan for scan in scans if scan.modality] + picked
    unlike = [scan for scan in asked if (scan.modality != CT if scan.modality else not _read_looks_like_ct(scan))]
    if asked and 2 * len(unlike) >= len(asked):
        named = ", ".join(f"{scan.relative}{f' ({scan.modality})' if scan.modality else ''}" for scan in unlike[:3])
        raise ValueError(f"the scans do not all look like CT (such as {named}): {NAME_THEM}")
    decided = [f"the modality of {len(asked) - len(picked)} DICOM series"] if len(asked) > len(picked) else []
    decided += [f"the intensities of {len(picked)} scans"] if picked else []
    print(f"channel 0: CT, by {' and '.join(decided)} (--channels names another)")
    return CT


def ct_fault(scan: Scan, image: sitk.Image, recognised: bool) -> str:
    """Why a scan of a channel named CT is not CT; empty if it may be.

    Args:
        scan: whose modality is known if it is a DICOM series.
        image: that was read.
        recognised: whether the channel's name was not given but recognised from other scans.
    """
    way_out = "--exclude it, or name the channel by --channels"
    if scan.modality:
        return "" if scan.modality == CT else f"its modality is {scan.modality}, but the channel is CT: {way_out}"
    if recognised and not _looks_like_ct(image):
        return f"it does not look like CT, as the other scans do: {way_out}"
    return ""


def _read_looks_like_ct(scan: Scan) -> bool:
    try:
        return _looks_like_ct(read_volume(scan.files[0]))
    except (ValueError, OSError):
        return True  # reported as unreadable later


def _looks_like_ct(image: sitk.Image) -> bool:
    array = voxels(image)
    # air and tissue; Hounsfield units end at 3071 in 12 bit, -3024 is padding of some scanners
    return array.size == 0 or bool(-4000 <= array.min() <= -900 and array.max() > 0 or not np.isfinite(array).all())
