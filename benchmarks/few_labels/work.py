"""The work folder: where everything of the benchmark lies, and what nnU-Net's commands are told of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = Path(__file__).resolve().parent / "trainers"
PLUGINS = ROOT / "nnunetv2_plugins"


@dataclass(frozen=True)
class Work:
    """Folders of the benchmark.

    Args:
        root: of all of them.
    """

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed"

    @property
    def validation_labels(self) -> Path:
        return self.root / "validation_labels"

    @property
    def settings_file(self) -> Path:
        return self.root / "settings.json"

    @property
    def splits_file(self) -> Path:
        """``splits.json`` of the data that the folder was begun with."""
        return self.root / "splits.json"

    @property
    def prepared_file(self) -> Path:
        """Written when the datasets are ready: what was planned for them."""
        return self.root / "prepared.json"

    def results(self, arm: str) -> Path:
        """nnU-Net's results, a folder per arm: two arms may share trainer, plans and fold."""
        return self.root / "nnUNet_results" / arm

    def record(self, name: str) -> Path:
        """What is kept of a finished run; where it is missing, the run is not finished."""
        return self.root / "runs" / f"{name}.json"

    def cpu_seconds(self, name: str) -> Path:
        """A line per command of a run: the CPU seconds that it took."""
        return self.root / "cpu_seconds" / f"{name}.txt"

    def log(self, name: str) -> Path:
        """What the commands of a run have said."""
        return self.root / "logs" / f"{name}.txt"

    def lock(self, name: str) -> Path:
        """Held by whoever is at a run."""
        return self.root / "locks" / name

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
