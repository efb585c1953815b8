"""The trainers by the names that ``-tr`` takes; nnU-Net finds this module through ``nnUNet_extTrainer``."""

from hyspark_nnunet.training.finetune import HySparKFinetuneTrainer
from hyspark_nnunet.training.missing_plans import explain_missing_plans
from hyspark_nnunet.training.pretrain import HySparKPretrainTrainer

explain_missing_plans()

__all__ = ["HySparKFinetuneTrainer", "HySparKPretrainTrainer"]
