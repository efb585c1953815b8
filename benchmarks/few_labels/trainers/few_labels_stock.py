"""Stock nnU-Net at the benchmark's lengths; nnU-Net finds this module through ``nnUNet_extTrainer``."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from hyspark_nnunet.training.runtime.randomness import seed_generators

PREFIX = "FEW_LABELS_"
NAMES = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every", "seed")


class FewLabelsStockTrainer(nnUNetTrainer):
    """nnU-Net's trainer with lengths and a seed from FEW_LABELS_ variables; nothing else is changed."""

    def initialize(self) -> None:
        for name in NAMES:
            setattr(self, name, int(os.environ[PREFIX + name.upper()]))
        torch.manual_seed(self.seed)
        super().initialize()

    def on_train_epoch_start(self) -> None:
        """Seeds every epoch as HySparK's trainers do: a training that was interrupted draws what it would have."""
        super().on_train_epoch_start()
        seed_generators(self.seed, self.current_epoch, rank=0, masks=torch.Generator())
