"""Which of a training's processes this is, and what they decide together.

The global rank decides who writes files, and which crops, masks and cases belong to which process; the rank on the
machine decides which GPU is used. nnU-Net's ``local_rank`` is the global rank today and is about to become the rank on
the machine: neither this file nor the trainers read it.
"""

import os
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# how long a process waits for another, which may be writing a checkpoint or validating the largest case; torchrun
# notices at once if a process ends
TIMEOUT = timedelta(hours=1)


def from_torchrun() -> bool:
    """Was this process started by torchrun, or by another launcher that sets its variables?"""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_distributed() -> bool:
    """Is this process one of several that train together?"""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


def global_rank() -> int:
    """Number of this process among all that train together, on all machines."""
    return dist.get_rank() if is_distributed() else 0


def is_first_rank() -> bool:
    """Is this the process that writes files?"""
    return global_rank() == 0


def number_on_machine() -> int:
    """torchrun's LOCAL_RANK; without torchrun (``nnUNetv2_train -num_gpus``) all processes are on one machine.

    torchrun's variables may be left over in the shell: they are used only if they match the process group.
    """
    if not from_torchrun():
        return dist.get_rank()
    others = is_distributed() and (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) != (
        dist.get_rank(),
        dist.get_world_size(),
    )
    return dist.get_rank() if others else int(os.environ["LOCAL_RANK"])


def processes_on_machine() -> int:
    """torchrun's LOCAL_WORLD_SIZE, or the number of all processes."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def device_of_process(device: torch.device) -> torch.device:
    """The device of this process among all devices of the requested type."""
    return torch.device(device.type, number_on_machine()) if device.type == "cuda" else torch.device(device.type)


def any_rank(here: bool) -> bool:
    """Whether ``here`` is true in any process. All processes must call this; it does not wait for their GPUs."""
    if not is_distributed():
        return here
    flag = torch.tensor(float(here))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return bool(flag)


@lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of all processes for tensors on the CPU, beside the one for GPUs."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)


def maximum_over_ranks(value: Tensor) -> Tensor:
    """The largest value of all processes, on the device of ``value``. All processes must call this."""
    if is_distributed():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def every_rank(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def of_first_rank(value: T) -> T:
    """The value of rank 0."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
