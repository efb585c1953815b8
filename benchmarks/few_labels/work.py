"""The work folder: where everything of the benchmark lies, and what nnU-Net's commands are told of it."""

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINERS, PLUGINS = Path(__file__).resolve().parent / "trainers", ROOT / "nnunetv2_plugins"


class Work:
    """Folders and files of a benchmark.

    Attributes:
        raw, preprocessed: nnU-Net's.
        validation_labels: folder of the true labels.
        settings_file: the lengths and rates that it was begun with.
        splits_file: ``splits.json`` of the data that it was begun with.
        prepared_file: what was planned; written when the datasets are ready.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.preprocessed = root / "nnUNet_raw", root / "nnUNet_preprocessed"
        self.validation_labels, self.splits_file = root / "validation_labels", root / "splits.json"
        self.settings_file, self.prepared_file = root / "settings.json", root / "prepared.json"

    def results(self, arm: str) -> Path:
        """nnU-Net's results, a folder per arm: two arms may share trainer, plans and fold."""
        return self.root / "nnUNet_results" / arm

    def record(self, name: str) -> Path:
        """What is kept of a finished run; where it is missing, the run is not finished."""
        return self.root / "runs" / f"{name}.json"

    def log(self, name: str) -> Path:
        """What the commands of a run have printed."""
        return self._file("logs", f"{name}.txt")

    def cpu_seconds(self, name: str) -> Path:
        """A line per command of a run that has ended: the CPU seconds that it took."""
        return self._file("cpu_seconds", f"{name}.txt")

    def lock(self, name: str) -> Path:
        """Held by whoever is at a run."""
        return self._file("locks", name)

    def _file(self, folder: str, name: str) -> Path:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        return self.root / folder / name

    def environment(self, arm: str, threads: int, variables: Mapping[str, str]) -> dict[str, str]:
        """Variables of a command: nnU-Net's folders, both folders of trainers, and no recipe but the given one.

        Args:
            arm: whose results folder is nnU-Net's.
            threads: that the command takes.
            variables: the recipe, and what else is to be set; these win.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYSPARK_")}
        trainers = [str(TRAINERS), str(PLUGINS), *filter(None, [inherited.get("nnUNet_extTrainer")])]
        modules = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
        return {
            **inherited,
            "PYTHONPATH": os.pathsep.join(modules),
            "PYTHONUNBUFFERED": "1",
            "nnUNet_extTrainer": os.pathsep.join(trainers),
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results(arm)),
            "nnUNet_def_n_proc": str(threads),
            "OMP_NUM_THREADS": str(threads),
            **variables,
        }
