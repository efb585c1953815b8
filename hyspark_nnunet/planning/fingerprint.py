"""nnU-Net's fingerprint of a dataset, from a sample of its cases where there are too many to read them all."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from hyspark_nnunet.atomic_files import replacing

SAMPLE_KEY = "fingerprint_sample"  # in dataset_fingerprint.json and in plans
SEED = 12345


def extract_sampled_fingerprint(
    dataset: int, extractor_name: str, n_cases: int, processes: int, check_integrity: bool, clean: bool, show: bool
) -> None:
    """A fingerprint of a random sample of the cases, where it is missing; it says how many they are.

    Mirrors ``extract_fingerprints`` in nnunetv2/experiment_planning/plan_and_preprocess_api.py.

    Args:
        dataset: number.
        extractor_name: class of nnU-Net.
        n_cases: size of the sample.
        processes: that read in parallel.
        check_integrity: let nnU-Net check the dataset first.
        clean: extract a fingerprint that is there again.
        show: whether there is a progress bar.

    Raises:
        ValueError: less than one case.
    """
    if n_cases < 1:
        raise ValueError(f"--fingerprint-cases {n_cases} is not a number of cases: give 1 or more")
    extractor_class = recursive_find_python_class(
        str(Path(nnunetv2.__path__[0]) / "experiment_planning"), extractor_name, "nnunetv2.experiment_planning"
    )

    def sampled(dataset_id: int, n_processes: int, verbose: bool) -> _SampledExtractor:
        return _SampledExtractor(extractor_class(dataset_id, n_processes, verbose), n_cases)

    extract_fingerprint_dataset(dataset, sampled, processes, check_integrity, clean, False, show)


def note_sample(plans: dict[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Notes in plans whether their fingerprint is of a sample."""
    plans.pop(SAMPLE_KEY, None)
    if SAMPLE_KEY in fingerprint:
        plans[SAMPLE_KEY] = fingerprint[SAMPLE_KEY]


class _SampledExtractor:
    """Stands for an extractor of nnU-Net that sees a sample of the cases."""

    def __init__(self, extractor: DatasetFingerprintExtractor, n_cases: int) -> None:
        names = sorted(extractor.dataset)
        self._note = {"cases": min(n_cases, len(names)), "of": len(names), "seed": SEED}
        chosen = random.Random(SEED).sample(names, self._note["cases"])
        extractor.dataset = {name: extractor.dataset[name] for name in sorted(chosen)}
        self._extractor = extractor
        self.show_progress_bar = True

    def run(self, overwrite_existing: bool = False) -> dict[str, Any]:
        """Extracts the fingerprint where it is missing, and notes in it how many cases it is of."""
        file = Path(str(nnUNet_preprocessed)) / self._extractor.dataset_name / "dataset_fingerprint.json"
        if file.exists() and not overwrite_existing:
            print(f"{file} is there and stays; --clean extracts it again")
            return self._extractor.run(False)
        self._extractor.show_progress_bar = self.show_progress_bar
        self._extractor.run(True)
        fingerprint = json.loads(file.read_text(encoding="utf-8")) | {SAMPLE_KEY: self._note}
        with replacing(file) as beside:
            beside.write_text(json.dumps(fingerprint, indent=4), encoding="utf-8")
        print(f"Fingerprint of {self._note['cases']} of {self._note['of']} cases, chosen at random (seed {SEED})")
        return fingerprint
