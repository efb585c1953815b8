"""What several processes cost: measured with gloo on this machine, and on paper for NCCL on up to 64 GPUs.

python benchmarks/ddp_scaling.py measure                     1, 2 and 4 processes, a table in markdown
python benchmarks/ddp_scaling.py model --step-seconds 0.35   what ring all-reduce would take, likewise
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.presets import PRESETS, decoder_width
from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.train import leave
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.stepping import take_step

STAGES = 4
UNIT = 2 ** (STAGES - 1)
BYTES = 4  # of a gradient, float32
BACKWARD = 2 / 3  # part of a step in which gradients appear and can be sent
GPUS_PER_NODE = 8


def build(preset: str, stages: int = STAGES) -> HySparKMaskedAutoencoder:
    """The pre-training network of a cubic plan."""
    return HySparKMaskedAutoencoder(
        input_channels=1,
        n_stages=stages,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=((3, 3, 3),) * stages,
        strides=((1, 1, 1),) + ((2, 2, 2),) * (stages - 1),
        **PRESETS[preset].encoder_sizes(stages),
        decoder_width=decoder_width(stages, preset, None),
    )


def work(preset: str, patch: int, batch: int, steps: int) -> None:
    """One of torchrun's processes: steps that synchronise gradients and steps that do not, in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    network = DistributedDataParallel(build(preset))
    optimizer = torch.optim.AdamW(network.parameters())
    grid = (patch // UNIT,) * 3
    made = {"image": torch.randn(batch, 1, *(patch,) * 3), "visible": sample_visible(batch, grid, 0.75)}
    num_visible = int(made["visible"][0].sum())

    def loss_of(batch: dict) -> torch.Tensor:
        reconstruction = network(batch["image"], batch["visible"], num_visible)
        return reconstruction_loss(reconstruction, batch["image"], batch["visible"])

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * (steps + 1)):
        synchronised = number % 2 == 0
        network.require_backward_grad_sync = synchronised
        dist.barrier()
        start = time.perf_counter()
        take_step(network, optimizer, None, loss_of, [made], clip=5.0)
        dist.barrier()
        seconds[synchronised].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        # the first of each kind warms up
        with_, without = (sorted(seconds[kind][1:])[steps // 2] for kind in (True, False))
        print(f"RESULT {dist.get_world_size()} {with_} {without}")
    dist.destroy_process_group()
    leave()


def measure(processes: list[int], preset: str, patch: int, batch: int, steps: int) -> None:
    """Prints a table: a step of each number of processes, every process with as many patches."""
    parameters = sum(p.numel() for p in build(preset).parameters())
    print(f"Preset {preset}, {parameters / 1e6:.1f} M parameters; per process {batch} patches of {patch}^3, 1 thread;")
    print(f"{os.cpu_count()} processors, torch {torch.__version__}, median of {steps} steps.\n")
    print("| processes | step, s | without communication, s | communication share | patches/s | of ideal |")
    print("| --- | --- | --- | --- | --- | --- |")
    alone = None
    for count in processes:
        options = ["--preset", preset, "--patch", str(patch), "--batch", str(batch), "--steps", str(steps)]
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", __file__, "work"]
        # torch.distributed.run starts this file, which finds the package through PYTHONPATH or because it is installed
        paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(
            [sys.executable, *command, *options], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        step, without = map(float, line.split()[2:])
        rate = count * batch / step
        alone = alone or rate / count
        share = max(0.0, 1 - without / step)
        print(f"| {count} | {step:.2f} | {without:.2f} | {share:.0%} | {rate:.2f} | {rate / count / alone:.0%} |")


def all_reduce_seconds(gpus: int, size: float, inside: float, between: float, latency: float) -> float:
    """Ring all-reduce (Patarasuk and Yuan, 2009): every byte is sent and received 2 (N - 1) / N times.

    Args:
        gpus: N, of nodes of GPUS_PER_NODE.
        size: bytes of the gradients.
        inside: bytes/s between GPUs of a node.
        between: bytes/s of a node's network, which bounds a ring over nodes.
        latency: seconds of one of the ring's 2 (N - 1) turns.
    """
    if gpus == 1:
        return 0.0
    bandwidth = inside if gpus <= GPUS_PER_NODE else min(inside, between)
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * (gpus - 1) * latency


def model(preset: str, step: float, inside: float, between: float, latency: float) -> None:
    """Prints the table of a model, in which nothing is measured: every GPU has as many patches as one alone."""
    parameters = sum(p.numel() for p in build(preset, stages=5).parameters())
    size = parameters * BYTES
    print(f"A model, not a measurement. Preset {preset}: {parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB of")
    print(f"gradients; a step of one GPU takes {step} s, two thirds of it backward; {inside / 1e9:g} GB/s inside a")
    print(
        f"node of {GPUS_PER_NODE}, {between / 1e9:g} GB/s between nodes, {latency * 1e6:.0f} us per turn of the ring.\n"
    )
    print("| GPUs | all-reduce, ms | of ideal, no overlap | of ideal, overlapped with the backward pass |")
    print("| --- | --- | --- | --- |")
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        sent = all_reduce_seconds(gpus, size, inside, between, latency)
        exposed = max(0.0, sent - BACKWARD * step)
        print(f"| {gpus} | {sent * 1e3:.1f} | {step / (step + sent):.0%} | {step / (step + exposed):.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "model", "work"))
    parser.add_argument("--preset", choices=PRESETS, default=None, help="default: S for measure, B for model")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--patch", type=int, default=32, help="voxels per axis")
    parser.add_argument("--batch", type=int, default=2, help="patches per process")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--step-seconds", type=float, default=0.35, help="of one GPU alone")
    parser.add_argument("--inside", type=float, default=200e9, help="bytes/s between the GPUs of a node")
    parser.add_argument("--between", type=float, default=25e9, help="bytes/s of a node's network: 25e9 is 200 Gbit/s")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds per turn of the ring")
    given = parser.parse_args()
    if given.what == "model":
        model(given.preset or "B", given.step_seconds, given.inside, given.between, given.latency)
    elif given.what == "measure":
        measure(given.processes, given.preset or "S", given.patch, given.batch, given.steps)
    else:
        work(given.preset, given.patch, given.batch, given.steps)


if __name__ == "__main__":
    main()
