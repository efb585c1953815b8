"""A small project for all tests of this folder, and commands in it that do not import nnU-Net again."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hyspark_nnunet.demo.synthetic_data import write_dataset
from tests.forked_commands import Order, server
from tests.nnunet_project import TINY_RECIPE, Project

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
DATASET = "Dataset006_SyntheticOrgans"
NOT_SET = "not set"
# nnU-Net's networks have no presets
SPARK = {"HYSPARK_PRESET": NOT_SET}
RECIPE = TINY_RECIPE | {
    "HYSPARK_NUM_EPOCHS": "3",
    "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "3",
    "HYSPARK_NUM_PICTURES": "0",
    "HYSPARK_SEED": "7",
}


@dataclass
class Run:
    """A command that was started: what it printed, and the record of its steps."""

    results: Path
    record: Path
    output: Path
    process: int
    returncode: int | None = None

    @property
    def printed(self) -> str:
        # the process opens the file when it gets to run
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def steps(self, rank: int = 0) -> list[dict]:
        lines = Path(f"{self.record}.{rank}").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def folder(self, trainer: str, fold: str = "0") -> Path:
        return self.results / DATASET / f"{trainer}__nnUNetPlans__3d_fullres" / f"fold_{fold}"


@dataclass
class Commands:
    """nnUNetv2_train in the project, in processes forked from one that has imported everything."""

    project: Project
    count: int = field(default=0)

    def environment(self, results: Path, record: Path, **variables: str) -> dict[str, str]:
        trainers = [str(HERE / "recording"), str(REPOSITORY / "nnunetv2_plugins")]
        fixed = {
            "nnUNet_results": str(results),
            "nnUNet_extTrainer": os.pathsep.join(trainers),
            "RECORD": str(record),
            "PYTHONPATH": str(REPOSITORY),
            "INCIDENT": "",
            "VALIDATE": "0",
        }
        found = self.project.variables() | RECIPE | fixed | variables
        return {name: value for name, value in found.items() if value != NOT_SET}

    def start(self, trainer: str, results: Path, *more: str, file_limit: int | None = None, **variables: str) -> Run:
        """Starts a training of fold 0; ``wait`` waits for it."""
        self.count += 1
        results.mkdir(parents=True, exist_ok=True)
        record, output = results / "record", results / f"printed_{self.count}.txt"
        argv = ["nnUNetv2_train", "6", "3d_fullres", "0", "-tr", trainer, "-device", "cpu", *more]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYSPARK_")}
        order = Order(
            argv,
            inherited | self.environment(results, record, **variables),
            str(output),
            line_buffering=True,
            forked_workers=False,  # the processes of a training are counted
            file_limit=file_limit,
        )
        return Run(results, record, output, server().start(order))

    def wait(self, run: Run) -> Run:
        run.returncode = server().wait()
        return run

    def train(self, trainer: str, results: Path, *more: str, returncode: int = 0, **settings) -> Run:
        run = self.wait(self.start(trainer, results, *more, **settings))
        assert run.returncode == returncode, f"ended with {run.returncode}:\n{run.printed[-6000:]}"
        return run


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    project = Project(tmp_path_factory.mktemp("long_trainings"))
    project.make_folders()
    write_dataset(project.raw, 6, "SyntheticOrgans", n_train=5, seed=1, shape=(32, 32, 32))
    project.plan_and_preprocess(6)
    return Commands(project)


def preprocessed_copy(commands: Commands, to: Path) -> Path:
    """A copy of the preprocessed data to damage; give it as nnUNet_preprocessed. Returns the configuration's folder."""
    shutil.copytree(commands.project.preprocessed, to)
    return to / DATASET / "nnUNetPlans_3d_fullres"
