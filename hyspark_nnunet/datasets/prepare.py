"""``hyspark_nnunet dataset prepare``: from a folder of scans to a dataset that nnU-Net preprocesses."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyspark_nnunet.datasets.case_writing import CaseJob, draw_check, made_cases, named
from hyspark_nnunet.datasets.ct_recognition import recognised_channel
from hyspark_nnunet.datasets.dataset_json import (
    DATASET_JSON,
    CaseFiles,
    dataset_folder_name,
    dataset_json_text,
    read_dataset,
    refuse_taken_id,
)
from hyspark_nnunet.datasets.excluded_masks import masks_of_cases
from hyspark_nnunet.datasets.grouping import Case, cases_by_folder, cases_by_suffix
from hyspark_nnunet.datasets.in_place import add_to_layout
from hyspark_nnunet.datasets.scanning import Scan, find_scans, skipped_text, spread_text
from hyspark_nnunet.datasets.staging import built_beside, refuse_existing
from hyspark_nnunet.datasets.subjects import SUBJECTS, subjects_of_cases
from hyspark_nnunet.datasets.volumes import READER, WRITTEN_ENDING


@dataclass(frozen=True)
class PrepareOptions:
    """What ``prepare`` is asked for.

    Attributes:
        folder: of the scans as the user wrote it, $VARIABLES kept; None if ``channels`` names folders.
        dataset_id: number in nnUNet_raw; None: of ``folder``, which is a DatasetXXX_Name with imagesTr.
        name: of the dataset; None: as ``dataset_id``.
        channels: NAME, or NAME=FOLDER, in order; empty: one channel, CT if the scans look like it.
        files: "listed" where they lie, "copied" or "linked".
        labels: "foreground" or "none" (everything is foreground).
        relative: list paths relative to the dataset's folder.
        convert: whether DICOM series, which nnU-Net does not read, may be written as NIfTI.
        numbers_in_names: a trailing _0001 is part of a scan's name, not a channel.
        include, exclude: patterns of paths.
        exclude_masks: folder of masks of voxels that get the ignore label; see ``masks_of_cases``.
        group_by: how to find the subject of a scan; see ``subjects_of_cases``.
        skip_bad: leave out incomplete and unreadable cases.
        overwrite: replace a dataset this package made.
        processes: that work in parallel.
    """

    folder: str | None
    dataset_id: int | None = None
    name: str | None = None
    channels: tuple[str, ...] = ()
    files: str = "listed"
    labels: str = "foreground"
    relative: bool = False
    convert: bool = True
    numbers_in_names: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exclude_masks: str | None = None
    group_by: str | None = None
    skip_bad: bool = False
    overwrite: bool = False
    processes: int = 1


def prepare(options: PrepareOptions, raw: Path) -> Path:
    """Makes the dataset; returns its folder.

    Raises:
        FileNotFoundError: no such folder, or no scans in it.
        ValueError: what was found cannot be one dataset, or would overwrite something; with the way out.
    """
    target, in_place = _target(options, raw)
    if in_place and options.files != "listed":
        raise ValueError(f"{target} is the dataset itself: its scans stay where they are, without --copy and --link")
    if not in_place:
        refuse_taken_id(target)
        refuse_existing(target, options.overwrite)
    names, scans, roots = _scans_by_channel(options)
    if names and all(name in roots for name in names):
        grouped = cases_by_folder(scans)
    else:
        grouped = cases_by_suffix(scans[""], len(names) or None, options.numbers_in_names)
    everything = [scan for found in scans.values() for scan in found]
    _refuse_unfit(everything, options, target, in_place)
    left_out = grouped.incomplete | _misread_paths(grouped.cases, options)
    channel_names = names or (recognised_channel(grouped.cases),)
    masks = {}
    if options.exclude_masks is not None:
        masks = masks_of_cases(_expanded(options.exclude_masks), grouped.cases, options.processes)
    subjects = {} if options.group_by is None else subjects_of_cases(grouped.cases, options.group_by)

    def make(building: Path, labels_folder: str) -> None:
        jobs = [
            CaseJob(
                case,
                tuple(_listed(scan, roots, options, target) for scan in case.scans),
                channel_names,
                str(building),
                labels_folder,
                options.files,
                options.labels,
                recognised=not names,
                excluded=masks.get(case.name),
            )
            for case in grouped.cases
            if case.name not in left_out
        ]
        cases = made_cases(jobs, options.skip_bad, options.processes, left_out)
        kept = {name: subject for name, subject in subjects.items() if name in cases}
        _finish(building, target, channel_names, cases, options.labels, left_out, kept, with_ignore=bool(masks))

    if in_place:
        add_to_layout(target, options.overwrite, make)
    else:
        with built_beside(target, options.overwrite) as building:
            make(building, "labelsTr")
    print(f"{target}: {len(read_dataset(target).cases)} cases, channels {', '.join(channel_names)}")
    return target


def _target(options: PrepareOptions, raw: Path) -> tuple[Path, bool]:
    """The dataset's folder, and whether the scans lie in it already in nnU-Net's layout."""
    home = _expanded(options.folder) if options.folder else None
    if home is not None and home.name == "imagesTr":
        home = home.parent
    layout = home is not None and (home / "imagesTr").is_dir() and home.name[:7] == "Dataset"
    if options.dataset_id is None or options.name is None:
        if not layout or home is None or (options.dataset_id, options.name) != (None, None):
            raise ValueError("give the new dataset a number and a name: -d 60 -n TotalSegmentator")
        dataset_folder_name(int(home.name[7:10]) if home.name[7:10].isdigit() else 0, home.name[11:])
        return home, True
    target = raw / dataset_folder_name(options.dataset_id, options.name)
    return target, home is not None and os.path.realpath(home) == os.path.realpath(target)


def _scans_by_channel(options: PrepareOptions) -> tuple[tuple[str, ...], dict[str, list[Scan]], dict[str, str]]:
    """Channel names, scans per channel ("" for all in one folder), and the folder of each as the user wrote it."""
    pairs = [channel.partition("=") for channel in options.channels]
    names = tuple(name for name, _, _ in pairs)
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"channel names must not be empty or repeated: --channels {' '.join(options.channels)}")
    with_folder = [bool(separator) for _, separator, _ in pairs]
    if any(with_folder) and not all(with_folder):
        raise ValueError(f"--channels takes names or NAME=FOLDER, not both: {' '.join(options.channels)}")
    roots = {name: folder for name, _, folder in pairs} if any(with_folder) else {"": options.folder or ""}
    if any(with_folder) and options.folder:
        roots = {name: os.path.join(options.folder, folder) for name, folder in roots.items()}
    if not all(roots.values()):
        raise ValueError("no folder of scans: give one, or --channels T1=FOLDER T2=FOLDER")
    found = {}
    for name, root in roots.items():
        result = find_scans(_expanded(root), options.include, options.exclude, options.processes)
        if result.skipped:
            print(f"{root}: skipped: {skipped_text(result.skipped)}")
        if result.spread:
            print(f"{root}: {spread_text(result.spread)}")
        found[name] = result.scans
    return names, found, roots


def _refuse_unfit(scans: Sequence[Scan], options: PrepareOptions, target: Path, in_place: bool) -> None:
    series = [scan for scan in scans if scan.is_series]
    if series and not options.convert:
        raise ValueError(
            f"{len(series)} DICOM series, {series[0].relative} the first: nnU-Net reads no series; omit --no-copy "
            "to write each once as .nii.gz"
        )
    if series and in_place:
        raise ValueError(
            f"{len(series)} DICOM series in {target / 'imagesTr'}, {series[0].relative} the first: nnU-Net reads "
            "no series, and prepare does not write into a folder of your scans; choose another -d and -n"
        )
    others = sorted({scan.ending for scan in scans if scan.ending not in (WRITTEN_ENDING, ".dcm")})
    if options.files == "linked" and others:
        raise ValueError(
            f"--link takes {WRITTEN_ENDING} only, because a link cannot change the format of {', '.join(others)}: "
            "use --copy, or neither option to list the files without copying them"
        )
    for scan in scans:
        if not in_place and Path(scan.files[0]).is_relative_to(target):
            raise ValueError(
                f"{scan.files[0]} is inside {target}, the folder of the new dataset: choose another -d or -n"
            )


def _misread_paths(cases: Sequence[Case], options: PrepareOptions) -> dict[str, str]:
    """Cases with a file in whose path nnU-Net would replace a variable, and the fault."""
    if options.files != "listed":
        return {}
    files = [(case.name, scan.files[0]) for case in cases for scan in case.scans if not scan.is_series]
    return {
        name: f"nnU-Net would read a part of {file} as a variable: rename it, or use --copy"
        for name, file in files
        if os.path.expandvars(file) != file
    }


def _listed(scan: Scan, roots: Mapping[str, str], options: PrepareOptions, target: Path) -> str:
    """How dataset.json is to call a scan that stays where it lies."""
    path = scan.files[0]
    for root in roots.values():
        expanded = str(_expanded(root))
        if "$" in root and Path(path).is_relative_to(expanded):
            return f"{root.rstrip('/')}/{Path(path).relative_to(expanded).as_posix()}"
    if options.relative or Path(path).is_relative_to(target):
        return Path(os.path.relpath(path, target)).as_posix()
    return path


def _finish(
    building: Path,
    target: Path,
    channel_names: Sequence[str],
    cases: Mapping[str, CaseFiles],
    labels: str,
    left_out: Mapping[str, str],
    subjects: Mapping[str, str],
    with_ignore: bool,
) -> None:
    """The picture, then dataset.json: last, it makes a folder a dataset."""
    if labels == "foreground":
        draw_check(building, target, cases)
    more = {
        "made_by": "dataset prepare",
        **({"left_out": dict(left_out)} if left_out else {}),
        **({SUBJECTS: dict(subjects)} if subjects else {}),
    }
    (building / DATASET_JSON).write_text(
        dataset_json_text(channel_names, cases, labels, READER, more, with_ignore), encoding="utf-8"
    )
    if left_out:
        print(f"left out {len(left_out)} cases:\n{named(left_out, most=10)}")


def _expanded(path: str) -> Path:
    return Path(os.path.abspath(os.path.expandvars(os.path.expanduser(path))))
