"""``hyspark_nnunet dataset pool``: several raw datasets as one for pre-training, without copying an image."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from hyspark_nnunet.datasets.case_checks import READING_ERRORS
from hyspark_nnunet.datasets.case_names import usable_name
from hyspark_nnunet.datasets.case_writing import CaseJob, draw_check, made_cases, named
from hyspark_nnunet.datasets.dataset_json import (
    DATASET_JSON,
    CaseFiles,
    RawDataset,
    dataset_folder_name,
    dataset_json_text,
    find_dataset,
    read_dataset,
    refuse_taken_id,
)
from hyspark_nnunet.datasets.foreground import CT
from hyspark_nnunet.datasets.grouping import SUFFIX, Case
from hyspark_nnunet.datasets.scanning import Scan
from hyspark_nnunet.datasets.staging import built_beside, refuse_existing
from hyspark_nnunet.datasets.subjects import SUBJECTS, recorded_subjects
from hyspark_nnunet.datasets.volumes import READER, read_header, volume_ending


@dataclass(frozen=True)
class PoolOptions:
    """What ``pool`` is asked for.

    Attributes:
        sources: numbers or names of the datasets.
        dataset_id: number of the new one.
        name: of the new one.
        channels_from: the dataset whose channel names count; then ID=CHANNELS, such as 4=1 or 4=1,0: which channels
            of that dataset stand in their places. Empty: all datasets must have the same channels.
        holdout: files that list cases to leave out, with ":KEY" for a list in a JSON object.
        labels: "foreground" or "none", how label files are made where a dataset has none of this package.
        skip_bad, overwrite, processes: as in ``PrepareOptions``.
    """

    sources: tuple[str, ...]
    dataset_id: int
    name: str
    channels_from: tuple[str, ...] = ()
    holdout: tuple[str, ...] = ()
    labels: str = "foreground"
    skip_bad: bool = False
    overwrite: bool = False
    processes: int = 1


def pool(options: PoolOptions, raw: Path) -> Path:
    """Makes the pooled dataset; returns its folder.

    Raises:
        FileNotFoundError: a dataset or a list of cases is missing.
        ValueError: channels that differ, held-out cases that do not exist, a folder that would be overwritten.
    """
    target = raw / dataset_folder_name(options.dataset_id, options.name)
    folders = [find_dataset(source, raw) for source in options.sources]
    twice = sorted({folder.name for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ValueError(f"--from names {', '.join(twice)} more than once")
    if target in folders:
        raise ValueError(f"--from names {target.name}, the pool itself: choose another -d and -n, or other datasets")
    refuse_taken_id(target)
    refuse_existing(target, options.overwrite)
    datasets = [read_dataset(folder) for folder in folders]
    prefixes = [f"{folder.name.split('_')[0]}_" for folder in folders]
    if len(set(prefixes)) < len(prefixes):
        raise ValueError(f"two datasets share a number: {', '.join(folder.name for folder in folders)}; rename one")
    channel_names, chosen = _channels(datasets, options.channels_from)
    held_out = _held_out(options.holdout, datasets, prefixes)

    jobs: list[CaseJob] = []
    ready: dict[str, CaseFiles] = {}
    left_out: dict[str, str] = {}
    with built_beside(target, options.overwrite) as building:
        for dataset, prefix, channels in zip(datasets, prefixes, chosen, strict=True):
            for case, files in dataset.cases.items():
                if prefix + case in held_out:
                    continue
                name = usable_name(prefix + case)
                try:
                    paths = _files_of_channels(files, dataset, channels)
                    scans = tuple(_scan(dataset.path(path)) for path in paths)
                except READING_ERRORS as error:
                    left_out[name] = str(error)
                    continue
                images = tuple(_listed(path, dataset, target) for path in paths)
                if dataset.body_labels and files.label and files.label.endswith(".nii.gz"):
                    ready[name] = CaseFiles(images, _listed(files.label, dataset, target))
                    continue
                own_names = tuple(dataset.channel_names[i] for i in channels)  # how to find the body in them
                jobs.append(
                    CaseJob(Case(name, scans), images, own_names, str(building), "labelsTr", "listed", options.labels)
                )
        if not jobs and not ready and not left_out:
            raise ValueError("no case is left for the pool: all are held out")
        cases = made_cases(jobs, options.skip_bad, options.processes, left_out, ready)

        draw_check(building, target, cases)
        subjects = {
            usable_name(prefix + case): prefix + subject
            for dataset, prefix in zip(datasets, prefixes, strict=True)
            for case, subject in recorded_subjects(dataset.content).items()
        }
        subjects = {name: subject for name, subject in subjects.items() if name in cases}
        more = {
            "made_by": "dataset pool",
            **({SUBJECTS: subjects} if subjects else {}),
            "from": [dataset.name for dataset in datasets],
            "held_out": sorted(held_out),
            **({"left_out": left_out} if left_out else {}),
        }
        # their label files are used as they are
        with_ignore = any(dataset.body_labels and "ignore" in dataset.content["labels"] for dataset in datasets)
        text = dataset_json_text(channel_names, cases, options.labels, READER, more, with_ignore)
        (building / DATASET_JSON).write_text(text, encoding="utf-8")
    counted = ", ".join(
        f"{sum(name.startswith(prefix) for name in cases)} of {dataset.name}"
        for dataset, prefix in zip(datasets, prefixes, strict=True)
    )
    print(f"{target}: {len(cases)} cases ({counted}), channels {', '.join(channel_names)}; {len(held_out)} held out")
    if left_out:
        print(f"left out {len(left_out)} cases:\n{named(left_out, most=10)}")
    return target


def _channels(datasets: Sequence[RawDataset], said: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Channel names of the pool, and which channels of each dataset stand in their places."""
    described = "; ".join(f"{dataset.name}: {', '.join(dataset.channel_names)}" for dataset in datasets)
    if not said:
        if len({dataset.channel_names for dataset in datasets}) > 1:
            raise ValueError(
                f"the datasets differ in their channels ({described}), but nnU-Net normalises all "
                "cases alike: CT by the intensities of all scans, other channels scan by scan. --channels-from ID uses "
                "the channel names of that dataset for all cases; add ID=CHANNELS, such as 4=1,0, to choose "
                "channels of another"
            )
        return datasets[0].channel_names, [tuple(range(len(dataset.channel_names))) for dataset in datasets]
    leader = _one_of(datasets, said[0])
    choices: dict[str, tuple[int, ...]] = {}
    for choice in said[1:]:
        which, separator, numbers = choice.partition("=")
        if not separator or not all(number.isdigit() for number in numbers.split(",")):
            raise ValueError(f"--channels-from {choice}: write ID=CHANNELS, such as 4=1 or 4=1,0")
        choices[_one_of(datasets, which).name] = tuple(int(number) for number in numbers.split(","))
    first = choices.get(leader.name, tuple(range(len(leader.channel_names))))
    chosen = []
    for dataset in datasets:
        n = len(dataset.channel_names)
        channels = choices.get(dataset.name, tuple(range(n)))
        if any(channel >= n for channel in channels):
            raise ValueError(f"{dataset.name} has no channel {max(channels)}: it has {n}, counted from 0")
        if len(channels) != len(first):
            raise ValueError(
                f"{dataset.name} gives {len(channels)} channels, {leader.name} {len(first)} ({described}): choose with "
                f"--channels-from {said[0]} {int(dataset.name[7:10])}=CHANNELS"
            )
        chosen.append(channels)
    names = tuple(leader.channel_names[i] for i in first)
    mixed = [d.name for d, c in zip(datasets, chosen, strict=True) if tuple(d.channel_names[i] for i in c) != names]
    if mixed and CT in names:
        print(
            f"warning: {', '.join(mixed)} will be normalised as CT, clipped to the range of the whole pool; with "
            "--channels-from a dataset that is not CT, every scan is normalised by itself"
        )
    return names, chosen


def _one_of(datasets: Sequence[RawDataset], which: str) -> RawDataset:
    for dataset in datasets:
        if which == dataset.name or (which.isdigit() and int(which) == int(dataset.name[7:10])):
            return dataset
    raise ValueError(f"--channels-from {which} is not one of the datasets {', '.join(d.name for d in datasets)}")


def _held_out(lists: Sequence[str], datasets: Sequence[RawDataset], prefixes: Sequence[str]) -> set[str]:
    """Names in the pool of the cases that the lists name.

    Raises:
        ValueError: a name that no dataset has: what is to be held out would get in under another.
    """
    by_name: dict[str, set[str]] = {}
    for dataset, prefix in zip(datasets, prefixes, strict=True):
        for case in dataset.cases:
            pooled = prefix + case
            for name in (case, pooled, f"{dataset.name}/{case}", f"{int(dataset.name[7:10])}/{case}"):
                by_name.setdefault(name, set()).add(pooled)
    held_out: set[str] = set()
    unknown = []
    for entry in lists:
        for name in read_case_list(entry):
            if name in by_name:
                held_out |= by_name[name]
            else:
                unknown.append(name)
    if unknown:
        alike = [match for name in unknown[:1] for match in get_close_matches(name, by_name, 3)]
        hint = f" (did you mean {', '.join(alike)}?)" if alike else ""
        raise ValueError(
            f"{len(unknown)} cases to hold out are in none of the datasets: {', '.join(unknown[:10])}{hint}; remove "
            "them from the list if they belong to other datasets"
        )
    return held_out


def read_case_list(entry: str) -> list[str]:
    """Case names of a list: a text file with a name per line, or JSON; endings and channel suffixes are taken off.

    Args:
        entry: path of the file; of a JSON object, with ":KEY" after it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no list of names in it.
    """
    path, key = entry, ""
    if not os.path.isfile(path):
        path, _, key = entry.rpartition(":")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--holdout: no file {entry}; it must be a text file with a case per line, or JSON")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    names: object
    if path.lower().endswith(".json"):
        content = json.loads(text)
        if isinstance(content, Mapping) and key not in content:
            raise ValueError(f"{path} holds several lists, name one: {path}:KEY with {', '.join(map(str, content))}")
        names = content[key] if isinstance(content, Mapping) else content
    else:
        names = [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"{entry} is not a list of case names: one name per line, or a JSON list")
    return [_without_ending(name) for name in names]


def _without_ending(name: str) -> str:
    ending = volume_ending(name)
    if ending is None:
        return name
    match = SUFFIX.fullmatch(name[: -len(ending)])
    return match[1] if match else name[: -len(ending)]


def _files_of_channels(files: CaseFiles, dataset: RawDataset, channels: Sequence[int]) -> list[str]:
    """The files of the chosen channels; several channels may be in one file with four axes.

    Raises:
        ValueError: a case has too few or too many, or the choice would split a file.
    """
    n = len(dataset.channel_names)
    if len(files.images) == n:
        return [files.images[i] for i in channels]
    sizes = [read_header(dataset.path(image)).size for image in files.images]
    held = sum(size[3] if len(size) == 4 else 1 for size in sizes)
    if held != n:
        raise ValueError(f"{len(files.images)} files for {n} channels" + (f" ({held} volumes)" if sizes else ""))
    if tuple(channels) != tuple(range(n)):
        raise ValueError(
            f"its {n} channels are in {len(files.images)} files with four axes, so none can be chosen alone: store "
            "each channel as a file of its own"
        )
    return list(files.images)


def _listed(entry: str, dataset: RawDataset, target: Path) -> str:
    """An entry of a dataset's dataset.json as the pool lists it."""
    if os.path.isabs(os.path.expandvars(entry)):
        return entry
    if "$" in entry:
        return dataset.path(entry)
    return Path(os.path.relpath(dataset.folder / entry, target)).as_posix()


def _scan(path: str) -> Scan:
    ending = volume_ending(path)
    if ending is None:
        raise ValueError(
            f"{os.path.basename(path)} cannot be pooled: the pool is read by nnU-Net's {READER}, which takes .nii.gz, "
            ".nii, .nrrd, .mha, .mhd and .gipl; convert it"
        )
    return Scan(path, (path,), ending)
