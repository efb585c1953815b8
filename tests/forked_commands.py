"""nnU-Net's commands and ours in processes forked from one that has imported nnU-Net: without seconds of importing.

A command is the function of its entry point, called in a process of its own with the arguments, environment, working
folder and output of the command. Only what is read at an import differs from a newly started process:
``ENVIRONMENT`` and ``PYTHONPATH`` (of which modules are found that nothing has tried to import).

As a script this is the server. It reads a JSON line per command from its standard input, an ``Order``, and answers
with the process' id, and with its return code when it has ended.
"""

import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# nnU-Net reads the number of its processes when it is imported, the libraries below torch that of their threads
ENVIRONMENT = {"nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
IMPORTED = (
    "nnunetv2.run.run_training",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
    "hyspark_nnunet.training.hyspark",
)


@dataclass(frozen=True)
class Order:
    """A command.

    Attributes:
        argv: path of the command and its arguments.
        environment: all of its variables.
        output: file for what it prints.
        timeout: seconds after which it ends by SIGALRM.
        line_buffering: whether each line is in the file as soon as it is printed.
        forked_workers: whether processes that it spawns are also forked from one that has imported nnU-Net.
        file_limit: bytes that a file may have; None: no limit.
    """

    argv: list[str]
    environment: dict[str, str]
    output: str
    timeout: int = 900
    line_buffering: bool = False
    forked_workers: bool = True
    file_limit: int | None = None


class Server:
    """The process that forks; one command at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT,
            text=True,
        )
        assert self.process.stdin and self.process.stdout
        self.orders, self.answers = self.process.stdin, self.process.stdout

    def start(self, order: Order) -> int:
        """The id of the command's process."""
        print(json.dumps(asdict(order)), file=self.orders, flush=True)
        return json.loads(self.answers.readline())

    def wait(self) -> int:
        """The return code of the command, when it has ended."""
        return json.loads(self.answers.readline())


@functools.cache
def server() -> Server:
    """The server of this process; it ends with it."""
    return Server()


@functools.cache
def entry_points() -> dict[str, tuple[str, str]]:
    """Module and function of every command of the environment."""
    from importlib.metadata import entry_points

    return {point.name: (point.module, point.attr) for point in entry_points(group="console_scripts")}


def fork_workers() -> None:
    """Lets multiprocessing's "spawn" take processes from a copy of this one, which has begun nothing yet."""
    from multiprocessing import context, forkserver, resource_tracker

    def fork(path: str, arguments: list[str], descriptors: list[int]) -> int:
        if process := os.fork():
            return process
        kept = sorted({0, 1, 2, *descriptors})
        for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low + 1, high)
        try:
            exec(arguments[-1], {})  # what "python -c" would run
        finally:
            os._exit(0)

    resource_tracker.ensure_running()
    spawned, forkserver.util.spawnv_passfds = forkserver.util.spawnv_passfds, fork  # type: ignore[attr-defined]
    forkserver.ensure_running()
    forkserver.util.spawnv_passfds = spawned  # type: ignore[attr-defined]
    contexts = context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["forkserver"]


def run(order: Order) -> object:
    """Calls the command's function in this process, which is to end with it."""
    import numpy as np

    os.environ.clear()
    os.environ.update(order.environment)
    sys.path[:0] = filter(None, order.environment.get("PYTHONPATH", "").split(os.pathsep))
    output = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for opened, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(opened, standard)
    sys.stdin = open(os.devnull)
    if order.line_buffering:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if order.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_limit,) * 2)
    signal.alarm(order.timeout)
    np.random.seed()  # of its own, as at an import
    if order.forked_workers:
        fork_workers()
    module, function = entry_points()[Path(order.argv[0]).name]
    sys.argv = order.argv
    return getattr(importlib.import_module(module), function)()


def main() -> object:
    # the folder of this file, which holds no module of a command
    sys.path.pop(0)
    for module in IMPORTED:
        importlib.import_module(module)
    entry_points()
    for line in sys.stdin:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            return run(Order(**json.loads(line)))  # as a command ends: with what Python does at its exit
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
