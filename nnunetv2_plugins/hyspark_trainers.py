"""The trainers by the names that ``-tr`` takes; nnU-Net finds this module through ``nnUNet_extTrainer``."""

from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.spark import SparKFinetuneTrainer, SparKPretrainTrainer

__all__ = ["HySparKFinetuneTrainer", "HySparKPretrainTrainer", "SparKFinetuneTrainer", "SparKPretrainTrainer"]
