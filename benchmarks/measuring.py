"""Times and peak memory of variants of a computation, compared fairly; and the machine they were measured on."""

import csv
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Phases = dict[str, float]


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds.

    Attributes:
        forward: seconds.
        backward: seconds.
        total: seconds of both; the median of the sums.
        spread: of the totals, largest less smallest, in parts of the median.
    """

    forward: float
    backward: float
    total: float
    spread: float


def in_turn(variants: Mapping[str, Callable[[], Phases]], rounds: int) -> dict[str, Timing]:
    """Runs all variants once to warm up, then all of them in each round, so that a slow minute slows all of them.

    Args:
        variants: by name, a function that runs once and gives the seconds of "forward" and "backward".
        rounds: how often each is timed.
    """
    for run in variants.values():
        run()
    found: dict[str, list[Phases]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            found[name].append(run())
    return {name: _timing(phases) for name, phases in found.items()}


def _timing(phases: Sequence[Phases]) -> Timing:
    totals = [phase["forward"] + phase["backward"] for phase in phases]
    median = statistics.median(totals)
    return Timing(
        statistics.median(phase["forward"] for phase in phases),
        statistics.median(phase["backward"] for phase in phases),
        median,
        (max(totals) - min(totals)) / median,
    )


def now(device: torch.device) -> float:
    """Seconds, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """Peak memory since it was made, beyond what the process held then; for a process of its own.

    On a CPU the resident memory as the system counts it, on CUDA what torch allocated.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = _status_bytes("VmRSS")

    def bytes(self) -> int:
        """The peak so far."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status_bytes("VmHWM")
        return peak - self.before


def _status_bytes(field: str) -> int:
    # not by getrusage: its maximum counts the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def matrix_throughput(device: torch.device, dtype: torch.dtype, edge: int = 48) -> float:
    """Floating-point operations per second of a convolution that suits the device, at best: a practical bound.

    Args:
        device: to measure.
        dtype: of image and weight.
        edge: voxels per axis of the image.
    """
    memory_format = torch.channels_last_3d
    image = torch.randn(1, 192, edge, edge, edge, device=device, dtype=dtype).to(memory_format=memory_format)
    weight = torch.randn(192, 192, 3, 3, 3, device=device, dtype=dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(10):
            start = now(device)
            torch.nn.functional.conv3d(image, weight, padding=1)
            seconds.append(now(device) - start)
    return 2 * edge**3 * 192 * 192 * 27 / min(seconds)


def machine(device: torch.device, threads: int | None = None) -> str:
    """One line: processor or accelerator, threads, torch.

    Args:
        device: that was measured on.
        threads: of the process that was measured; None: it is this one.
    """
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_processor()}, {torch.get_num_threads() if threads is None else threads} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    features = "AVX-512" if any(" avx512f" in line for line in lines if line.startswith("flags")) else "no AVX-512"
    return f"{name} ({features})"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of text."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
