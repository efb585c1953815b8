"""Training with several processes: how the batch is divided and the network is wrapped."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.architectures.masked_autoencoder import MaskedAutoencoder
from hyspark_nnunet.recipe.fields import variable_name
from hyspark_nnunet.training.runtime.ranks import (
    device_of_process,
    every_rank,
    number_on_machine,
    processes_on_machine,
    world_size,
)
from hyspark_nnunet.training.saving import SavedTraining


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def _compile_undivided() -> None:
    """Lets torch.compile keep DDP's graphs whole: torch 2.5 cannot divide one with recomputation."""
    torch._dynamo.config.optimize_ddp = False


class DistributedTraining(SavedTraining):
    """A training with one or many processes, on one or many machines; nnU-Net's DDP is limited to one machine."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            # nnU-Net assumes CUDA under DDP, and uses the global rank as the number of the GPU
            self.device = device_of_process(device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            else:
                # nnU-Net lets every process use all processors
                torch.set_num_threads(max(1, torch.get_num_threads() // processes_on_machine()))

    @property
    def global_batch_size(self) -> int:
        """Patches of a batch over all processes."""
        return self.configuration_manager.batch_size

    @property
    def loss_share(self) -> float:
        """Factor on the loss of this process that makes DDP's mean over processes the mean over the joint batch.

        1 if all processes have the same number of patches.
        """
        return 1.0 if not self.is_ddp else world_size() * self.batch_size / self.global_batch_size

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net's division of the batch among the processes.

        Raises:
            ValueError: there are more processes than patches.
        """
        if self.is_ddp and self.global_batch_size < world_size():
            raise ValueError(
                f"a batch of {self.global_batch_size} patches cannot be divided among {world_size()} processes: set "
                f"{variable_name('batch_size')} to {world_size()} or more, or start fewer processes"
            )
        super()._set_batch_size_and_oversample()

    @property
    def has_batch_norm(self) -> bool:
        """Does the network compute statistics over a batch?"""
        return _has_batch_norm(self.network)

    def compile_network(self) -> None:
        """torch.compile where nnU-Net uses it, but without synchronised BatchNorm: then only the encoder is compiled.

        torch.compile breaks its graph there, also inside what is recomputed, which takes more memory than planned. If
        the encoder has BatchNorm, too, nothing is compiled.
        """
        if not self._do_i_compile():
            return
        if world_size() == 1 or not self.has_batch_norm:
            self.print_to_log_file("Using torch.compile...")
            if world_size() > 1 and torch.__version__ < "2.6":
                _compile_undivided()
            self.network = torch.compile(self.network)
        elif isinstance(self.network, MaskedAutoencoder) and not _has_batch_norm(self.network.encoder):
            self.print_to_log_file("Using torch.compile for the encoder (synchronised BatchNorm breaks the rest)...")
            _compile_undivided()
            self.network.compile_encoder()
        else:
            self.print_to_log_file("Not compiled: synchronised BatchNorm breaks the graph of torch.compile.")

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of the network that no loss depends on."""
        return []

    def distribute_network(self) -> None:
        """Wraps the network in DDP without its search for unused parameters; call it after the optimizer is built."""
        for parameter in self.unused_parameters():
            # DDP would wait for its gradient; the optimizer skips it, as in a single process
            parameter.requires_grad_(False)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            # in DDP's group, its exchanges would wait for the gradients that are sent at the same time
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network, dist.new_group())
        self.network = DistributedDataParallel(self.network, device_ids=[self.device.index] if on_cuda else None)
        self.print_to_log_file(
            f"{world_size()} processes over {dist.get_backend()}; batch of {self.global_batch_size} patches, "
            f"{self.batch_size} of them on rank {self.rank}, on {self.device}"
        )
        if not on_cuda and self.has_batch_norm:
            self.print_to_log_file(
                "BatchNorm is not synchronised (PyTorch does that only on CUDA): every process normalises with its own "
                "part of the batch."
            )

    def make_split_in_turn(self) -> None:
        """Lets one process at a time create splits_final.json, so that no process reads a half-written file.

        Rank 0 first, then the first process of each machine, in case the machine has its own preprocessed data.
        """
        if not self.is_ddp or self.fold == "all":
            return
        mine = 0 if self.rank == 0 else 1 if number_on_machine() == 0 else 2
        for turn in range(3):
            if turn == mine:
                self.do_split()
            dist.barrier()

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks, concatenated."""
        return [value for part in every_rank(values) for value in part]
