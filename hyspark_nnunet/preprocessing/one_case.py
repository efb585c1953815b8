"""Preprocessing of one case: nnU-Net's code, into files that are complete or not there."""

import functools
import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.cpu_allocator import keep_freed_memory, release_freed_memory
from hyspark_nnunet.datasets.staging import process_runs
from hyspark_nnunet.preprocessing.records import RecordedFolder, raw_files

ABANDONED_AFTER = 24 * 3600  # seconds


class CommonInput(NamedTuple):
    """What all cases of a run share; texts, because workers keep what they have parsed.

    Attributes:
        folder: of the preprocessed cases.
        plans: text of the plans file.
        configuration: its name.
        dataset_json: text of dataset.json, without the list of files.
        settings: digest of what preprocessing reads from these.
        labels_folder: gt_segmentations, which nnU-Net's validation reads.
    """

    folder: str
    plans: str
    configuration: str
    dataset_json: str
    settings: str
    labels_folder: str


class CaseJob(NamedTuple):
    """A case with absolute paths of its raw files; ``label_copy`` is the name of its copy in gt_segmentations."""

    name: str
    images: tuple[str, ...]
    label: str
    label_copy: str
    common: CommonInput


class Outcome(NamedTuple):
    """Bytes written, or the fault because of which there are none."""

    written: int
    fault: str


def preprocess_case(job: CaseJob) -> Outcome:
    """Preprocesses a case; an error is an outcome and does not end the run."""
    keep_freed_memory()
    try:
        return Outcome(_preprocess_case(job), "")
    except (Exception, MemoryError) as error:  # whatever nnU-Net's code raises for a bad scan
        return Outcome(0, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    finally:
        release_freed_memory()  # the peaks of different processes do not add up


def copy_label(label: str, target: Path) -> None:
    """Copies a label file to gt_segmentations, unless the copy is as new; mirrors ``preprocess_dataset``."""
    source = os.stat(label)
    if target.exists():
        copy = target.stat()
        if copy.st_size == source.st_size and copy.st_mtime >= source.st_mtime:
            return
    with replacing(target) as beside:
        shutil.copy2(label, beside)
        beside.chmod(0o644)


def remove_abandoned(writing: Path) -> None:
    """Removes what killed processes were writing: those of this machine that no longer run, and files a day old."""
    for folder in writing.iterdir():
        host, _, rest = folder.name.rpartition("~")[0].rpartition("~")
        try:
            old = time.time() - folder.stat().st_mtime > ABANDONED_AFTER
        except FileNotFoundError:
            continue
        if old or (host == socket.gethostname() and rest.isdecimal() and not process_runs(int(rest))):
            shutil.rmtree(folder, ignore_errors=True)


@functools.lru_cache(maxsize=4)
def _managers(plans: str, configuration: str) -> tuple[PlansManager, ConfigurationManager, DefaultPreprocessor]:
    plans_manager = PlansManager(json.loads(plans))
    configuration_manager = plans_manager.get_configuration(configuration)
    return plans_manager, configuration_manager, configuration_manager.preprocessor_class(verbose=False)


def _preprocess_case(job: CaseJob) -> int:
    common = job.common
    recorded = RecordedFolder(Path(common.folder))
    plans_manager, configuration_manager, preprocessor = _managers(common.plans, common.configuration)
    raw = raw_files([*job.images, job.label])
    prefix = f"{socket.gethostname()}~{os.getpid()}~"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=recorded.writing_folder()) as writing:
        preprocessor.run_case_save(
            os.path.join(writing, job.name),
            list(job.images),
            job.label,
            plans_manager,
            configuration_manager,
            json.loads(common.dataset_json),
        )
        written = {}
        for file in os.scandir(writing):
            with open(file.path, "rb+") as opened:
                os.fsync(opened.fileno())
            written[file.name.removeprefix(job.name)] = file.stat().st_size
        copy_label(job.label, Path(common.labels_folder) / job.label_copy)
        # no file of an earlier version may be left beside the new record; nnU-Net lists cases by their images
        names = sorted(written, key=lambda ending: ending in (".b2nd", ".npz"))
        for ending in reversed(names):
            (recorded.folder / (job.name + ending)).unlink(missing_ok=True)
        recorded.add(job.name, common.settings, raw, written)
        for ending in names:
            os.replace(os.path.join(writing, job.name + ending), recorded.folder / (job.name + ending))
    return sum(written.values())
