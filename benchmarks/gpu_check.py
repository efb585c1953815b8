"""Does pre-training do on a GPU what the documentation expects of it? Below ten minutes, in one process.

    python -m benchmarks.gpu_check                 # on the first GPU; without one, the tiny version on the CPU
    python -m benchmarks.gpu_check --tiny          # small networks, to try the check itself

Needs torch, NumPy and dynamic-network-architectures; nnU-Net need not be installed. Writes gpu_check.csv, after
every row, and gpu_check.md, with pass or fail of every goal, to --out. A row that fails or does not fit into memory is
reported, and the others are measured. On a CPU no goal is passed: they are "not measured".

Several GPUs, and with them synchronised BatchNorm, are not part of it.
"""

import argparse
import gc
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, so that its objects are frozen, too

from benchmarks.gpu_goals import ENCODER, MISSED, NUMBERS, PROBE, STEP, Goal, goals, report
from benchmarks.gpu_kernels import operations
from benchmarks.gpu_steps import LIMIT, TrainingStep, measure_step, memory_limit, planned_batch, planned_bytes
from benchmarks.gpu_table import MEASURED, OUT_OF_MEMORY, Table
from benchmarks.measuring import machine, matrix_throughput, now
from benchmarks.step_cases import DENSE, Case, HySparKCase, SparKCase, Variant, isotropic
from benchmarks.step_process import Step
from hyspark_nnunet.masking import view_at
from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.training.memory.step_bytes import GIB
from hyspark_nnunet.training.probe.linear_probe import (
    PATCHES_PER_CASE,
    VOXELS_TO_FIT,
    VOXELS_TO_SCORE,
    LabelledPatch,
    LinearProbe,
)
from hyspark_nnunet.training.runtime.precision import autocast_dtype

RESULTS = Path(__file__).parent / "results"

BLOCKS = Variant("visible blocks, light checkpointing", merge=True, recompute="light")
STRONG = Variant(
    "dense baseline, channels-last, nothing gathered by the mask", dense=True, channels_last=True, static_shapes=True
)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how long.

    Attributes:
        networks: by name, with the batch size of the goals.
        small: networks whose numbers are compared with float64 on the CPU.
        rounds: how often a step is timed.
        backend: of torch.compile.
        probe_cases: to fit, and as many to score.
        probe_voxels: of a patch, to fit and to score.
        blocks: visible mask units in the check of single operations.
        channels: of the stages there.
        edge: of the image of the convolution that says what the device can do.
    """

    networks: dict[str, Case]
    small: dict[str, Case]
    rounds: int
    backend: str
    probe_cases: int
    probe_voxels: tuple[int, int]
    blocks: int
    channels: tuple[int, ...]
    edge: int


def small_networks(device: str) -> dict[str, Case]:
    return {
        "HySparK": HySparKCase(shape=isotropic((8, 8, 8), n_stages=2), preset="S", batch_size=2, device=device),
        "SparK on ResEnc": SparKCase(
            shape=isotropic((8, 8, 8), n_stages=2), features=(4, 8), blocks=(1, 1), batch_size=2, device=device
        ),
    }


def full_sizes(device: str) -> Sizes:
    hybrid = HySparKCase(shape=isotropic((112, 128, 128)), batch_size=13, device=device)
    # six stages: a mask unit is 32^3 voxels
    resenc = SparKCase(shape=isotropic((96, 128, 128), n_stages=6), device=device)
    resenc = replace(resenc, batch_size=planned_batch(resenc, BLOCKS))
    return Sizes(
        {"HySparK": hybrid, "SparK on ResEnc": resenc},
        small_networks(device),
        rounds=5,
        backend="inductor",
        probe_cases=PretrainRecipe().probe_cases,
        probe_voxels=(VOXELS_TO_FIT, VOXELS_TO_SCORE),
        blocks=13 * 112,
        channels=(32, 64, 128, 256),
        edge=48,
    )


def tiny_sizes(device: str) -> Sizes:
    small = small_networks(device)
    return Sizes(
        small,
        small,
        rounds=1,
        backend="aot_eager",  # traced and differentiated: code for a CPU would take minutes
        probe_cases=1,
        probe_voxels=(30, 40),
        blocks=2,
        channels=(4, 8),
        edge=4,
    )


# ------------------------------------------------------------------------------------------------------- rows


def about_the_machine(device: torch.device, edge: int) -> dict[str, Any]:
    dtype = autocast_dtype(device) or torch.float32
    source = torch.empty(2**28 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        begin = now(device)
        target.copy_(source)
        seconds.append(now(device) - begin)
    return {
        "GB/s": f"{2 * len(source) / min(seconds) / 1e9:.3g}",
        "TFLOP/s": f"{matrix_throughput(device, dtype, edge) / 1e12:.3g}",
        "note": f"{machine(device)}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    }


def at_largest_batch(table: Table, check: str, name: str, case: Case, variant: Variant, rounds: int) -> dict[str, Any]:
    """A row about a variant at the largest batch that fits: at most the case's, and that of an earlier row about it."""
    about = (check, name, variant.name, MEASURED)
    earlier = [
        row["batch"] for row in table.rows if (row["check"], row["network"], row["variant"], row["result"]) == about
    ]
    largest = min([case.batch_size, *earlier])
    for batch_size in (largest, *(n for n in (20, 16, 12, 10, 8, 6, 4, 3, 2, 1) if n < largest)):
        sized = replace(case, batch_size=batch_size)
        row = table.measure(check, partial(measure_step, sized, variant, rounds), **_names(name, sized, variant))
        if row["result"] != OUT_OF_MEMORY:
            break
    return row


def _names(name: str, case: Case, variant: Variant) -> dict[str, Any]:
    dtype = autocast_dtype(torch.device(case.device)) if variant.autocast == "training" else variant.autocast
    return {
        "network": name,
        "variant": variant.name,
        "compiled": "yes" if variant.compiled else "no",
        "dtype": "float32" if dtype in (None, "none") else str(dtype).removeprefix("torch."),
        "shape": case.shape.name,
        "batch": case.batch_size,
    }


def check_steps(table: Table, sizes: Sizes, compiled: bool) -> None:
    """Whole steps and encoders, of visible blocks and of the dense baseline; compiled, they are what the goals need."""
    for name, case in sizes.networks.items():
        blocks, dense = (replace(v, compiled=compiled, backend=sizes.backend) for v in (BLOCKS, STRONG))
        step = partial(_planned_and_measured, case, blocks, sizes.rounds)
        with memory_limit(torch.device(case.device), LIMIT):
            row = table.measure(STEP, step, **_names(name, case, blocks))
        if row["result"] == OUT_OF_MEMORY:  # how much would it have taken?
            table.measure(STEP, step, **_names(name, case, blocks))
        at_largest_batch(table, STEP, name, case, dense, sizes.rounds)
        only = replace(case, encoder_only=True)
        table.measure(ENCODER, partial(measure_step, only, blocks, sizes.rounds), **_names(name, only, blocks))
        at_largest_batch(table, ENCODER, name, only, dense, sizes.rounds)


def _planned_and_measured(case: Case, variant: Variant, rounds: int) -> dict[str, Any]:
    planned = f"{planned_bytes(case, variant) / GIB:.2f}"
    return {"planner GiB": planned, **measure_step(case, variant, rounds, closely=True)}


def check_other_steps(table: Table, sizes: Sizes) -> None:
    """Whole steps, not compiled: the dense baseline of public codes, other depths of checkpointing, a batch of two."""
    for name, case in sizes.networks.items():
        at_largest_batch(table, STEP, name, case, DENSE, sizes.rounds)
        for recompute in ("none", "full"):
            variant = replace(BLOCKS, name=f"visible blocks, checkpointing {recompute}", recompute=recompute)
            table.measure(STEP, partial(measure_step, case, variant, sizes.rounds), **_names(name, case, variant))
        two = replace(case, batch_size=2)
        table.measure(STEP, partial(measure_step, two, BLOCKS, sizes.rounds), **_names(name, two, BLOCKS))


def check_probe(table: Table, sizes: Sizes) -> None:
    """The linear probe with as many cases, patches and voxels as in a training."""
    for name, case in sizes.networks.items():
        table.measure(PROBE, partial(_probe, case, sizes), network=name, shape=case.shape.name)


def _probe(case: Case, sizes: Sizes) -> dict[str, Any]:
    device, generator = torch.device(case.device), torch.Generator().manual_seed(0)
    image = torch.randn(1, *case.shape.patch, generator=generator)

    def patches(voxels: int) -> list[LabelledPatch]:
        places = torch.rand(voxels, len(case.shape.patch), generator=generator) * 2 - 1
        labels = torch.randint(4, (voxels,), generator=generator)
        return [LabelledPatch(image, places, labels)] * (sizes.probe_cases * PATCHES_PER_CASE)

    probe = LinearProbe(*map(patches, sizes.probe_voxels))
    encoder, dtype = case.network().encoder.eval(), autocast_dtype(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        encoder(image[None].to(device))
        begin = now(device)
        score = probe.score(encoder, device)
        seconds = now(device) - begin
    return {"total ms": f"{1e3 * seconds:.1f}", "note": f"Dice of random labels {score.mean:.3f}"}


def check_numbers(table: Table, sizes: Sizes) -> None:
    """Small networks on the device, against the dense baseline in float64 on the CPU."""
    compiled = replace(BLOCKS, compiled=True, backend=sizes.backend)
    for name, case in sizes.small.items():
        variants = [
            replace(BLOCKS, name=f"visible blocks, checkpointing {recompute}", recompute=recompute, autocast=autocast)
            for autocast in ("none", "bfloat16", "float16")
            for recompute in (("none", "light", "full") if autocast == "none" else ("light",))
        ]
        # steps of the tiny check are compiled in any case, and compiling is most of its time
        others = [STRONG] if case in sizes.networks.values() else [STRONG, compiled]
        variants += [replace(variant, autocast="none") for variant in others]
        for variant in variants:
            table.measure(NUMBERS, partial(_numbers, case, variant), **_names(name, case, variant))
        table.measure("hidden voxels", partial(_hidden, case), **_names(name, case, BLOCKS))
        table.measure("skipped step", partial(_skipped, case), **_names(name, case, BLOCKS))


@cache
def _reference(case: Case) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the dense baseline, in float64 on the CPU."""
    step = Step(replace(case, device="cpu"), DENSE)
    step.whole.double()
    step.image = step.image.double()
    return step.run()["loss"], step.gradient()


def _numbers(case: Case, variant: Variant) -> dict[str, Any]:
    loss, gradient = _reference(case)
    step = Step(case, variant)
    found = step.run()["loss"]
    difference = (step.gradient().double() - gradient).norm() / gradient.norm()
    return {"loss error": f"{abs(found / loss - 1):.1e}", "gradient error": f"{float(difference):.1e}"}


def _hidden(case: Case) -> dict[str, Any]:
    """NaN in every hidden voxel changes no visible feature by a bit."""
    step = Step(replace(case, encoder_only=True), BLOCKS)
    expected = step.run()["loss"]
    mask = view_at(step.visible, step.network.encoder.unit)
    step.image = step.image.masked_fill(~mask, float("nan"))
    return {"loss error": f"{abs(step.run()['loss'] - expected):.1e}"}


def _skipped(case: Case) -> dict[str, Any]:
    """A loss that is not finite changes no weight; the next step is taken."""
    step = TrainingStep(case, BLOCKS)
    before = [parameter.detach().clone() for parameter in step.network.parameters()]
    image, step.image = step.image, torch.full_like(step.image, float("nan"))
    skipped = not step.take()
    same = all(torch.equal(*pair) for pair in zip(before, step.network.parameters(), strict=True))
    step.image = image
    if not (skipped and same and step.take()):
        raise AssertionError(f"skipped: {skipped}; weights unchanged: {same}")
    return {}


def check_operations(table: Table, sizes: Sizes, device: torch.device) -> None:
    """Single operations at the sizes of the first stages."""
    dtype = autocast_dtype(device) or torch.float32
    shown, compiled = str(dtype).replace("torch.", ""), sizes.backend == "inductor"
    unit = 2 ** (len(sizes.channels))
    for name, shape, measured in operations(device, dtype, sizes.blocks, unit, sizes.channels, compiled):
        table.measure("operation", measured, variant=name, shape=shape, dtype=shown)


# --------------------------------------------------------------------------------------------------------- all


def check(sizes: Sizes, device: torch.device, folder: Path, minutes: float) -> list[Goal]:
    """Measures everything, first what the goals need, and writes table and report."""
    gc.freeze()  # collecting garbage, as every run does, need not search what was imported
    table = Table(folder / "gpu_check.csv", 60 * minutes)
    about = table.measure("machine", partial(about_the_machine, device, sizes.edge))
    check_probe(table, sizes)
    # not compiled first: they find out which batches fit, without compiling for those that do not
    for compiled in (False, True):
        check_steps(table, sizes, compiled)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_numbers(table, sizes)
    check_other_steps(table, sizes)
    check_operations(table, sizes, device)
    found = goals(table.rows, list(sizes.networks), device.type == "cuda")
    report(folder / "gpu_check.md", about["note"], found, table.rows)
    return found


def main() -> int:
    """Returns 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks; on a CPU always")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row begins later (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        # shapes are static, as in nnU-Net's training
        torch.backends.cudnn.benchmark = True
    tiny = arguments.tiny or device.type != "cuda"
    sizes = (tiny_sizes if tiny else full_sizes)(arguments.device)
    found = check(sizes, device, arguments.out, arguments.minutes)
    print((arguments.out / "gpu_check.md").read_text(encoding="utf-8"))
    return int(any(goal.verdict == MISSED for goal in found))


if __name__ == "__main__":
    sys.exit(main())
