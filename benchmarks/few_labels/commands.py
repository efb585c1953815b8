"""Runs the commands of the benchmark, one after the other: a log and the CPU seconds of each run, ended in order."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.few_labels.work import Work

SHOWN_OF_A_LOG = 30  # lines


class CommandFailed(RuntimeError):
    """A command did not do what it was started for; the message has the end of its log."""


class Commands:
    """Commands in a work folder.

    Args:
        work: the folder.
        threads: that each command takes.
    """

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.threads = work, threads

    def run(
        self, name: str, command: Sequence[str], variables: Mapping[str, str], arm: str = "", lock: int | None = None
    ) -> None:
        """Runs a command to its end; its output is appended to the log of ``name``.

        An interruption asks the command to end (our trainers then write a checkpoint) and waits for it.

        Args:
            name: of the run.
            command: a program installed beside this Python, or "python"; and its arguments.
            variables: see ``Work.environment``.
            arm: see ``Work.environment``.
            lock: of ``alone``; the command holds it, too: if only the benchmark is killed, its training continues.

        Raises:
            CommandFailed: it failed.
        """
        python, log, interrupted = Path(sys.executable), self.work.log(name), False
        with open(log, "ab") as file:
            shown = [*(f"{key}={value}" for key, value in variables.items()), shlex.join(command)]
            file.write(f"\n$ {' '.join(shown)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [python if command[0] == "python" else python.with_name(command[0]), *command[1:]],
                env=self.work.environment(arm, self.threads, variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # out of reach of a Ctrl-C
                pass_fds=[] if lock is None else [lock],
            )
            try:
                _, ended, usage = os.wait4(process.pid, 0)
            except KeyboardInterrupt:
                interrupted = True
                os.kill(process.pid, signal.SIGTERM)
                _, ended, usage = os.wait4(process.pid, 0)
        # loader processes of a training that a signal ended at once: they would hold the lock on its run
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with open(self.work.cpu_seconds(name), "a", encoding="utf-8") as text:
            text.write(f"{usage.ru_utime + usage.ru_stime:.1f}\n")
        process.returncode = os.waitstatus_to_exitcode(ended)
        if interrupted:
            raise KeyboardInterrupt
        if process.returncode:
            raise CommandFailed(f"{name}: {command[0]} ended with {process.returncode}. {end_of_log(log)}")


def end_of_log(log: Path) -> str:
    """The last lines of a log, as messages show them."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_OF_A_LOG:]
    return f"The end of {log}:\n" + "\n".join(lines)


@contextmanager
def alone(work: Work, name: str, wait: bool = False) -> Iterator[int | None]:
    """A lock on a run, or None where another benchmark is at it and ``wait`` is not set."""
    with open(work.lock(name), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield lock.fileno()
