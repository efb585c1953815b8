"""nnUNetv2_train for torchrun: the same arguments, on any number of GPUs and machines.

    torchrun --nnodes 2 --nproc_per_node 8 ... -m hyspark_nnunet.train 60 3d_fullres all -tr HySparKPretrainTrainer

NCCL on CUDA, gloo on the CPU. Without torchrun it is nnUNetv2_train itself.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from hyspark_nnunet.training.distributed import DistributedTraining
from hyspark_nnunet.training.runtime.ranks import TIMEOUT, from_torchrun, number_on_machine


def main() -> None:
    """Runs nnU-Net's command, as one of torchrun's processes if torchrun started this one."""
    if not from_torchrun():
        run_training_entry()
        return
    device, trainer, num_gpus = launch_arguments(sys.argv[1:])
    if num_gpus > 1:
        sys.exit(f"-num_gpus {num_gpus}: leave it out; torchrun's --nproc_per_node sets the number of processes")
    if not issubclass(recursive_find_trainer_class_by_name(trainer), DistributedTraining):
        sys.exit(f"-tr {trainer}: only HySparK's trainers support torchrun; use nnUNetv2_train -num_gpus for others")
    if device == "cuda":
        if number_on_machine() >= torch.cuda.device_count():
            sys.exit(
                f"process {number_on_machine()} of this machine finds {torch.cuda.device_count()} GPUs: start at most "
                "that many (--nproc_per_node), or train with -device cpu"
            )
        torch.cuda.set_device(number_on_machine())
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        run_training_entry()
    except SystemExit as ended:
        # a training that was stopped by a signal is no failure
        if ended.code:
            raise
    finally:
        dist.destroy_process_group()
    if device != "cuda":
        leave()


def leave() -> None:
    """Ends the process with code 0, without the interpreter's finalization.

    gloo's threads outlive their process group if DDP has used it. A thread that frees a tensor during the finalization
    aborts the process, and torchrun reports a finished training as failed. A thread that does so while DDP's wrapper is
    freed causes a deadlock with the interpreter.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch_arguments(argv: Sequence[str]) -> tuple[str, str, int]:
    """The arguments of nnUNetv2_train that the launch depends on: device, trainer, number of GPUs.

    nnU-Net's own parser is inside its command, and parses them again.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-num_gpus", type=int, default=1)
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    return known.device, known.tr, known.num_gpus


if __name__ == "__main__":
    main()
