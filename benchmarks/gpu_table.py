"""The table that a check fills: a row fails alone, and is on disk as soon as it is known."""

import csv
import gc
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEASURED, OUT_OF_MEMORY, OUT_OF_TIME = "measured", "out of memory", "not measured: out of time"
COLUMNS = (
    *("check", "network", "variant", "compiled", "dtype", "shape", "batch", "result"),
    *("total ms", "forward ms", "backward ms", "spread", "ms per patch", "patches/s", "TFLOP/s", "GB/s"),
    *("peak GiB", "reserved GiB", "planner GiB", "loss error", "gradient error"),
    *("synchronisations", "kernels", "idle", "first step s", "row s", "note"),
)


class Table:
    """Rows of a check.

    Args:
        path: of the CSV file, which is written again after every row.
        seconds: rows that would begin later are not measured.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self._end = time.monotonic() + seconds

    def measure(self, check: str, function: Callable[[], dict[str, Any]], **names: Any) -> dict[str, Any]:
        """Adds a row, whatever happens.

        Args:
            check: what the row belongs to.
            function: measures; returns values by column.
            names: columns that are known before.

        Returns:
            the row; its "result" is ``MEASURED`` only if the function returned.
        """
        row: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), "check": check, **names}
        begin = time.monotonic()
        if begin > self._end:
            row["result"] = OUT_OF_TIME
        else:
            try:
                row |= {"result": MEASURED, **function()}
            except torch.OutOfMemoryError:
                row["result"] = OUT_OF_MEMORY
            except Exception as error:  # the other rows are measured, whatever it was
                traceback.print_exc()
                row["result"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        free_memory()
        row["row s"] = f"{time.monotonic() - begin:.1f}"
        self.rows.append(row)
        self._write()
        print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
        return row

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(beside, self.path)


def free_memory() -> None:
    """What a row has held goes back to the device."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
