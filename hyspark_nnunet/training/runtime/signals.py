"""SIGTERM and SIGUSR1, which job schedulers send before they kill: the training stops and can be resumed."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from types import FrameType, TracebackType

from hyspark_nnunet.recipe.fields import PREFIX

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# SLURM signals torchrun and its workers, and torchrun forwards its signal: one request reaches a worker twice
SAME_REQUEST_SECONDS = 2.0


class StopRequest:
    """A context in which the first signal is recorded; a later one (SAME_REQUEST_SECONDS) ends the process."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._at = 0.0
        self._process = os.getpid()
        self._earlier: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows handlers only in the main thread
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # while it exits, a process may still receive the second copy of the request
        for number, handler in self._earlier.items() if self.signal is None else ():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # a loader process, which inherited this handler: SIGTERM ends it
            if number == signal.SIGTERM:
                _die_of(number)
        elif self.signal is None:
            self.signal, self._at = signal.Signals(number).name, monotonic()
            _say(f"{self.signal} received: stopping after this step. A second signal ends the process at once.")
        elif monotonic() - self._at > SAME_REQUEST_SECONDS:
            _die_of(number)


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _say(text: str) -> None:
    # not by print, which fails if the signal interrupted another print
    with suppress(OSError):
        os.write(1, f"\n{text}\n".encode())


def leave_on_signal(message: str) -> None:
    """From now on a signal prints the message and exits with 0: for work that can be repeated."""
    process = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            _die_of(number)
        _say(f"{signal.Signals(number).name} received. {message}")
        sys.exit(0)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, leave)


def command_to_continue(argv: Sequence[str], torchrun: bool, environment: Mapping[str, str]) -> str:
    """The command line that resumes: with --c, and without -pretrained_weights, which nnU-Net refuses with --c.

    Args:
        argv: of this process.
        torchrun: this is one of torchrun's processes; the options of torchrun are not known.
        environment: of this process; the variables of the recipe are put before the command.
    """
    words = list(argv[1:])
    while "-pretrained_weights" in words:
        at = words.index("-pretrained_weights")
        del words[at : at + 2]
    words = [word for word in words if word != "--c" and not word.startswith("-pretrained_weights=")]
    program = os.path.basename(argv[0])
    if program == "train.py":
        program = (
            "torchrun (options as before) -m hyspark_nnunet.train" if torchrun else "python -m hyspark_nnunet.train"
        )
    recipe = [f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items()) if name.startswith(PREFIX)]
    return " ".join([*recipe, program, shlex.join([*words, "--c"])])
