"""Time and memory of a pre-training step: the plain way, visible blocks, and each further rewrite in turn.

    python -m benchmarks.step                        # everything: about 40 minutes on two CPU cores
    python -m benchmarks.step --only encoder step    # some of its parts
    python -m benchmarks.step --device cuda          # with autocast and torch.compile as further variants

Prints tables and writes benchmarks/results/step_DEVICE_PART.csv. Ratios are to the plain way in the same process and
round (see ``benchmarks.plain_network``); memory is of a process of its own per variant.
"""

import argparse
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import (
    Phases,
    Timing,
    in_turn,
    machine,
    matrix_throughput,
    now,
    peak_bytes_of,
    set_allocator,
    table,
    write_csv,
)
from benchmarks.plain_network import PlainNetwork
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.from_plans import PRESETS, decoder_width
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.precision import autocast_dtype

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
        plain: the plain way, channels-first, layer by layer.
        visible_blocks: False: dense and masked, channels-last.
        merge: the decoder's merged upsampling.
        recompute: activation checkpointing.
        keep_memory: glibc keeps freed memory (CPU).
        compiled: by torch.compile.
    """

    name: str
    plain: bool = False
    visible_blocks: bool = True
    merge: bool = False
    recompute: str = "none"
    keep_memory: bool = False
    compiled: bool = False


PLAIN = Variant("dense times mask", plain=True)
PLAIN_KEPT = Variant("dense times mask, memory kept", plain=True, keep_memory=True)
LADDER = [
    PLAIN,
    Variant("channels-last", visible_blocks=False),
    Variant("visible blocks"),
    Variant("+ merged upsampling", merge=True),
    Variant("+ light checkpointing", merge=True, recompute="light"),
]
ON_CPU = Variant("+ freed memory kept", merge=True, recompute="light", keep_memory=True)
FULL = Variant("the same, full checkpointing", merge=True, recompute="full", keep_memory=True)
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
        sizes, n = PRESETS[self.preset], len(self.shape.strides)
        network = HySparKMaskedAutoencoder(
            input_channels=1,
            n_stages=n,
            features_per_stage=sizes.features_per_stage[:n],
            conv_op=nn.Conv3d,
            kernel_sizes=self.shape.kernels,
            strides=self.shape.strides,
            n_blocks_per_stage=(*sizes.n_blocks_per_stage[: n - 1], 1),
            expansion_per_stage=(*sizes.expansion_per_stage[: n - 1], 2),
            vit_n_blocks=sizes.vit_n_blocks,
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

    def __init__(self, case: Case, variant: Variant, network: HySparKMaskedAutoencoder) -> None:
        self.case, self.variant, self.network = case, variant, network
        self.device = torch.device(case.device)
        self.image, self.visible, self.num_visible = case.batch(network)
        self.plain = PlainNetwork(network).to(self.device) if variant.plain else None
        self.compute: Callable[[], Tensor] = self._encode if case.encoder_only else self._loss
        if variant.compiled:
            # a copy: a compiled network remembers the switches it was compiled with
            self.network = case.network()
            self._configure()
            self.network.compile()
        self.last_loss = float("nan")

    def _configure(self) -> None:
        set_recomputation(self.network, self.variant.recompute)
        for level in self.network.decoder.levels:
            level.merge = None if self.variant.merge else False

    def _autocast(self) -> Any:
        dtype = autocast_dtype(self.device)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _encode(self) -> Tensor:
        with self._autocast():
            if self.plain is not None:
                features = self.plain.features(self.image, self.visible)
            else:
                encoder, blocks = self.network.encoder, self.variant.visible_blocks
                found = encoder.features(self.image, self.visible, self.num_visible, blocks)
                # hidden voxels are zero: their number is divided out below
                features = [feature.field for feature in found]
        return sum((f.float().square().sum() for f in features), self.image.new_zeros(()))

    def _loss(self) -> Tensor:
        with self._autocast():
            if self.plain is not None:
                reconstruction = self.plain(self.image, self.visible)
            else:
                reconstruction = self.network(self.image, self.visible, self.num_visible, self.variant.visible_blocks)
        return reconstruction_loss(reconstruction, self.image, self.visible)

    def __call__(self) -> Phases:
        self._configure()
        if self.device.type == "cpu":
            set_allocator(self.variant.keep_memory)
        self.network.zero_grad(set_to_none=True)
        begin = now(self.device)
        loss = self.compute()
        middle = now(self.device)
        loss.backward()
        end = now(self.device)
        self.last_loss = loss.item()
        return {"forward": middle - begin, "backward": end - middle}

    def gradient(self) -> Tensor:
        """Of all parameters of the last run, as one vector."""
        return torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None]).double()


def operations(case: Case, variant: Variant) -> int:
    """Floating-point operations of a forward and backward pass."""
    step = Step(case, variant, case.network())
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(case: Case, variant: Variant) -> int:
    """Bytes, of a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(case, variant, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured '{variant.name}' ended early (out of memory?)") from None
    finally:
        process.join()


def _report_peak(case: Case, variant: Variant, sender: Any) -> None:
    step = Step(case, variant, case.network())
    sender.send(peak_bytes_of(step, step.device))


def compare(case: Case, variants: Sequence[Variant], rounds: int, memory: bool = True) -> list[dict[str, Any]]:
    """Rows of a table; the first variant is what the others are compared with."""
    network = case.network()
    steps = {variant.name: Step(case, variant, network) for variant in variants}
    timings = in_turn(steps, rounds)
    first, rows = variants[0], []
    steps[first.name]()
    gradient = steps[first.name].gradient()
    differences = {}
    for variant in variants:
        step = steps[variant.name]
        step()
        loss = abs(step.last_loss / steps[first.name].last_loss - 1)
        differences[variant.name] = (loss, ((step.gradient() - gradient).norm() / gradient.norm()).item())
    del steps, step, network, gradient
    gc.collect()
    peaks = {variant.name: peak_memory(case, variant) for variant in variants} if memory else {}
    for variant in variants:
        flops = operations(case, variant)
        rows.append(_row(case, variant, timings, first, peaks, differences[variant.name], flops))
    return rows


def _row(
    case: Case,
    variant: Variant,
    timings: dict[str, Timing],
    first: Variant,
    peaks: dict[str, int],
    differences: tuple[float, float],
    flops: int,
) -> dict[str, Any]:
    timing, base = timings[variant.name], timings[first.name]
    row: dict[str, Any] = {
        "variant": variant.name,
        "patch": case.shape.name,
        "mask ratio": case.mask_ratio,
        "batch": case.batch_size,
        "forward [s]": f"{timing.forward:.3f}",
        "backward [s]": f"{timing.backward:.3f}",
        "total [s]": f"{timing.total:.3f}",
        "spread": f"{timing.spread:.0%}",
        "times as fast": f"{base.total / timing.total:.2f}",
        "patches/s": f"{case.batch_size / timing.total:.3g}",
        "TFLOP": f"{flops / 1e12:.2f}",
        "GFLOP/s": f"{flops / timing.total / 1e9:.0f}",
        "loss differs by": f"{differences[0]:.0e}",
        "gradient by": f"{differences[1]:.0e}",
    }
    if peaks:
        row["memory [GB]"] = f"{peaks[variant.name] / 1e9:.2f}"
        row["of its memory"] = f"{peaks[variant.name] / peaks[first.name]:.2f}"
    return row


def growth(case: Case, variant: Variant, rounds: int) -> list[dict[str, Any]]:
    """One, two and four times the volume."""
    sizes = [
        tuple(n * f for n, f in zip(case.shape.patch, factors, strict=True))
        for factors in ((1, 1, 1), (1, 1, 2), (1, 2, 2))
    ]
    rows = []
    for size in sizes:
        grown = Case(Shape(size, case.shape.strides, case.shape.kernels), device=case.device)
        row = compare(grown, [variant], rounds, memory=True)[0]
        row["times the volume"] = prod(size) // prod(case.shape.patch)
        rows.append(row)
    for row in rows:
        row["times as fast"] = f"{float(rows[0]['total [s]']) / float(row['total [s]']):.2f}"
        row["of its memory"] = f"{float(row['memory [GB]']) / float(rows[0]['memory [GB]']):.2f}"
    return rows


PARTS = ("encoder", "step", "ratios", "batches", "shapes", "growth")


def measure(part: str, device: str, rounds: int, preset: str) -> list[dict[str, Any]]:
    """The rows of one part."""
    best = ON_CPU if device == "cpu" else LADDER[-1]
    more = [ON_CPU, FULL, PLAIN_KEPT] if device == "cpu" else [ON_CUDA]
    pair = [PLAIN, best]

    def case(shape: Shape, **changes: Any) -> Case:
        return Case(shape, device=device, preset=preset, **changes)

    if part == "encoder":
        ladder = [variant for variant in [*LADDER, *more] if variant.name != "+ merged upsampling"]
        ladder = [variant for variant in ladder if not variant.compiled]
        return compare(case(CUBE, encoder_only=True), ladder, rounds)
    if part == "step":
        return compare(case(CUBE), [*LADDER, *more], rounds)
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
        for row in rows:
            row["share of a convolution's speed"] = f"{float(row['GFLOP/s']) * 1e9 / bound:.0%}"
        print(f"\n{part}\n{table(rows)}", flush=True)
        write_csv(RESULTS / f"step_{arguments.device}_{part}.csv", rows)


if __name__ == "__main__":
    main()
