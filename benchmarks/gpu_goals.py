"""The goals of the check on a GPU, and its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_table import MEASURED

STEP, ENCODER, PROBE, NUMBERS = "step", "encoder", "probe", "numbers"
PASSED, MISSED, NOT_MEASURED = "pass", "FAIL", "not measured"
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A goal, and what was found.

    Attributes:
        name: of the network and of what is measured.
        limit: in words.
        value: what was measured; None: it was not.
        holds: whether a value is within the limit.
    """

    name: str
    limit: str
    value: float | None
    holds: Callable[[float], bool]

    @property
    def verdict(self) -> str:
        return NOT_MEASURED if self.value is None else PASSED if self.holds(self.value) else MISSED


def goals(rows: Sequence[Row], networks: Sequence[str], on_cuda: bool) -> list[Goal]:
    """The goals of issue 22 for the rows of a check. They are about a GPU: without one, none is measured.

    Whole step and encoder compare compiled with compiled, at the largest batch of the dense baseline that fits.
    """
    measured = [row for row in rows if on_cuda and row["result"] == MEASURED]
    found = []
    for network in networks:
        of_network = [row for row in measured if row["network"] == network]
        for check, least in ((STEP, 3.0), (ENCODER, 5.0)):
            found.append(
                Goal(
                    f"{network}, {check}: time per patch of the dense baseline / of visible blocks, compiled",
                    f"at least {least:g}",
                    _speed_up([row for row in of_network if row["check"] == check]),
                    lambda value, least=least: value >= least,  # type: ignore[misc]
                )
            )
        step = next((row for row in of_network if row["check"] == STEP and _is_default(row)), {})
        probe = next((row for row in of_network if row["check"] == PROBE), {})
        peak, planned = _number(step, "peak GiB"), _number(step, "planner GiB")
        milliseconds = _number(probe, "total ms")
        found += [
            Goal(
                f"{network}: peak memory / planner's estimate",
                "0.9 to 1.1",
                peak / planned if peak and planned else None,
                lambda value: 0.9 <= value <= 1.1,
            ),
            Goal(
                f"{network}: memory reserved for a step, GiB",
                "at most 23, and 1 for CUDA's context",
                _number(step, "reserved GiB"),
                lambda value: value <= 23,
            ),
            Goal(
                f"{network}: part of a step in which the GPU is idle",
                "below 0.05",
                _number(step, "idle"),
                lambda value: value < 0.05,
            ),
            Goal(
                f"{network}: seconds of a probe",
                "below 5",
                milliseconds / 1e3 if milliseconds else None,
                lambda value: value < 5,
            ),
        ]
    errors = [float(row["loss error"]) for row in measured if row["check"] == NUMBERS and row["dtype"] == "float32"]
    found.append(
        Goal(
            "loss in float32, relative to float64 on the CPU",
            "differs by less than 1e-4",
            max(errors, default=None),
            lambda value: value < 1e-4,
        )
    )
    return found


def _is_default(row: Row) -> bool:
    """A compiled step as pre-training takes it."""
    return row["compiled"] == "yes" and row["variant"].startswith("visible blocks")


def _speed_up(rows: Sequence[Row]) -> float | None:
    """Of visible blocks against the fastest dense baseline, compiled both."""
    compiled = [row for row in rows if row["compiled"] == "yes"]
    ours = [float(row["ms per patch"]) for row in compiled if _is_default(row)]
    dense = [float(row["ms per patch"]) for row in compiled if row["variant"].startswith("dense baseline")]
    return min(dense) / ours[0] if ours and dense else None


def _number(row: Row, column: str) -> float | None:
    value = row.get(column, "")
    return None if value == "" else float(value)


def report(path: Path, machine: str, found: Sequence[Goal], rows: Sequence[Row]) -> None:
    """Writes the goals as a table, and what could not be measured."""
    lines = [f"# Check on a GPU\n\n{machine}\n", "| goal | limit | measured | verdict |", "| --- | --- | --- | --- |"]
    for goal in found:
        value = "" if goal.value is None else f"{goal.value:.3g}"
        lines.append(f"| {goal.name} | {goal.limit} | {value} | {goal.verdict} |")
    missing = [row for row in rows if row["result"] != MEASURED]
    lines.append(f"\n{len(rows) - len(missing)} of {len(rows)} rows were measured.")
    for row in missing:
        what = ", ".join(str(row[name]) for name in ("check", "network", "variant", "batch") if row[name] != "")
        lines.append(f"- {what}: {row['result']}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
