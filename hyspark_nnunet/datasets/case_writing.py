"""The files of cases: images where they are to be written, the label of the foreground; made by workers."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from hyspark_nnunet.datasets.dataset_json import CaseFiles
from hyspark_nnunet.datasets.foreground import body_mask, full_mask
from hyspark_nnunet.datasets.grouping import Case
from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.datasets.volumes import WRITTEN_ENDING, read_header, read_series, read_volume, write_volume

PICTURE = "foreground_check.png"
PICTURED = 4  # cases
NAMED = 10  # cases in a message


class CaseJob(NamedTuple):
    """What a worker needs to make the files of one case."""

    case: Case
    listed: tuple[str, ...]
    channel_names: tuple[str, ...]
    building: str
    labels_folder: str
    files: str
    labels: str


def make_case(job: CaseJob) -> str | tuple[tuple[str, ...], str]:
    """Makes the files of one case, in a worker.

    Returns:
        its images and its label as dataset.json lists them; or why it failed.
    """
    try:
        return _make_case(job)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return f"{error}" or type(error).__name__


def named(problems: Mapping[str, str]) -> str:
    """The first problems, a line each, and how many more there are."""
    lines = [f"  {name}: {problem}" for name, problem in sorted(problems.items())[:NAMED]]
    return "\n".join(lines + ([f"  and {len(problems) - NAMED} more"] if len(problems) > NAMED else []))


def draw_check(folder: Path, target: Path, cases: Mapping[str, CaseFiles], resolve: Callable[[str], str]) -> None:
    """Draws some cases spread over the set into foreground_check.png.

    Args:
        folder: that is being built.
        target: what it will be called.
        cases: of the data set.
        resolve: makes an entry of dataset.json a path that exists now.
    """
    from hyspark_nnunet.datasets.foreground_picture import foreground_picture  # brings torch: not in the workers

    order = sorted(cases)
    picked = [order[i] for i in sorted({round(p) for p in np.linspace(0, len(order) - 1, PICTURED)})]
    drawn = [(name, resolve(cases[name].images[0]), resolve(str(cases[name].label))) for name in picked]
    foreground_picture(drawn, folder / PICTURE)


def made_cases(
    jobs: Sequence[CaseJob], skip_bad: bool, processes: int, left_out: dict[str, str]
) -> dict[str, CaseFiles]:
    """Makes the files of all cases in parallel.

    Args:
        jobs: one per case.
        skip_bad: leave out cases that fail.
        processes: that work in parallel.
        left_out: takes the failed cases and why.

    Raises:
        ValueError: cases failed and are not to be left out, or none is left.
    """
    cases: dict[str, CaseFiles] = {}
    failed: dict[str, str] = {}
    for job, outcome in for_each(make_case, jobs, processes, "cases"):
        if isinstance(outcome, str):
            failed[job.case.name] = outcome
        else:
            cases[job.case.name] = CaseFiles(*outcome)
    if failed and not skip_bad:
        raise ValueError(
            f"{len(failed)} of {len(jobs)} cases cannot be used, so nothing was made (--skip-bad leaves them out):\n"
            f"{named(failed)}"
        )
    left_out |= failed
    if not cases:
        raise ValueError(f"no case can be used:\n{named(failed)}")
    return cases


def _make_case(job: CaseJob) -> tuple[tuple[str, ...], str]:
    building, name = Path(job.building), job.case.name
    images: list[str] = []
    volumes: list[sitk.Image] = []
    for channel, (scan, listed) in enumerate(zip(job.case.scans, job.listed, strict=True)):
        placed = f"imagesTr/{name}_{channel:04d}{WRITTEN_ENDING}"
        volume = None
        if scan.is_series or (job.files == "copied" and scan.ending != WRITTEN_ENDING):
            volume = read_series(scan.files) if scan.is_series else read_volume(scan.files[0])
            (building / "imagesTr").mkdir(exist_ok=True)
            write_volume(volume, building / placed)
        elif job.files in ("copied", "linked"):
            (building / "imagesTr").mkdir(exist_ok=True)
            (shutil.copyfile if job.files == "copied" else os.symlink)(scan.files[0], building / placed)
        else:
            placed = listed
        images.append(placed)
        if job.labels == "foreground":
            volumes.append(volume if volume is not None else read_volume(scan.files[0]))
    label = f"{job.labels_folder}/{name}{WRITTEN_ENDING}"
    (building / job.labels_folder).mkdir(exist_ok=True)
    if job.labels == "foreground":
        mask = body_mask(volumes, job.channel_names)
    else:
        made = building / images[0]
        mask = full_mask(read_header(made if made.is_file() else job.case.scans[0].files[0]))
    write_volume(mask, building / label)
    return tuple(images), label
