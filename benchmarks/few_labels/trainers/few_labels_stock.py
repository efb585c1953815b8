"""Stock nnU-Net at the benchmark's lengths; nnU-Net finds this module through ``nnUNet_extTrainer``."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from hyspark_nnunet.training.runtime.randomness import seed_generators
from hyspark_nnunet.training.runtime.ranks import global_rank

PREFIX = "FEW_LABELS_"
LENGTHS = ("NUM_EPOCHS", "NUM_ITERATIONS_PER_EPOCH", "NUM_VAL_ITERATIONS_PER_EPOCH", "SAVE_EVERY")


class FewLabelsStockTrainer(nnUNetTrainer):
    """nnU-Net's trainer with lengths and a seed from FEW_LABELS_ variables; nothing else is changed."""

    # nnU-Net reads the names of the parameters
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        for name in LENGTHS:
            setattr(self, name.lower(), int(os.environ[PREFIX + name]))
        self.seed = int(os.environ[PREFIX + "SEED"])

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()

    def on_train_epoch_start(self) -> None:
        """Seeds every epoch as HySparK's trainers do: a training that was interrupted draws what it would have."""
        super().on_train_epoch_start()
        seed_generators(self.seed, self.current_epoch, global_rank(), masks=torch.Generator())
