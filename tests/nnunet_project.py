"""A small nnU-Net project for tests: its folders, and nnU-Net's real commands on it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.forked_commands import Order, server

PRETRAINER, FINETUNER = "HySparKPretrainTrainer", "HySparKFinetuneTrainer"
TINY_RECIPE = {
    "HYSPARK_PRESET": "S",
    "HYSPARK_NUM_EPOCHS": "2",
    "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "2",
    "HYSPARK_NUM_VAL_ITERATIONS_PER_EPOCH": "1",
    "HYSPARK_NUM_PICTURES": "2",
    "HYSPARK_SAVE_EVERY": "1",
}


@dataclass(frozen=True)
class Project:
    """Folders of nnU-Net below one root.

    Args:
        root: of the folders.
        recipe: variables of every command.
    """

    root: Path
    recipe: Mapping[str, str] = field(default_factory=lambda: TINY_RECIPE)

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results"

    def make_folders(self) -> None:
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True)

    def variables(self) -> dict[str, str]:
        folders = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        return {name: str(self.root / name) for name in folders} | {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}

    def run(self, *command: str, ok: bool = True, **variables: str) -> str:
        """Runs a command of the running environment; returns what it printed.

        In a process that is forked from one that has imported nnU-Net; with PYTHONPATH, which counts when modules are
        imported, in a newly started one.

        Args:
            command: name and arguments.
            ok: whether it must succeed; False: it must fail.
            variables: beside those of the project and its recipe.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HYSPARK_")}
        environment = {**inherited, **self.variables(), **self.recipe, **variables}
        arguments = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        with tempfile.NamedTemporaryFile() as output:
            if "PYTHONPATH" in variables:
                null = subprocess.DEVNULL
                done = subprocess.run(
                    arguments, env=environment, stdout=output, stderr=output, stdin=null, timeout=900, check=False
                )
                returncode = done.returncode
            else:
                server().start(Order(arguments, environment, output.name))
                returncode = server().wait()
            printed = Path(output.name).read_text("utf-8", errors="replace")
        assert (returncode == 0) == ok, f"{' '.join(command)} ended with {returncode}:\n{printed[-6000:]}"
        return printed

    def plan_and_preprocess(self, *dataset_ids: int, configuration: str = "3d_fullres") -> None:
        ids = [str(i) for i in dataset_ids]
        # nnU-Net's planner does not take 0 loader processes
        arguments = ("-d", *ids, "-c", configuration, "-np", "1", "-npfp", "1")
        self.run("nnUNetv2_plan_and_preprocess", *arguments, nnUNet_n_proc_DA="1")

    def train(
        self,
        dataset_id: int,
        fold: str,
        trainer: str,
        *more: str,
        ok: bool = True,
        configuration: str = "3d_fullres",
        **variables: str,
    ) -> str:
        arguments = (str(dataset_id), configuration, fold, "-tr", trainer, "-device", "cpu", *more)
        return self.run("nnUNetv2_train", *arguments, ok=ok, **variables)

    def predict(
        self,
        dataset: str,
        fold: str,
        trainer: str,
        to: Path,
        *more: str,
        configuration: str = "3d_fullres",
        **variables: str,
    ) -> str:
        images = str(self.raw / dataset / "imagesTs")
        arguments = ("-d", dataset, "-c", configuration, "-f", fold, "-tr", trainer, "-i", images, "-o", str(to))
        return self.run("nnUNetv2_predict", *arguments, "-device", "cpu", "-npp", "1", "-nps", "1", *more, **variables)

    def fold_folder(
        self, dataset: str, trainer: str, fold: str, configuration: str = "3d_fullres", plans: str = "nnUNetPlans"
    ) -> Path:
        return self.results / dataset / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"
