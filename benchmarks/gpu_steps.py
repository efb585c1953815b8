"""Training steps as a trainer takes them, with what can be measured of them on CUDA."""

import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import now
from benchmarks.step_cases import Case, Variant
from benchmarks.step_process import Step
from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.training.memory.step_bytes import GIB, pretraining_bytes
from hyspark_nnunet.training.stepping import take_step

# bytes of a device that are counted as 24 GB, without CUDA's context
LIMIT = 23 * GIB


class TrainingStep(Step):
    """A case's whole step: forward, backward, clipping, AdamW."""

    def __init__(self, case: Case, variant: Variant) -> None:
        super().__init__(case, variant)
        self.optimizer = torch.optim.AdamW(self.whole.parameters(), lr=1e-4)

    def take(self) -> bool:
        """Takes a step. Returns whether loss and gradients were finite."""
        clip = PretrainRecipe().gradient_clip
        return take_step(self.whole, self.optimizer, None, lambda _: self.compute(), [{}], clip).taken

    def seconds(self) -> float:
        """Takes a step. Returns its time."""
        begin = now(self.device)
        self.take()
        return now(self.device) - begin


def measure_step(case: Case, variant: Variant, rounds: int, closely: bool = False) -> dict[str, Any]:
    """A row about a step, or, if the case has only the encoder, about its forward and backward pass.

    Args:
        case: with its batch size.
        variant: how it is computed.
        rounds: how often it is timed.
        closely: also counts synchronisations and kernels, and times the device's idleness.
    """
    device = torch.device(case.device)
    step = Step(case, variant) if case.encoder_only else TrainingStep(case, variant)

    def once() -> float:
        if isinstance(step, TrainingStep):
            return step.seconds()
        phases = step.run()
        return phases["forward"] + phases["backward"]

    first = once()
    once()  # AdamW's moments exist from here on
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    totals = [once() for _ in range(rounds)]
    row = _memory(device)
    phases = [step.run() for _ in range(rounds)]
    total = statistics.median(totals)
    row |= {
        "total ms": f"{1e3 * total:.2f}",
        "forward ms": f"{1e3 * statistics.median(phase['forward'] for phase in phases):.2f}",
        "backward ms": f"{1e3 * statistics.median(phase['backward'] for phase in phases):.2f}",
        "spread": f"{(max(totals) - min(totals)) / total:.0%}",
        "ms per patch": f"{1e3 * total / case.batch_size:.3f}",
        "patches/s": f"{case.batch_size / total:.3g}",
        "first step s": f"{first:.1f}",
    }
    if not variant.compiled:
        row["TFLOP/s"] = f"{step.operations() / total / 1e12:.3g}"
    if closely and isinstance(step, TrainingStep) and device.type == "cuda":
        row |= {"synchronisations": _synchronisations(step), **_use_of_device(step)}
    return row


def planned_bytes(case: Case, variant: Variant) -> int:
    """The planner's estimate of a step's peak."""
    build = case.network_without_weights
    return pretraining_bytes(
        build, case.batch_size, 1, case.shape.patch, case.mask_ratio, variant.recompute, mixed_precision=True
    )


def planned_batch(case: Case, variant: Variant) -> int:
    """The largest batch for which the planner expects no more than ``LIMIT``."""
    two, four = (planned_bytes(replace(case, batch_size=n), variant) for n in (2, 4))
    return max(1, int(2 + (LIMIT - two) * 2 / (four - two)))


@contextmanager
def memory_limit(device: torch.device, n_bytes: int) -> Iterator[None]:
    """On CUDA, torch's allocator gets no more than this many bytes."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _memory(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak GiB": f"{peak / GIB:.2f}", "reserved GiB": f"{reserved / GIB:.2f}"}


def _synchronisations(step: TrainingStep) -> int:
    """How often the host waits for the device in a step."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step.take()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def _use_of_device(step: TrainingStep, steps: int = 3) -> dict[str, Any]:
    """Kernels of a step, the share of it in which the device is idle, and the longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step.take()
    # an annotation, such as that of AdamW's step, spans kernels and the time between them
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    by_name: dict[str, float] = {}
    for event, (start, end) in zip(events, spans, strict=True):
        by_name[event.name] = by_name.get(event.name, 0.0) + (end - start) / steps / 1e3
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {
        "kernels": len(events) // steps,
        "idle": f"{idle_share(spans):.3f}",
        "note": "longest kernels: " + "; ".join(f"{name[:60]} {ms:.2f} ms" for name, ms in longest),
    }


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """The part of the time from the first to the last span in which there is none; spans may overlap."""
    busy, reached = 0.0, min(start for start, _ in spans)
    first = reached
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - first)
