"""Writes the files of cases in workers: images that are copied or converted, and foreground labels."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from hyspark_nnunet.datasets.case_checks import (
    READING_ERRORS,
    ambiguous_note,
    channel_differences,
    flat_faults,
    flat_size,
    image_faults,
    without_voxels,
)
from hyspark_nnunet.datasets.ct_recognition import ct_fault
from hyspark_nnunet.datasets.dataset_json import CaseFiles, resolved
from hyspark_nnunet.datasets.dicom import read_series
from hyspark_nnunet.datasets.excluded_masks import with_ignored
from hyspark_nnunet.datasets.foreground import CT, body_mask, full_mask
from hyspark_nnunet.datasets.grouping import Case
from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.datasets.scanning import Scan
from hyspark_nnunet.datasets.volumes import (
    WRITTEN_ENDING,
    Counted,
    channel_volumes,
    printable,
    read_counted,
    write_volume,
)

PICTURE = "foreground_check.png"
PICTURED = 4  # cases


class CaseJob(NamedTuple):
    """What a worker needs to make the files of one case."""

    case: Case
    listed: tuple[str, ...]
    channel_names: tuple[str, ...]
    building: str
    labels_folder: str
    files: str
    labels: str
    recognised: bool = False
    excluded: str | None = None  # file of a mask of voxels that do not count

    @property
    def name(self) -> str:
        """Of the case."""
        return self.case.name


class Made(NamedTuple):
    """The files of a case as dataset.json lists them, and its size if it is flat, see ``flat_size``."""

    files: CaseFiles
    flat: str
    ambiguous: bool


def make_case(job: CaseJob) -> Made | str:
    """Makes the files of one case, in a worker; returns why it failed if it did."""
    made: list[Path] = []
    try:
        return _make_case(job, made)
    except READING_ERRORS as error:
        for path in made:
            path.unlink(missing_ok=True)
        return f"{error}" or type(error).__name__


def named(problems: Mapping[str, str], most: int | None = None) -> str:
    """The problems, a line each; at most some of them, and how many more there are."""
    lines = [f"  {printable(f'{name}: {problem}')}" for name, problem in sorted(problems.items())[:most]]
    return "\n".join(lines + ([f"  and {len(problems) - len(lines)} more"] if len(problems) > len(lines) else []))


def draw_check(folder: Path, target: Path, cases: Mapping[str, CaseFiles]) -> None:
    """Draws some cases spread over the set into foreground_check.png.

    Args:
        folder: that is being built.
        target: its final path.
        cases: of the dataset.
    """
    from hyspark_nnunet.datasets.foreground_picture import foreground_picture  # brings torch: not in the workers

    def resolve(listed: str) -> str:
        made = folder / os.path.expandvars(listed)  # an absolute path stays as it is
        return str(made) if made.exists() else resolved(listed, target)

    order = sorted(cases)
    picked = [order[i] for i in sorted({round(p) for p in np.linspace(0, len(order) - 1, PICTURED)})]
    drawn = [(name, resolve(cases[name].images[0]), resolve(str(cases[name].label))) for name in picked]
    try:
        foreground_picture(drawn, folder / PICTURE)
    except Exception as error:  # the picture is optional
        print(f"{PICTURE} is not drawn ({type(error).__name__}: {error}); the dataset is complete without it")


def made_cases(
    jobs: Sequence[CaseJob],
    skip_bad: bool,
    processes: int,
    left_out: dict[str, str],
    ready: Mapping[str, CaseFiles] | None = None,
) -> dict[str, CaseFiles]:
    """Makes the files of all cases in parallel.

    Args:
        jobs: one per case.
        skip_bad: leave out cases that fail.
        processes: that work in parallel.
        left_out: cases that cannot be used, and why; takes those that fail here, too.
        ready: cases whose files exist.

    Returns:
        the files by case, those of ``ready`` among them.

    Raises:
        ValueError: cases failed and are not to be left out, or none is left.
    """
    cases: dict[str, CaseFiles] = {}
    flat: dict[str, str] = {}
    ambiguous: list[str] = []
    total = len(jobs) + len(left_out) + len(ready or {})
    for job, outcome in for_each(make_case, jobs, processes, "cases"):
        if isinstance(outcome, str):
            left_out[job.case.name] = outcome
        else:
            cases[job.case.name] = outcome.files
            flat[job.case.name] = outcome.flat
            ambiguous += [job.case.name] * outcome.ambiguous
    for name, fault in flat_faults(flat).items():
        left_out[name] = fault
        for listed in (*cases[name].images, str(cases.pop(name).label)):
            if listed.startswith(("imagesTr/", f"{jobs[0].labels_folder}/")):
                (Path(jobs[0].building) / listed).unlink(missing_ok=True)
    cases |= ready or {}
    if note := ambiguous_note(ambiguous):
        print(note)
    if left_out and not (skip_bad and cases):
        way_out = "--skip-bad leaves them out" if cases else "no other is left"
        raise ValueError(
            f"{len(left_out)} of {total} cases cannot be used, so nothing was made ({way_out}):\n{named(left_out)}"
        )
    return cases


def _make_case(job: CaseJob, made: list[Path]) -> Made:
    building, name = Path(job.building), job.case.name
    images: list[str] = []
    volumes: list[sitk.Image] = []
    points: list[sitk.Image] = []
    n_channels = 0
    ambiguous = False
    faults: list[str] = []
    for channel, (scan, listed) in enumerate(zip(job.case.scans, job.listed, strict=True)):
        placed = building / f"imagesTr/{name}_{channel:04d}{WRITTEN_ENDING}"
        made.append(placed)
        counted = _take(scan, placed, job.files)
        images.append(f"imagesTr/{placed.name}" if os.path.lexists(placed) else listed)
        ambiguous |= counted.ambiguous
        where = f" in {os.path.basename(scan.files[0])}" if len(job.case.scans) > 1 else ""
        found = image_faults(counted)
        if not found and CT in job.channel_names[channel : channel + 1]:
            found += filter(None, [ct_fault(scan, counted.image, job.recognised)])
        faults += [fault + where for fault in found]
        points.append(without_voxels(counted.image))
        channels = channel_volumes(counted.image)
        n_channels += len(channels)
        volumes += channels if job.labels == "foreground" or not volumes else []  # otherwise one geometry is enough
    faults += channel_differences(points)
    if not faults and n_channels != len(job.channel_names):
        faults.append(
            f"wrong number of channels: {n_channels} instead of {len(job.channel_names)} (a file with four axes "
            "holds several volumes): store each as a file of its own"
        )
    if faults:
        raise ValueError("; ".join(faults))
    label = f"{job.labels_folder}/{name}{WRITTEN_ENDING}"
    (building / job.labels_folder).mkdir(exist_ok=True)
    made.append(building / label)
    mask = body_mask(volumes, job.channel_names) if job.labels == "foreground" else full_mask(volumes[0])
    write_volume(mask if job.excluded is None else with_ignored(mask, job.excluded), building / label)
    return Made(CaseFiles(tuple(images), label), flat_size(volumes[0].GetSize()), ambiguous)


def _take(scan: Scan, placed: Path, files: str) -> Counted:
    """Copies, links or converts a scan if asked to, and reads the file that nnU-Net will read."""
    converted = scan.is_series or (files == "copied" and scan.ending != WRITTEN_ENDING)
    if converted or files in ("copied", "linked"):
        placed.parent.mkdir(exist_ok=True)
    if converted:
        counted = Counted(read_series(scan.files)) if scan.is_series else read_counted(scan.files[0])
        write_volume(counted.image, placed)
        return counted
    if files == "listed":
        return read_counted(scan.files[0])
    (shutil.copyfile if files == "copied" else os.symlink)(scan.files[0], placed)
    return read_counted(placed)
