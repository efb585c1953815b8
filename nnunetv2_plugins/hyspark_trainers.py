"""The trainers by the names that ``-tr`` takes; nnU-Net finds this module through ``nnUNet_extTrainer``."""

from hyspark_nnunet.training.finetune import HySparKFinetuneTrainer
from hyspark_nnunet.training.pretrain import HySparKPretrainTrainer

__all__ = ["HySparKFinetuneTrainer", "HySparKPretrainTrainer"]
