"""Runs the commands of the demo: prints each, shows its progress, and keeps its output in a log."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class DemoError(RuntimeError):
    """The demo cannot continue; the message says why."""


class Demo:
    """The folder, environment and current step of a demo.

    Args:
        folder: of everything that the demo writes.
        processes: of nnU-Net's preprocessing and evaluation.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self.processes = str(processes)
        self.started = time.time()
        self.step = 0
        self.environment = {name: str(folder / name) for name in NNUNET_FOLDERS}
        # few cores: one process augments while the others train
        self.environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": self.processes}

    def headline(self, text: str) -> None:
        """Prints the next step and the time since the start."""
        self.step += 1
        minutes, seconds = divmod(int(time.time() - self.started), 60)
        say(f"\n[{self.step}] {minutes}:{seconds:02d}  {text}")

    def run(
        self,
        command: Sequence[str],
        recipe: dict[str, Any] | None = None,
        progress: Callable[[str], str | None] = lambda line: None,
    ) -> None:
        """Runs a command, prints its progress, and writes its output to a log.

        Args:
            command: its first word is the name of a program installed beside this Python.
            recipe: environment variables of this command alone.
            progress: returns what is printed for a line of output; None: nothing.

        Raises:
            DemoError: the program is missing, or it failed; the message has the end of its log.
        """
        extra = {name: str(value) for name, value in (recipe or {}).items()}
        say("    " + " ".join([*(f"{k}={v}" for k, v in extra.items()), shlex.join(command)]))
        log = self.folder / "logs" / f"{self.step}_{command[0]}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        tail: deque[str] = deque(maxlen=30)
        environment = os.environ | self.environment | extra | {"PYTHONUNBUFFERED": "1"}
        with (
            log.open("w", encoding="utf-8") as file,
            subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            ) as process,
        ):
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                tail.append(line)
                shown = progress(line.rstrip())
                if shown is not None:
                    say(f"      {shown}")
        if process.returncode:
            raise DemoError(
                f"step {self.step} failed: {command[0]} ended with exit code {process.returncode}. "
                f"The end of {log}:\n\n" + "".join(tail)
            )


class EpochLine:
    """Joins nnU-Net's log lines of an epoch into one line."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.seen: dict[str, str] = {}

    def __call__(self, line: str) -> str | None:
        """Returns the line of an epoch when the epoch is complete, or a line that is shown by itself."""
        text = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?: ", "", line).strip()
        found = re.match(r"(Epoch time|Epoch|train_loss|val_loss|Pseudo dice):?\s+(.+)", text)
        if found:
            self.seen[found[1]] = re.sub(r"np\.float\d+\((.*?)\)", r"\1", found[2])
        if not text.startswith("Epoch time"):
            return text if re.match(r"Mean (reconstruction loss|Validation Dice)", text) else None
        parts = [f"epoch {int(self.seen.get('Epoch', 0)) + 1}/{self.epochs}"]
        names = {"train_loss": "train loss", "val_loss": "validation loss", "Pseudo dice": "Dice", "Epoch time": ""}
        parts += [f"{shown} {self.seen[name]}".strip() for name, shown in names.items() if name in self.seen]
        self.seen.clear()
        return "   ".join(parts)


def program(name: str) -> str:
    """Finds a program beside this Python, as in a virtual environment, or else on the path.

    Raises:
        DemoError: there is none.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise DemoError(f"{name} is not installed beside {sys.executable}: pip install nnunetv2")
    return found


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)
