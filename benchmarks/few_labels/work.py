"""The work folder: its files, and nnU-Net's commands in it, each with a log and its CPU seconds, ended in order."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hyspark_nnunet.atomic_files import replacing

ROOT = Path(__file__).resolve().parents[2]
TRAINERS, PLUGINS = Path(__file__).resolve().parent / "trainers", ROOT / "nnunetv2_plugins"


class CommandFailed(RuntimeError):
    """A command did not do what it was started for; the message has the end of its log."""


class Work:
    """Folders and files of a benchmark, and its commands.

    Args:
        root: of the folders.
        threads: that each command takes.
    """

    def __init__(self, root: Path, threads: int = 1) -> None:
        self.root, self.threads = root, threads
        self.raw, self.preprocessed = root / "nnUNet_raw", root / "nnUNet_preprocessed"
        # splits.json of the data and settings that it was begun with
        self.splits_file, self.settings_file = root / "splits.json", root / "settings.json"
        # what was planned; written when the datasets are ready
        self.prepared_file = root / "prepared.json"

    def results(self, arm: str) -> Path:
        """nnU-Net's results, a folder per arm: two arms may share trainer, plans and fold."""
        return self.root / "nnUNet_results" / arm

    def record(self, name: str) -> Path:
        """What is kept of a finished run; where it is missing, the run is not finished."""
        return self.root / "runs" / f"{name}.json"

    def records(self) -> list[Path]:
        """The records of all finished runs."""
        return sorted((self.root / "runs").glob("*.json"))

    def log(self, name: str) -> Path:
        """What the commands of a run have printed."""
        return self._file("logs", f"{name}.txt")

    def cpu_seconds(self, name: str) -> Path:
        """A line per command of a run that has ended: the CPU seconds that it took."""
        return self._file("cpu_seconds", f"{name}.txt")

    def _file(self, folder: str, name: str) -> Path:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        return self.root / folder / name

    @contextmanager
    def alone(self, name: str, wait: bool = False) -> Iterator[int | None]:
        """A lock on a run, or None where another benchmark is at it and ``wait`` is not set."""
        with open(self._file("locks", name), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
            else:
                yield lock.fileno()

    def run(
        self, name: str, command: Sequence[str], variables: Mapping[str, str], arm: str = "", lock: int | None = None
    ) -> None:
        """Runs a command to its end; its output is appended to the log of the run.

        An interruption asks the command to end (our trainers then write a checkpoint) and waits for it.

        Args:
            name: of the run.
            command: a program installed beside this Python, or its path; and its arguments.
            variables: see ``environment``.
            arm: whose folder of results is nnU-Net's.
            lock: of ``alone``; the command holds it, too: if only the benchmark is killed, its training continues.

        Raises:
            CommandFailed: it failed.
        """
        log, interrupted = self.log(name), False
        with open(log, "ab") as file:
            shown = [*(f"{key}={value}" for key, value in variables.items()), shlex.join(command)]
            file.write(f"\n$ {' '.join(shown)}\n".encode())
            file.flush()
            before = os.times()  # of this process and of the commands that it has waited for
            process = subprocess.Popen(
                [Path(sys.executable).parent / command[0], *command[1:]],
                env=self.environment(arm, variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # out of reach of a Ctrl-C
                pass_fds=[] if lock is None else [lock],
            )
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
                process.terminate()
                process.wait()
        # loader processes of a training that a signal ended at once: they would hold the lock on its run
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with open(self.cpu_seconds(name), "a", encoding="utf-8") as text:
            text.write(f"{sum(os.times()[2:4]) - sum(before[2:4]):.1f}\n")
        if interrupted:
            raise KeyboardInterrupt
        if process.returncode:
            raise CommandFailed(f"{name}: {command[0]} ended with {process.returncode}. {self.end_of_log(name)}")

    def end_of_log(self, name: str) -> str:
        """The last lines of a log, as messages show them."""
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        return "\n".join([f"The end of {self.log(name)}:", *lines])

    def environment(self, arm: str, variables: Mapping[str, str]) -> dict[str, str]:
        """Variables of a command: nnU-Net's folders, both folders of trainers, and no recipe but the given one."""
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
            "nnUNet_def_n_proc": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            **variables,
        }


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    with replacing(file) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
