"""Puts the results of the benchmarks into docs/performance.md: tables between its markers, and the plot.

python -m benchmarks.report
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.step import RESULTS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "performance.png"
# columns that are left out of the tables
LEFT_OUT = ("spread", "GFLOP/s")
MARKER = re.compile(r"(<!-- results: (\S+?)(?: rows (\d+)-(\d+))? -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def read(name: str) -> list[dict[str, str]]:
    """Rows of a file of the results."""
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table; columns that are the same in every row of it stay out."""
    columns = [c for c in rows[0] if c not in LEFT_OUT and (len({row[c] for row in rows}) > 1 or len(rows) == 1)]
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def with_results(text: str) -> str:
    """The document with the tables of the results as they are now.

    A marker may choose rows: ``<!-- results: step_cpu_step rows 1-5 -->``.
    """

    def table(match: re.Match[str]) -> str:
        rows = read(match[2])
        if match[3] is not None:
            rows = rows[int(match[3]) - 1 : int(match[4])]
        return match[1] + markdown(rows) + match[5]

    return MARKER.sub(table, text)


def plot(path: Path) -> None:
    """Seconds and memory of encoder and step, a bar per variant."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 5.5), constrained_layout=True, sharey="row")
    for row, (part, title) in zip(axes, (("encoder", "encoder"), ("step", "whole step")), strict=True):
        rows = read(f"step_cpu_{part}")
        names = [entry["variant"] for entry in rows]
        for axis, column, unit in zip(
            row, ("total [s]", "memory [GB]"), ("s, forward and backward", "GB, peak"), strict=True
        ):
            values = [float(entry[column]) for entry in rows]
            bars = axis.barh(names, values, color=["0.6"] + ["tab:blue"] * (len(names) - 1))
            axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            axis.set_xlim(0, 1.15 * max(values))
            axis.set_title(f"{title}: {unit}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Writes both."""
    DOCUMENT.write_text(with_results(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    plot(PLOT)
    print(f"{DOCUMENT.relative_to(ROOT)} and {PLOT.relative_to(ROOT)} are written")


if __name__ == "__main__":
    main()
