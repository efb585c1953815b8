"""The trainers with a record of every step, and with incidents; nnU-Net finds them through nnUNet_extTrainer.

RECORD: file that gets a JSON line per step. INCIDENT: "what@epoch.step" with what a signal's name or "remove", which
removes the results folder. VALIDATE: "0" leaves out the last validation of whole cases.
"""

import copy
import json
import os
import shutil
import signal

import nnunetv2.training.loss.dice as dice
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.spark import SparKPretrainTrainer


class Recording:
    def initialize(self) -> None:
        # as nnU-Net's developers are about to have it: the rank on the machine
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        super().initialize()

    def train_step(self, *batches: dict) -> dict:
        what, _, moment = os.environ.get("INCIDENT", "").partition("@")
        if moment == f"{self.current_epoch}.{self._iteration_in_epoch}":
            if what == "remove":
                shutil.rmtree(self.output_folder_base)
            elif self.rank in (0, int(os.environ.get("INCIDENT_RANK", "0"))):
                os.kill(os.getpid(), getattr(signal, what))
        taken = super().train_step(*batches)
        self.record(loss=taken["loss"], cases=[str(case) for batch in batches for case in batch["keys"]])
        return taken

    def record(self, **values) -> None:
        where = {"epoch": self.current_epoch, "step": self._iteration_in_epoch, "rank": self.rank}
        with open(f"{os.environ['RECORD']}.{self.rank}", "a") as file:
            file.write(json.dumps(where | values | {"lr": self.optimizer.param_groups[0]["lr"]}) + "\n")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.is_ddp:
            batch = next(self.dataloader_train)
            self.record(gradients_differ_by=self.difference_from_one_process(batch))

    def on_train_end(self) -> None:
        super().on_train_end()
        parameters = torch.cat([p.detach().flatten() for p in self.bare_network.parameters()])
        torch.save(parameters, f"{os.environ['RECORD']}.{self.rank}.pt")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        if os.environ["VALIDATE"] != "0":
            super().perform_actual_validation(save_probabilities)

    def difference_from_one_process(self, batch: dict) -> float | None:
        """How far DDP's gradients are from those of one process with the joint batch, as a part of the latter.

        In float64, BatchNorm in eval, by the trainer's own loss of a batch; None on other ranks than 0.
        """
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, batch)
        bare = copy.deepcopy(self.bare_network).double().eval()
        here, alone = copy.deepcopy(bare), copy.deepcopy(bare)
        kept = self.network, self.loss, self.batch_size, self.is_ddp
        self.network = DistributedDataParallel(here)
        self.mask_generator.manual_seed(self.rank)
        self.batch_loss(_double(batch)).backward()
        if self.rank == 0:
            self.network, self.batch_size, self.is_ddp = alone, self.global_batch_size, False
            self.loss = self._build_loss()
            self.joint_loss([_double(part) for part in parts]).backward()
        self.network, self.loss, self.batch_size, self.is_ddp = kept
        if self.rank != 0:
            return None
        pairs = list(zip(alone.parameters(), here.parameters(), strict=True))
        assert all((one.grad is None) == (other.grad is None) for one, other in pairs)
        pairs = [(one.grad, other.grad) for one, other in pairs if one.grad is not None]
        # a bias before a norm has no gradient but what rounding leaves of it
        floor = 1e-6 * max(float(one.abs().max()) for one, _ in pairs)
        return max(float((one - other).abs().max() / one.abs().max().clamp_min(floor)) for one, other in pairs)


def _double(batch: dict) -> dict:
    return batch | {"data": batch["data"].double()}


class RecordingPretraining(Recording):
    def joint_loss(self, parts: list[dict]) -> torch.Tensor:
        """As one process computes it, with the masks that the ranks drew."""
        masks = []
        for rank, part in enumerate(parts):
            generator = torch.Generator().manual_seed(rank)
            masks.append(sample_visible(len(part["data"]), self.grid, self.recipe.mask_ratio, generator))
        return self._loss_of(torch.cat([part["data"] for part in parts]), torch.cat(masks))


class RecordingPretrainTrainer(RecordingPretraining, HySparKPretrainTrainer):
    pass


class RecordingSparKPretrainTrainer(RecordingPretraining, SparKPretrainTrainer):
    pass


class RecordingFinetuneTrainer(Recording, HySparKFinetuneTrainer):
    def on_train_start(self) -> None:
        # nnU-Net's Dice sums in float32 whatever it is given; in float64 the comparison is sharp
        kept, dice.torch = dice.torch, _Float64Torch()
        try:
            super().on_train_start()
        finally:
            dice.torch = kept

    def joint_loss(self, parts: list[dict]) -> torch.Tensor:
        targets = [part["target"] for part in parts]
        joint = {
            "data": torch.cat([part["data"] for part in parts]),
            "target": [torch.cat(level) for level in zip(*targets, strict=True)],
        }
        return self.batch_loss(joint)


class _Float64Torch:
    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)
