"""The trainers by the names that ``-tr`` takes; nnU-Net finds this module through ``nnUNet_extTrainer``."""

from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.missing_plans import explain_missing_plans

explain_missing_plans()

__all__ = ["HySparKFinetuneTrainer", "HySparKPretrainTrainer"]
