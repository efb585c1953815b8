"""Time and memory of a pre-training step: the dense baseline, visible blocks, and each further change in turn.

    python -m benchmarks.step                        # everything: about an hour on two CPU cores
    python -m benchmarks.step --only encoder step    # some of its parts
    python -m benchmarks.step --device cuda          # with autocast and torch.compile as further variants

Prints tables and writes benchmarks/results/step_DEVICE_PART.csv. Ratios are to the dense baseline (see
``benchmarks.dense_baseline``). The variants take turns, one run per round. Each has a process of its own, because the
C library's treatment of memory belongs to a process, and so does its peak.
"""

import argparse
import gc
import multiprocessing
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dense_baseline import DenseBaseline
from benchmarks.measuring import PeakMemory, Phases, Timing, in_turn, machine, matrix_throughput, now, table, write_csv
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.from_plans import decoder_width
from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.runtime.cpu_allocator import keep_freed_memory
from hyspark_nnunet.training.runtime.precision import autocast_dtype

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A patch with the strides and kernels that nnU-Net plans for it."""

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return "x".join(map(str, self.patch))


def isotropic(patch: tuple[int, ...], n_stages: int = 5) -> Shape:
    """Kernels of 3, strides of 2."""
    return Shape(patch, ((1,) * 3,) + ((2,) * 3,) * (n_stages - 1), ((3,) * 3,) * n_stages)


CUBE = isotropic((96, 96, 96))
LARGE = isotropic((128, 128, 128))
HIPPOCAMPUS = isotropic((40, 56, 40), n_stages=4)
ANISOTROPIC = Shape(
    (28, 192, 192),
    ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
)


@dataclass(frozen=True)
class Variant:
    """How a step is computed.

    Attributes:
        name: in tables.
        dense: the dense baseline.
        channels_last: the dense baseline in torch's channels-last memory format.
        merge: the decoder's merged upsampling.
        recompute: activation checkpointing.
        keep_memory: glibc keeps freed memory (CPU).
        compiled: by torch.compile.
    """

    name: str
    dense: bool = False
    channels_last: bool = False
    merge: bool = False
    recompute: str = "none"
    keep_memory: bool = False
    compiled: bool = False


DENSE = Variant("dense baseline", dense=True)
DENSE_KEPT = Variant("dense baseline, freed memory kept", dense=True, keep_memory=True)
LADDER = [
    DENSE,
    Variant("channels-last", dense=True, channels_last=True),
    Variant("visible blocks"),
    Variant("+ merged upsampling", merge=True),
    Variant("+ light checkpointing", merge=True, recompute="light"),
]
ON_CPU = Variant("+ freed memory kept", merge=True, recompute="light", keep_memory=True)
FULL = Variant("full instead of light checkpointing", merge=True, recompute="full", keep_memory=True)
ON_CUDA = Variant("+ torch.compile", merge=True, recompute="light", compiled=True)


@dataclass(frozen=True)
class Case:
    """What is computed."""

    shape: Shape
    mask_ratio: float = 0.75
    batch_size: int = 1
    encoder_only: bool = False
    preset: str = "B"
    device: str = "cpu"

    def network(self) -> HySparKMaskedAutoencoder:
        """The preset's network for the shape, always with the same weights."""
        torch.manual_seed(0)
        n = len(self.shape.strides)
        network = HySparKMaskedAutoencoder(
            input_channels=1,
            n_stages=n,
            conv_op=nn.Conv3d,
            kernel_sizes=self.shape.kernels,
            strides=self.shape.strides,
            **PRESETS[self.preset].encoder_sizes(n),
            decoder_width=decoder_width(n, self.preset, None),
        )
        return network.to(self.device)

    def batch(self, network: HySparKMaskedAutoencoder) -> tuple[Tensor, Tensor, int]:
        """Image, mask and number of visible units per sample."""
        generator = torch.Generator().manual_seed(1)
        grid = mask_grid(self.shape.patch, network.encoder.unit)
        visible = sample_visible(self.batch_size, grid, self.mask_ratio, generator)
        image = torch.randn(self.batch_size, 1, *self.shape.patch, generator=generator)
        return image.to(self.device), visible.to(self.device), num_visible_units(grid, self.mask_ratio)


class Step:
    """One variant's forward and backward pass of a case."""

    def __init__(self, case: Case, variant: Variant) -> None:
        self.case, self.variant, self.device = case, variant, torch.device(case.device)
        if variant.keep_memory and not keep_freed_memory():
            raise RuntimeError(f"'{variant.name}' needs glibc and none of its MALLOC_ variables set")
        self.network = case.network()
        set_recomputation(self.network, variant.recompute)
        for level in self.network.decoder.levels:
            level.merge = None if variant.merge else False
        self.dense = DenseBaseline(self.network).to(self.device) if variant.dense else None
        if variant.compiled:
            self.network.compile()
        self.image, self.visible, self.num_visible = case.batch(self.network)
        if variant.channels_last:
            self.network.to(memory_format=torch.channels_last_3d)
            self.image = self.image.contiguous(memory_format=torch.channels_last_3d)
        self.compute = self._encode if case.encoder_only else self._loss

    def _autocast(self) -> Any:
        dtype = autocast_dtype(self.device)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _encode(self) -> Tensor:
        """Sum of the squared features: hidden ones are zero where they are stored at all."""
        with self._autocast():
            if self.dense is not None:
                features = self.dense.features(self.image, self.visible)
            else:
                found = self.network.encoder.features(self.image, self.visible, self.num_visible)
                features = [feature.field for feature in found]
        return sum((f.float().square().sum() for f in features), self.image.new_zeros(()))

    def _loss(self) -> Tensor:
        with self._autocast():
            if self.dense is not None:
                reconstruction = self.dense(self.image, self.visible)
            else:
                reconstruction = self.network(self.image, self.visible, self.num_visible)
        return reconstruction_loss(reconstruction, self.image, self.visible)

    def run(self) -> Phases:
        """Seconds of both passes, and the loss."""
        gc.collect()
        self.network.zero_grad(set_to_none=True)
        begin = now(self.device)
        loss = self.compute()
        middle = now(self.device)
        loss.backward()
        end = now(self.device)
        return {"forward": middle - begin, "backward": end - middle, "loss": loss.item()}

    def gradient(self) -> Tensor:
        """Of all parameters of the last run, as one vector."""
        return torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None]).cpu()

    def operations(self) -> int:
        """Floating-point operations of a forward and backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.run()
        return counter.get_total_flops()


class Worker:
    """A variant in a process of its own, run when asked."""

    def __init__(self, case: Case, variant: Variant) -> None:
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(case, variant, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what: str) -> Any:
        """The answer to "run", "peak", "operations" or "gradient"."""
        self.connection.send(what)
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the process of '{self.variant.name}' ended (out of memory?)") from None

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def _serve(case: Case, variant: Variant, connection: Any) -> None:
    step = Step(case, variant)
    peak = PeakMemory(step.device)
    answers = {"run": step.run, "peak": peak.bytes, "operations": step.operations, "gradient": step.gradient}
    while True:
        answer = answers[connection.recv()]()
        # tensors by value: shared memory would outlive the process in no useful way
        connection.send(answer.numpy() if isinstance(answer, Tensor) else answer)


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
        grown = Case(Shape(size, case.shape.strides, case.shape.kernels), device=case.device)
        row = compare(grown, [variant], rounds)[0]
        row["times the volume"] = prod(size) // prod(case.shape.patch)
        rows.append(row)
    for row in rows:
        row["speed-up"] = f"{float(rows[0]['total [s]']) / float(row['total [s]']):.2f}"
        row["relative memory"] = f"{float(row['memory [GB]']) / float(rows[0]['memory [GB]']):.2f}"
    return rows


def _preset_row(case: Case, variant: Variant, rounds: int) -> list[dict[str, Any]]:
    parameters = sum(parameter.numel() for parameter in case.network().parameters())
    row = compare(case, [variant], rounds)[0]
    return [{"preset": case.preset, "parameters [M]": f"{parameters / 1e6:.1f}"} | row]


PARTS = ("encoder", "step", "allocator", "presets", "ratios", "batches", "shapes", "growth")


def measure(part: str, device: str, rounds: int, preset: str) -> list[dict[str, Any]]:
    """The rows of one part."""
    if device == "cuda" and part == "allocator":
        return []
    best = replace(ON_CPU if device == "cpu" else LADDER[-1], name="visible blocks, all optimisations")
    more = [ON_CPU, FULL] if device == "cpu" else [ON_CUDA]
    pair = [DENSE, best]

    def case(shape: Shape, **changes: Any) -> Case:
        return Case(shape, device=device, preset=preset, **changes)

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
        return [row for name in PRESETS for row in _preset_row(Case(CUBE, device=device, preset=name), best, rounds)]
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
