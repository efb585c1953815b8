"""nnU-Net's preprocessing case by case: it is resumed, divided among machines, and does not end at a bad case.

Mirrors ``DefaultPreprocessor.run`` in nnunetv2/preprocessing/preprocessors/default_preprocessor.py and
``preprocess_dataset`` in nnunetv2/experiment_planning/plan_and_preprocess_api.py, which begin by deleting all cases.
"""

import contextlib
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.datasets.dataset_json import DATASET_JSON, CaseFiles, read_dataset, resolved
from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.preprocessing.disk_space import GB, check_disk_space
from hyspark_nnunet.preprocessing.one_case import CaseJob, CommonInput, copy_label, preprocess_case, remove_abandoned
from hyspark_nnunet.preprocessing.parts import cases_of_part
from hyspark_nnunet.preprocessing.progress import Progress
from hyspark_nnunet.preprocessing.records import RecordedFolder, raw_files
from hyspark_nnunet.preprocessing.settings import preprocessing_settings, settings_digest
from hyspark_nnunet.preprocessing.stale import remove_stale, stale_cases, stale_text


@dataclass(frozen=True)
class PreprocessOptions:
    """How to preprocess.

    Attributes:
        part: number, from 1, and how many parts there are.
        overwrite: start over: cases of this part are done again, and all that do not fit the plans are removed.
        replace_stale: cases that do not fit the plans are removed without ``overwrite``.
        skip_bad: faulty cases are not counted as a failure.
        processes: that work in parallel.
        show_progress: whether there is a progress bar.
    """

    part: tuple[int, int] = (1, 1)
    overwrite: bool = False
    replace_stale: bool = False
    skip_bad: bool = False
    processes: int = 1
    show_progress: bool = True


def preprocess(raw: Path, preprocessed: Path, plans: str, configuration: str, options: PreprocessOptions) -> int:
    """Preprocesses the cases of a part that are not done.

    Args:
        raw: folder of the dataset in nnUNet_raw.
        preprocessed: its folder in nnUNet_preprocessed, with plans; a missing dataset.json is copied from ``raw``.
        plans: name of the plans.
        configuration: name.
        options: how.

    Returns:
        exit status: 0 if every case of the part is there, or ``skip_bad`` accepts those that are not.

    Raises:
        FileNotFoundError: no plans.
        ValueError: the folder holds cases that do not fit the plans; or there is no such configuration.
        OSError: not enough disk space.
        RuntimeError: a worker process was killed.
    """
    if not (preprocessed / DATASET_JSON).is_file() and preprocessed.is_dir():
        # planning copies it; plans that nnUNetv2_move_plans_between_datasets brought come without it
        with replacing(preprocessed / DATASET_JSON) as new:
            shutil.copyfile(raw / DATASET_JSON, new)
    run = _read_run(raw, preprocessed, plans, configuration)
    _make_room(run, options)
    mine = cases_of_part(run.sizes, options.part)
    faults = {name: run.faults[name] for name in mine if name in run.faults}
    jobs = [run.jobs[name] for name in mine if name in run.jobs]
    done = set() if options.overwrite else _done(run.recorded, jobs)
    to_do = [job for job in jobs if job.name not in done]
    if to_do:
        records = run.recorded.read().values()
        written = [record for record in records if record.settings == run.common.settings]
        print(check_disk_space(run.recorded.folder, len(to_do), run.plans_manager, run.configuration_manager, written))
    for name in done:
        copy_label(run.jobs[name].label, Path(run.common.labels_folder) / run.jobs[name].label_copy)
    progress = Progress(sum(run.sizes[job.name] for job in to_do), len(to_do), options.show_progress)
    with contextlib.closing(progress):
        faults |= _preprocess(run, to_do, options.processes, progress)
    what = "" if options.part[1] == 1 else f", part {options.part[0]} of {options.part[1]}"
    print(
        f"{raw.name}, {run.recorded.folder.name}{what}: {len(mine)} cases, {len(mine) - len(done) - len(faults)} "
        f"preprocessed ({progress.written / GB:.2f} GB in {progress.elapsed}), {len(done)} already done, "
        f"{len(faults)} failed"
    )
    if options.part[1] > 1:
        there = sum(".b2nd" in endings or ".npz" in endings for endings in run.recorded.cases().values())
        print(f"All parts: {there} of {len(run.sizes)} cases are done")
    if faults:
        print(_table(faults))
    return 1 if faults and not options.skip_bad else 0


class _Run(NamedTuple):
    """What files say before anything is written.

    Attributes:
        recorded: folder of the preprocessed cases.
        plans_manager, configuration_manager: of the plans.
        settings: what preprocessing reads of them.
        common: what all jobs share.
        jobs: by case.
        faults: by case, of those whose files are missing.
        sizes: of the raw images in bytes, of every case.
    """

    recorded: RecordedFolder
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    settings: dict[str, Any]
    common: CommonInput
    jobs: dict[str, CaseJob]
    faults: dict[str, str]
    sizes: dict[str, int]


def _read_run(raw: Path, preprocessed: Path, plans: str, configuration: str) -> _Run:
    plans_text, plans_manager = _read_plans(preprocessed / f"{plans}.json", configuration)
    configuration_manager = plans_manager.get_configuration(configuration)
    if configuration_manager.preprocessor_class.run is not DefaultPreprocessor.run:
        raise ValueError(
            f"preprocessor {configuration_manager.preprocessor_name} goes through a dataset in its own way: run "
            f"nnUNetv2_preprocess -plans_name {plans} -c {configuration}"
        )
    dataset_json = json.loads((preprocessed / DATASET_JSON).read_text(encoding="utf-8"))
    cases = _cases(raw, dataset_json.pop("dataset", None))
    settings = preprocessing_settings(plans_manager.plans, configuration_manager.configuration, dataset_json)
    folder = preprocessed / configuration_manager.data_identifier
    labels_folder = str(preprocessed / "gt_segmentations")
    common = CommonInput(
        str(folder), plans_text, configuration, json.dumps(dataset_json), settings_digest(settings), labels_folder
    )
    jobs, faults, sizes = {}, {}, {}
    for name, files in cases.items():
        sizes[name] = 0
        try:
            job = _job(name, files, raw, common, dataset_json["file_ending"])
            sizes[name] = sum(size for size, _ in raw_files(list(job.images)))
            jobs[name] = job
        except OSError as error:
            faults[name] = str(error)
    recorded = RecordedFolder(folder)
    return _Run(recorded, plans_manager, configuration_manager, settings, common, jobs, faults, sizes)


def _preprocess(run: _Run, jobs: Sequence[CaseJob], processes: int, progress: Progress) -> dict[str, str]:
    """Preprocesses; returns faults by case."""
    faults = {}
    try:
        for job, outcome in for_each(preprocess_case, jobs, processes, title="", piece=1):
            progress.add(run.sizes[job.name], outcome.written)
            if outcome.fault:
                faults[job.name] = outcome.fault
                progress.say(f"{job.name}: {_short(outcome.fault)}")
                _check_not_full(run.recorded.folder, progress, outcome.fault)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; finished cases are kept: run the same command again") from error
    return faults


def _read_plans(file: Path, configuration: str) -> tuple[str, PlansManager]:
    if not file.is_file():
        raise FileNotFoundError(
            f"no plans {file.stem} in {file.parent}: run hyspark_nnunet plan or nnUNetv2_plan_experiment, or name "
            "other plans with -p"
        )
    text = file.read_text(encoding="utf-8")
    plans_manager = PlansManager(json.loads(text))
    if configuration not in plans_manager.available_configurations:
        there = ", ".join(plans_manager.available_configurations)
        raise ValueError(f"{file} has no configuration {configuration}: there are {there}")
    return text, plans_manager


def _cases(raw: Path, listed: Mapping[str, Any] | None) -> dict[str, CaseFiles]:
    """Files by case, as the dataset.json that was planned lists them, or as they lie in imagesTr."""
    if listed is None:
        return read_dataset(raw).cases
    return {name: CaseFiles(tuple(files["images"]), files["label"]) for name, files in sorted(listed.items())}


def _job(name: str, files: CaseFiles, raw: Path, common: CommonInput, ending: str) -> CaseJob:
    if files.label is None:
        raise FileNotFoundError("no label file in labelsTr")
    images = tuple(resolved(image, raw) for image in files.images)
    return CaseJob(name, images, resolved(files.label, raw), name + ending, common)


def _make_room(run: _Run, options: PreprocessOptions) -> None:
    """Removes or refuses cases that do not fit the plans, so that no others are beside them."""
    recorded = run.recorded
    stale = stale_cases(recorded, set(run.sizes), run.common.settings)
    if stale:
        text = stale_text(recorded, stale, run.settings)
        if not options.overwrite and not options.replace_stale:
            raise ValueError(f"{text}. With --overwrite they are removed and preprocessed again")
        print(f"{text}. They are removed")
        remove_stale(recorded, stale)
    recorded.keep_settings(run.common.settings, run.settings)
    remove_abandoned(recorded.writing_folder())


def _done(recorded: RecordedFolder, jobs: Sequence[CaseJob]) -> set[str]:
    """The cases whose files are those of their last record, made with these settings from these raw files."""
    there, records, done = recorded.cases(), recorded.read(), set()
    for job in jobs:
        record = records.get(job.name)
        if (
            record is not None
            and record.settings == job.common.settings
            and recorded.sizes(job.name, there.get(job.name, [])) == record.files
            and raw_files([*job.images, job.label]) == record.raw
        ):
            done.add(job.name)
    return done


def _check_not_full(folder: Path, progress: Progress, fault: str) -> None:
    """A full disk is not the fault of a case."""
    free = shutil.disk_usage(folder).free
    if free < max(progress.mean_written, 1e6):
        raise OSError(f"disk full: {free / 1e6:.0f} MB are free in {folder} ({fault}); make room and run this again")


def _short(fault: str) -> str:
    return textwrap.shorten(fault, 300)


def _table(faults: Mapping[str, str]) -> str:
    width = max(len("case"), *(len(name) for name in faults))
    rows = [f"{name:<{width}}  {_short(fault)}" for name, fault in sorted(faults.items())]
    return "\n".join([f"{'case':<{width}}  error", *rows])
