"""Time and memory of a pre-training step: the dense baseline, visible blocks, and each further change in turn.

    python -m benchmarks.step                        # everything: about an hour on two CPU cores
    python -m benchmarks.step --only encoder step    # some of its parts
    python -m benchmarks.step --device cuda          # with autocast and torch.compile as further variants

Prints tables and writes benchmarks/results/step_DEVICE_PART.csv. Ratios are to the dense baseline (see
``benchmarks.dense_baseline``). The variants take turns, one run per round. Each has a process of its own, because the
C library's treatment of memory belongs to a process, and so does its peak.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import Timing, in_turn, machine, matrix_throughput, table, write_csv
from benchmarks.step_cases import (
    ANISOTROPIC,
    BLOCKS_KEPT,
    CUBE,
    DENSE,
    DENSE_KEPT,
    FULL,
    HIPPOCAMPUS,
    LADDER,
    LARGE,
    NNUNET_KEPT,
    ON_CPU,
    ON_CUDA,
    Case,
    HySparKCase,
    Shape,
    SparKCase,
    Variant,
    isotropic,
)
from benchmarks.step_process import Worker
from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.training.runtime.precision import autocast_dtype

RESULTS = Path(__file__).parent / "results"


def compare(case: Case, variants: Sequence[Variant], rounds: int) -> list[dict[str, Any]]:
    """Rows of a table; the first variant is what the others are compared with."""
    workers = {variant.name: Worker(case, variant) for variant in variants}
    try:
        timings = in_turn({name: partial(worker.ask, "run") for name, worker in workers.items()}, rounds)
        peaks = {name: worker.ask("peak") for name, worker in workers.items()}
        losses = {name: worker.ask("run")["loss"] for name, worker in workers.items()}
        first = variants[0].name
        expected = workers[first].ask("gradient")
        rows = []
        for name, worker in workers.items():
            gradient = worker.ask("gradient")
            difference = float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))
            row = _row(case, name, timings[name], timings[first], worker.ask("operations"))
            row |= {
                "memory [GB]": f"{peaks[name] / 1e9:.2f}",
                "relative memory": f"{peaks[name] / peaks[first]:.2f}",
                "loss difference": f"{abs(losses[name] / losses[first] - 1):.0e}",
                "gradient difference": f"{difference:.0e}",
            }
            rows.append(row)
            worker.close()
        return rows
    finally:
        for worker in workers.values():
            worker.close()


def _row(case: Case, name: str, timing: Timing, base: Timing, operations: int) -> dict[str, Any]:
    return {
        "variant": name,
        "patch": case.shape.name,
        "mask ratio": case.mask_ratio,
        "batch": case.batch_size,
        "forward [s]": f"{timing.forward:.3f}",
        "backward [s]": f"{timing.backward:.3f}",
        "total [s]": f"{timing.total:.3f}",
        "spread": f"{timing.spread:.0%}",
        "speed-up": f"{base.total / timing.total:.2f}",
        "patches/s": f"{case.batch_size / timing.total:.3g}",
        "TFLOP": f"{operations / 1e12:.3f}",
        "GFLOP/s": f"{operations / timing.total / 1e9:.0f}",
    }


def growth(case: Case, variant: Variant, rounds: int) -> list[dict[str, Any]]:
    """One, two and four times the volume."""
    sizes = [
        tuple(n * f for n, f in zip(case.shape.patch, factors, strict=True))
        for factors in ((1, 1, 1), (1, 1, 2), (1, 2, 2))
    ]
    rows = []
    for size in sizes:
        grown = replace(case, shape=Shape(size, case.shape.strides, case.shape.kernels))
        row = compare(grown, [variant], rounds)[0]
        row["times the volume"] = prod(size) // prod(case.shape.patch)
        rows.append(row)
    for row in rows:
        row["speed-up"] = f"{float(rows[0]['total [s]']) / float(row['total [s]']):.2f}"
        row["relative memory"] = f"{float(row['memory [GB]']) / float(rows[0]['memory [GB]']):.2f}"
    return rows


def _preset_row(case: HySparKCase, variant: Variant, rounds: int) -> list[dict[str, Any]]:
    parameters = sum(parameter.numel() for parameter in case.network().parameters())
    row = compare(case, [variant], rounds)[0]
    return [{"preset": case.preset, "parameters [M]": f"{parameters / 1e6:.1f}"} | row]


SPARK_PARTS = ("spark_encoder", "spark_step", "spark_others")
PARTS = ("encoder", "step", "allocator", "presets", "ratios", "batches", "shapes", "growth", *SPARK_PARTS)


def measure_spark(part: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of a part about nnU-Net's own networks."""
    variants = [*NNUNET_KEPT, *BLOCKS_KEPT]
    # beside the encoder's table: nnU-Net's modules in the faster memory format, and the package's default
    pair = [NNUNET_KEPT[1], BLOCKS_KEPT[1]]
    if device == "cuda":
        variants, pair = ([replace(variant, keep_memory=False) for variant in those] for those in (variants, pair))
    six_stages = isotropic(LARGE.patch, n_stages=6)
    resenc = SparKCase(shape=six_stages, device=device)
    if part == "spark_encoder":
        return compare(replace(resenc, encoder_only=True), variants, rounds)
    if part == "spark_step":
        return compare(resenc, pair, rounds)
    others = {
        "ResEnc-M, five stages": replace(resenc, shape=CUBE),
        "ResEnc-M, five stages, mask ratio 0.9": replace(resenc, shape=CUBE, mask_ratio=0.9),
        "PlainConvUNet, five stages": replace(resenc, shape=CUBE, residual=False),
    }
    return [
        {"network": name, "computed": "encoder" if only else "step"} | row
        for name, case in others.items()
        for only in (True, False)
        for row in compare(replace(case, encoder_only=only), pair, rounds)
    ]


def measure(part: str, device: str, rounds: int, preset: str) -> list[dict[str, Any]]:
    """The rows of one part."""
    if part in SPARK_PARTS:
        return measure_spark(part, device, rounds)
    if device == "cuda" and part == "allocator":
        return []
    best = replace(ON_CPU if device == "cpu" else LADDER[-1], name="visible blocks, all optimisations")
    more = [ON_CPU, FULL] if device == "cpu" else [ON_CUDA]
    pair = [DENSE, best]

    def case(shape: Shape, **changes: Any) -> HySparKCase:
        return HySparKCase(shape=shape, device=device, preset=preset, **changes)

    if part == "encoder":
        ladder = [variant for variant in [*LADDER, *more] if variant.name != "+ merged upsampling"]
        ladder = [variant for variant in ladder if not variant.compiled]
        return compare(case(CUBE, encoder_only=True), ladder, rounds)
    if part == "step":
        return compare(case(CUBE), [*LADDER, *more], rounds)
    if part == "allocator":
        # both with glibc keeping memory: what the rest is worth
        kept = [DENSE_KEPT, ON_CPU]
        return [row for only in (True, False) for row in compare(case(CUBE, encoder_only=only), kept, rounds)]
    if part == "presets":
        return [row for name in PRESETS for row in _preset_row(replace(case(CUBE), preset=name), best, rounds)]
    if part == "ratios":
        return [
            row
            for ratio in (0.5, 0.75, 0.9)
            for row in compare(case(CUBE, encoder_only=True, mask_ratio=ratio), pair, rounds)
        ]
    if part == "batches":
        small = [row for size in (1, 2, 4) for row in compare(case(HIPPOCAMPUS, batch_size=size), pair, rounds)]
        return small + compare(case(CUBE, batch_size=2), pair, rounds)
    if part == "shapes":
        return [row for shape in (LARGE, ANISOTROPIC) for row in compare(case(shape), pair, rounds)]
    return growth(case(CUBE), best, rounds)


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="times each variant is timed (default: %(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="B")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        # shapes are static, as in nnU-Net's training
        torch.backends.cudnn.benchmark = True
    print(machine(device))
    bound = matrix_throughput(device, autocast_dtype(device) or torch.float32)
    print(f"a convolution alone reaches {bound / 1e9:.0f} GFLOP/s")
    for part in arguments.only:
        rows = measure(part, arguments.device, arguments.rounds, arguments.preset)
        if not rows:
            continue
        for row in rows:
            row["of a convolution's FLOP/s"] = f"{float(row['GFLOP/s']) * 1e9 / bound:.0%}"
        print(f"\n{part}\n{table(rows)}", flush=True)
        write_csv(RESULTS / f"step_{arguments.device}_{part}.csv", rows)


if __name__ == "__main__":
    main()
