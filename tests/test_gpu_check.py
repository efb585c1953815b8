"""The check for GPUs runs, without nnU-Net, and survives rows that fail; its figures need a GPU."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_goals import MISSED, NOT_MEASURED, NUMBERS, PASSED, goals, report
from benchmarks.gpu_steps import idle_share
from benchmarks.gpu_table import MEASURED, OUT_OF_MEMORY, OUT_OF_TIME, Table

ROOT = Path(__file__).resolve().parent.parent
# dynamic-network-architectures may travel along
NOT_INSTALLED = ("nnunetv2", "SimpleITK", "batchgenerators", "batchgeneratorsv2", "acvl_utils", "nibabel", "blosc2")
TINY_CHECK = f"""
import importlib.abc, runpy, sys
class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_INSTALLED}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
runpy.run_module("benchmarks.gpu_check", run_name="__main__")
"""


def test_the_tiny_check_measures_every_row_without_nnunet(tmp_path: Path) -> None:
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TINY_CHECK, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "gpu_check.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["result"] for row in rows} == {MEASURED}, [row for row in rows if row["result"] != MEASURED]
    for check in ("machine", "numbers", "hidden voxels", "skipped step", "probe", "step", "encoder", "operation"):
        assert any(row["check"] == check for row in rows), check
    # the same numbers as the dense baseline in float64, however they are computed
    errors = {
        dtype: [float(r["loss error"]) for r in rows if r["dtype"] == dtype and r["loss error"]]
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert max(errors["float32"]) < 1e-5 and max(errors["bfloat16"] + errors["float16"]) < 2e-2
    assert all(float(row["loss error"]) == 0 for row in rows if row["check"] == "hidden voxels")
    written = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    verdicts = [line.split(" | ")[-1].strip(" |") for line in written.splitlines() if line.startswith("| ")][2:]
    assert verdicts and set(verdicts) == {NOT_MEASURED}
    assert f"{len(rows)} of {len(rows)} rows were measured" in written


def a_row(check: str, variant: str, **values: Any) -> dict[str, Any]:
    names = {"check": check, "network": "HySparK", "variant": variant, "compiled": "yes", "dtype": "bfloat16"}
    return {"result": MEASURED, "ms per patch": "", "batch": "", **names, **values}


def test_goals_are_passed_missed_or_not_measured(tmp_path: Path) -> None:
    ours = {"peak GiB": "20.0", "planner GiB": "21.0", "reserved GiB": "22.5", "idle": "0.08", "ms per patch": "20"}
    rows = [
        a_row("step", "visible blocks, light checkpointing", **ours),
        a_row("step", "dense baseline, slow", **{"ms per patch": "90"}),
        a_row("step", "dense baseline, fast", **{"ms per patch": "70"}),
        # of another compilation, and one that failed: not compared
        a_row("step", "dense baseline", compiled="no", **{"ms per patch": "1"}),
        a_row("step", "dense baseline", result=OUT_OF_MEMORY),
        a_row("encoder", "visible blocks, light checkpointing", **{"ms per patch": "2"}),
        a_row("probe", "", **{"total ms": "4000", "compiled": ""}),
        a_row(NUMBERS, "visible blocks", dtype="float32", **{"loss error": "1e-3"}),
    ]
    found = goals(rows, ["HySparK"], on_cuda=True)
    values = [None if goal.value is None else round(goal.value, 3) for goal in found]
    assert values == [3.5, None, 0.952, 22.5, 0.08, 4.0, 0.001]
    assert [goal.verdict for goal in found] == [PASSED, NOT_MEASURED, PASSED, PASSED, MISSED, PASSED, MISSED]
    assert {goal.verdict for goal in goals(rows, ["HySparK"], on_cuda=False)} == {NOT_MEASURED}
    report(tmp_path / "report.md", "a machine", found, rows)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| 0.08 | {MISSED} |" in written and f"- step, HySparK, dense baseline: {OUT_OF_MEMORY}" in written


def test_a_row_that_fails_is_reported_and_a_smaller_batch_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(tmp_path / "table.csv", seconds=60)
    failed = table.measure("first", lambda: {"total ms": 1 / 0})
    assert failed["result"].startswith("failed: ZeroDivisionError") and failed["total ms"] == ""

    def measured(case: Any, variant: Any, rounds: int) -> dict[str, Any]:
        if case.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"total ms": "5"}

    monkeypatch.setattr(gpu_check, "measure_step", measured)
    case = replace(gpu_check.small_networks("cpu")["HySparK"], batch_size=5)
    row = gpu_check.at_largest_batch(table, "step", "HySparK", case, gpu_check.STRONG, rounds=1)
    assert (row["batch"], row["total ms"]) == (3, "5")
    # compiled, it begins with the batch that is known to fit
    compiled = replace(gpu_check.STRONG, compiled=True)
    gpu_check.at_largest_batch(table, "step", "HySparK", case, compiled, rounds=1)
    with open(table.path, encoding="utf-8") as file:
        results = [row["result"] for row in csv.DictReader(file)]
    assert results[1:] == [OUT_OF_MEMORY, OUT_OF_MEMORY, MEASURED, MEASURED]


def test_no_row_begins_after_the_time_limit(tmp_path: Path) -> None:
    row = Table(tmp_path / "table.csv", seconds=-1).measure("late", lambda: pytest.fail("measured"))
    assert row["result"] == OUT_OF_TIME


def test_the_idle_share_counts_what_no_kernel_covers() -> None:
    assert idle_share([(0, 4), (2, 3), (3, 6), (8, 10)]) == pytest.approx(0.2)
