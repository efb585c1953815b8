"""The progress of preprocessing: cases per second, bytes written, time left."""

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from hyspark_nnunet.preprocessing.disk_space import GB

# to a file, a bar is a line each time: a run of days must not fill the log
SECONDS_BETWEEN_LINES = 0.5 if sys.stderr.isatty() else 60.0


class Progress:
    """A progress bar whose time left follows the bytes read, because the largest cases come first.

    Args:
        total_bytes: of the raw images of all cases.
        n_cases: how many there are.
        show: whether anything is printed.
    """

    def __init__(self, total_bytes: int, n_cases: int, show: bool) -> None:
        self.written = 0
        self._read, self._total, self._n_written = 0, total_bytes, 0
        self._start = time.monotonic()
        self._bar = tqdm(
            total=n_cases,
            desc="preprocessing",
            mininterval=SECONDS_BETWEEN_LINES,
            disable=not show or not n_cases,
            unit="case",
            bar_format="{desc}: {n_fmt}/{total_fmt} cases, {rate_fmt}{postfix}",
        )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def add(self, read: int, written: int) -> None:
        """A case is finished; ``written`` is 0 if it failed."""
        self._read += read
        self.written += written
        self._n_written += written > 0
        seconds = (time.monotonic() - self._start) * (self._total - self._read) / max(1, self._read)
        left = timedelta(seconds=round(seconds))
        self._bar.set_postfix_str(f"{self.written / GB:.2f} GB written, {left} left", refresh=False)
        self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line beside the bar."""
        self._bar.write(line)

    @property
    def mean_written(self) -> float:
        """Bytes of a case."""
        return self.written / max(1, self._n_written)

    @property
    def elapsed(self) -> timedelta:
        """Since the beginning, in whole seconds."""
        return timedelta(seconds=round(time.monotonic() - self._start))
