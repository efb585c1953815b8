"""Runs the commands of the benchmark: a log for each run, several side by side, ended in order."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from benchmarks.few_labels.work import Work

SHOWN_OF_A_LOG = 30  # lines


class CommandFailed(RuntimeError):
    """A command did not do what it was started for; the message has the end of its log."""


class Stopped(RuntimeError):
    """The benchmark was interrupted; the same command resumes."""


class Commands:
    """Commands in a work folder.

    Args:
        work: the folder.
        threads: that each command takes.
    """

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.threads = work, threads
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._guard = threading.Lock()

    def run(
        self, name: str, command: Sequence[str], variables: Mapping[str, str], arm: str = "", lock: int | None = None
    ) -> None:
        """Runs a command to its end; its output is appended to the log of ``name``.

        Args:
            name: of the run.
            command: a program installed beside this Python, or "python"; and its arguments.
            variables: see ``Work.environment``.
            arm: see ``Work.environment``.
            lock: of ``alone``; the command holds it, too.

        Raises:
            CommandFailed: it failed.
            Stopped: it was ended by ``stop``, or is not started any more.
        """
        log = self.work.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        python = Path(sys.executable)
        executable = python if command[0] == "python" else python.with_name(command[0])
        shown = " ".join([*(f"{key}={value}" for key, value in variables.items()), shlex.join(command)])
        with open(log, "ab") as file:
            file.write(f"\n$ {shown}\n".encode())
            file.flush()
            with self._guard:
                if self._stopped:
                    raise Stopped
                process = subprocess.Popen(
                    [executable, *command[1:]],
                    env=self.work.environment(arm, self.threads, variables),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    # out of reach of a Ctrl-C, so that it is ended as ``stop`` ends it
                    start_new_session=True,
                    pass_fds=[] if lock is None else [lock],
                )
                self._running.add(process)
            # with its own child processes; a training that is interrupted and continued has several such commands
            _, ended, usage = os.wait4(process.pid, 0)
            status = process.returncode = os.waitstatus_to_exitcode(ended)
            spent = self.work.cpu_seconds(name)
            spent.parent.mkdir(parents=True, exist_ok=True)
            with open(spent, "a", encoding="utf-8") as text:
                text.write(f"{usage.ru_utime + usage.ru_stime:.1f}\n")
            # loader processes of a training that a signal ended at once: they would hold the lock on its run
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with self._guard:
                self._running.discard(process)
                if self._stopped:
                    raise Stopped
        if status:
            raise CommandFailed(f"{name}: {command[0]} ended with {status}. {end_of_log(log)}")

    def stop(self) -> None:
        """Asks running commands to end (our trainers then write a checkpoint); none is started any more."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)  # Popen's own would wait for it, which ``run`` does

    def side_by_side(
        self, tasks: Sequence[Callable[[], None]], jobs: int, then: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Runs tasks in their order, ``jobs`` at a time, also where one fails; after each that does not, ``then``.

        Returns:
            what went wrong.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, once all commands have ended.
        """
        failures = []
        with ThreadPoolExecutor(jobs) as pool, _sigterm_as_interrupt():
            futures = [pool.submit(task) for task in tasks]
            try:
                for future in as_completed(futures):
                    try:
                        future.result()
                        then()
                    except (CommandFailed, OSError, ValueError) as error:
                        print(f"failed: {error}", flush=True)
                        failures.append(str(error))
            except BaseException:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failures


def end_of_log(log: Path) -> str:
    """The last lines of a log, as messages show them."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_OF_A_LOG:]
    return f"The end of {log}:\n" + "\n".join(lines)


@contextmanager
def alone(work: Work, name: str) -> Iterator[int | None]:
    """A lock on a run, or None where another benchmark is at it; held until the run's commands have ended, too."""
    file = work.lock(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            # commands inherit it: if only the benchmark is killed, its training continues
            yield lock.fileno()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
