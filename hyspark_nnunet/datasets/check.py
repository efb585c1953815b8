"""``hyspark_nnunet dataset check``: finds bad cases before a training does."""

import json
import os
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.datasets.case_checks import CheckJob, ambiguous_note, examine_case, flat_faults
from hyspark_nnunet.datasets.dataset_json import DATASET_JSON, RawDataset, listed_cases, read_dataset
from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.datasets.subjects import recorded_subjects, warning_of_splits

EXCLUDED = "excluded_cases.json"
BEFORE = "dataset.json.before_check"


def check(folder: Path, processes: int, as_json: bool = False, exclude_bad: bool = False) -> int:
    """Checks a dataset of nnUNet_raw and prints the faults.

    Args:
        folder: of dataset.json.
        processes: that read in parallel.
        as_json: print a JSON object instead of a table.
        exclude_bad: write dataset.json without the bad cases; keeps the original as ``BEFORE`` and lists the
            excluded cases and their faults in ``EXCLUDED``.

    Returns:
        exit status: 0 if there are no faults, or none are left.

    Raises:
        FileNotFoundError, ValueError: see ``read_dataset``; or no good case would be left.
    """
    dataset = read_dataset(folder)
    if not dataset.cases:
        raise ValueError(f"{folder} has no cases")
    faults, note = find_faults(dataset, processes)
    excluded = bool(faults) and exclude_bad
    if root := os.environ.get("nnUNet_preprocessed"):
        preprocessed = Path(root) / dataset.name
        notes = [note, warning_of_splits(preprocessed / "splits_final.json", recorded_subjects(dataset.content))]
        if excluded and (preprocessed / DATASET_JSON).is_file():
            notes.append(f"plan again: {preprocessed / DATASET_JSON} is that of all cases, and preprocessing reads it")
        note = "\n".join(filter(None, notes))
    if excluded:
        exclude(dataset, faults)
    said = f"{len(dataset.cases)} cases, {len(faults)} bad"
    expected = dataset.content.get("numTraining")
    if expected != len(dataset.cases):
        said += f"; {DATASET_JSON} has numTraining {expected}, which nnU-Net's integrity check will refuse"
    if excluded:
        said += f"; left out of {DATASET_JSON}, see {EXCLUDED}; the original is {BEFORE}"
    if as_json:
        report = {
            "dataset": dataset.name,
            "cases": len(dataset.cases),
            "bad": faults,
            "excluded": excluded,
            "note": note,
        }
        print(json.dumps(report, indent=1))
    else:
        if note:
            print(note)
        print(_table(faults) + f"{dataset.name}: {said}")
        if faults and not excluded:
            print("--exclude-bad writes dataset.json without them")
    return 1 if faults and not excluded else 0


def find_faults(dataset: RawDataset, processes: int) -> tuple[dict[str, list[str]], str]:
    """Faults by case, and a note on the others; of cases with the same voxels all but the first by name are faulty."""
    n_channels = len(dataset.channel_names)
    reader = _reader(dataset)
    jobs = [
        CheckJob(
            name,
            tuple(dataset.path(image) for image in files.images),
            dataset.path(files.label) if files.label else None,
            n_channels,
            reader,
        )
        for name, files in dataset.cases.items()
    ]
    faults: dict[str, list[str]] = {}
    digests: dict[str, list[str]] = {}
    flat: dict[str, str] = {}
    ambiguous: list[str] = []
    for job, examined in for_each(examine_case, jobs, processes, "checking"):
        if examined.faults:
            faults[job.name] = list(examined.faults)
        ambiguous += [job.name] * examined.ambiguous
        if examined.digest:
            digests.setdefault(examined.digest, []).append(job.name)
            flat[job.name] = examined.flat
    for name, fault in flat_faults(flat).items():
        faults.setdefault(name, []).append(fault)
    for same in digests.values():
        first, *others = sorted(same)
        for name in others:
            faults.setdefault(name, []).append(f"duplicate: the same voxels as {first}")
    return dict(sorted(faults.items())), ambiguous_note(ambiguous)


def _reader(dataset: RawDataset) -> str:
    """The class of nnU-Net that reads the dataset."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    examples = (dataset.path(files.images[0]) for files in dataset.cases.values() if files.images)
    try:
        return determine_reader_writer_from_dataset_json(dataset.content, verbose=False).__name__
    except RuntimeError:  # an ending that no reader names: nnU-Net tries them on the first file
        pass
    try:
        return determine_reader_writer_from_dataset_json(dataset.content, next(examples), True, False).__name__
    except (RuntimeError, StopIteration) as error:
        raise ValueError(
            f"no reader of nnU-Net takes the files of {dataset.folder}: file_ending in {DATASET_JSON} is "
            f"{dataset.content['file_ending']}"
        ) from error


def exclude(dataset: RawDataset, faults: Mapping[str, list[str]]) -> None:
    """Writes dataset.json without the faulty cases, and what was left out.

    Raises:
        ValueError: every case is faulty.
    """
    kept = {name: files for name, files in dataset.cases.items() if name not in faults}
    if not kept:
        raise ValueError(f"all {len(dataset.cases)} cases of {dataset.name} are bad: {DATASET_JSON} is left as it is")
    content = dataset.content | {"numTraining": len(kept), "dataset": listed_cases(kept)}
    path, before, list_path = (dataset.folder / name for name in (DATASET_JSON, BEFORE, EXCLUDED))
    earlier = json.loads(list_path.read_text(encoding="utf-8")) if list_path.exists() else {}
    if not before.exists():
        with replacing(before) as beside:
            shutil.copyfile(path, beside)
    for file, written in ((list_path, earlier | dict(faults)), (path, content)):
        with replacing(file) as beside:
            beside.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _table(faults: Mapping[str, list[str]]) -> str:
    if not faults:
        return ""
    width = max(len("case"), *(len(name) for name in faults))
    rows = [f"{'case':<{width}}  fault"]
    for name, found in faults.items():
        for i, fault in enumerate(found):
            rows.append(f"{name if i == 0 else '':<{width}}  {textwrap.shorten(fault, 300)}")
    return "\n".join(rows) + "\n\n"
