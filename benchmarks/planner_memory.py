"""Memory of a training step as the planner estimates it, and as it is: each measured in a fresh process.

    python -m benchmarks.planner_memory                          # CPU: float32, peak resident memory
    python -m benchmarks.planner_memory --device cuda            # AMP, peak of torch's allocator
    python -m benchmarks.planner_memory --networks S ResidualEncoderUNet --patches 64 96

Networks are HySparK's presets and nnU-Net's own. Measured is what two steps add to the process that has imported
everything: weights, gradients, AdamW's moments, activations and transient buffers.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from benchmarks.measuring import PeakMemory
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible, unit_size
from hyspark_nnunet.planning.spark import spark_finetuning_memory, spark_pretraining_memory
from hyspark_nnunet.planning.step_memory import finetuning_memory, pretraining_memory
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.hyspark import HySparKFamily
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.memory.step_bytes import of_nnunets_loss
from hyspark_nnunet.training.runtime.precision import autocast_dtype
from hyspark_nnunet.training.spark import ARCHITECTURES, SparKFamily

KINDS = ("pretraining", "finetuning")
CLASSES = 3
MASK_RATIO = 0.75


def configuration_of(patch_size: Sequence[int], network: str) -> dict[str, Any]:
    """A plan's configuration with a patch: as many stages of stride 2 as leave 4 mask units per axis, five at most.

    Args:
        patch_size: voxels per axis.
        network: a preset of HySparK, or a network of nnU-Net, with the channels and blocks of its planners.
    """
    n_stages = min(5, min(patch_size).bit_length() - 2)
    dims = len(patch_size)
    arguments = {
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "n_stages": n_stages,
        "strides": [[1] * dims] + [[2] * dims] * (n_stages - 1),
        "kernel_sizes": [[3] * dims] * n_stages,
    }
    imported = ["conv_op"]
    if network in ARCHITECTURES:
        blocks = {"n_conv_per_stage": [2] * n_stages}
        if network == "ResidualEncoderUNet":
            blocks = {"n_blocks_per_stage": [1, 3, 4, 6, 6][:n_stages]}
        arguments |= {
            **blocks,
            "features_per_stage": [min(320, 32 * 2**stage) for stage in range(n_stages)],
            "n_conv_per_stage_decoder": [1 if "n_blocks_per_stage" in blocks else 2] * (n_stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        imported += ["norm_op", "nonlin"]
        class_name, section = f"dynamic_network_architectures.architectures.unet.{network}", {}
    else:
        class_name, section = "a U-Net", {"hyspark": {"preset": network}}
    architecture = {"network_class_name": class_name, "arch_kwargs": arguments, "_kw_requires_import": imported}
    spacing = [1.0] * dims
    return {"patch_size": list(patch_size), "spacing": spacing, "architecture": architecture, **section}


def estimated(kind: str, configuration: dict[str, Any], batch_size: int, mixed: bool) -> float:
    """Bytes, by the planner."""
    ours = "hyspark" in configuration
    if kind == "pretraining":
        memory = (pretraining_memory if ours else spark_pretraining_memory)(configuration, 1, mixed)
    else:
        memory = (finetuning_memory if ours else spark_finetuning_memory)(configuration, 1, CLASSES, mixed)
    return memory.bytes_of(configuration["patch_size"], batch_size)


def measure(kind: str, configuration: dict[str, Any], batch_size: int, device: str) -> int:
    """Bytes that two real steps take in this process."""
    manager, patch_size = ConfigurationManager(configuration), configuration["patch_size"]
    family = HySparKFamily() if "hyspark" in configuration else SparKFamily()
    section = family.section(configuration)
    pretraining = resolve_recipe(PretrainRecipe, section, environment={})
    grid = mask_grid(patch_size, unit_size(family.strides(manager, pretraining)))
    torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3)).sum()  # the libraries of a first step
    peak = PeakMemory(torch.device(device))
    if kind == "pretraining":
        network = family.masked_autoencoder(manager, pretraining, 1)
        set_recomputation(network, pretraining.activation_checkpointing)
    else:
        recipe = resolve_recipe(FinetuneRecipe, section, environment={})
        network = family.segmentation_network(manager, recipe, 1, CLASSES, True)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    # of the trainers: pre-training has bfloat16 where the GPU has it
    dtype = torch.float16 if kind == "finetuning" else autocast_dtype(torch.device(device))
    for _ in range(2):
        image = torch.rand(batch_size, 1, *patch_size, device=device)
        with torch.autocast(device, dtype, enabled=device == "cuda"):
            if kind == "pretraining":
                visible = sample_visible(batch_size, grid, MASK_RATIO, device=device)
                loss = reconstruction_loss(network(image, visible, num_visible_units(grid, MASK_RATIO)), image, visible)
            else:
                loss = of_nnunets_loss(network(image))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak.bytes()


def measured_in_a_fresh_process(kind: str, configuration: dict[str, Any], batch_size: int, device: str) -> int:
    """``measure``, where nothing was allocated before."""
    words = json.dumps([kind, configuration, batch_size, device])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.planner_memory", "--one", words],
        # blocks go back to the system when they are freed: counted is what tensors hold, not what glibc's heap keeps
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--networks", nargs="+", default=["S", "B", *ARCHITECTURES], help="presets, or of nnU-Net")
    parser.add_argument("--patches", nargs="+", type=int, default=[64, 96], help="edge lengths")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(*json.loads(arguments.one)))
        return
    print("| step | network | patch | batch | estimated, MiB | measured, MiB | estimated / measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, network, edge in product(KINDS, arguments.networks, arguments.patches):
        configuration = configuration_of([edge] * 3, network)
        guess = estimated(kind, configuration, arguments.batch, mixed=arguments.device == "cuda")
        found = measured_in_a_fresh_process(kind, configuration, arguments.batch, arguments.device)
        row = (kind, network, f"{edge}^3", arguments.batch, f"{guess / 2**20:.0f}", f"{found / 2**20:.0f}")
        print(f"| {' | '.join(map(str, row))} | {guess / found:.2f} |", flush=True)


if __name__ == "__main__":
    main()
