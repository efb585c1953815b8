"""What is compared: an arm is a trainer with a recipe; a run is an arm on some labelled cases with a seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from benchmarks.few_labels.prepare import LABELLED, LIKE, STOCK_PLANS, UNLABELLED
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.trainers.few_labels_stock import PREFIX, FewLabelsStockTrainer
from hyspark_nnunet.planning.planner import PLANS_NAME
from hyspark_nnunet.recipe.fields import variable_name
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.spark import SparKFinetuneTrainer, SparKPretrainTrainer

# HySparK's network, or that of nnU-Net's plan; the latter is also trained by nnU-Net itself
HYSPARK, SPARK, STOCK = "HySparK", "SparK", "stock nnU-Net"


@dataclass(frozen=True)
class Training:
    """What differs from the settings, which are the same for all.

    Attributes:
        name: in tables, and of its folder of results.
        recipe: fields of the recipe.
        length: its epochs, in parts of those of the settings.
        network: arguments of the network that differ from the plan's.
        family: whose network and trainer; ``STOCK``: nnU-Net's, with its optimiser.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    network: Mapping[str, Any] = field(default_factory=dict)
    family: str = HYSPARK

    dataset: ClassVar[str]
    trainers: ClassVar[dict[str, type]]

    @property
    def trainer(self) -> str:
        return self.trainers[self.family].__name__

    def prepared_plans(self, settings: Settings) -> str:
        """Name of the plans of the family's network."""
        return PLANS_NAME[settings.preset] if self.family == HYSPARK else STOCK_PLANS

    def plans(self, settings: Settings) -> str:
        """Name of the plans with the arguments of the network that differ."""
        return self.prepared_plans(settings) + "".join(f"_{name}_{value}" for name, value in self.network.items())

    def epochs(self, of_settings: int) -> int:
        return max(1, round(self.length * of_settings))

    def _variables(self, kind: str, fields: Mapping[str, Any]) -> dict[str, str]:
        return {variable_name(name, kind): str(value) for name, value in {**fields, **self.recipe}.items()}


class Pretraining(Training):
    """A pre-training."""

    dataset = UNLABELLED
    trainers = {HYSPARK: HySparKPretrainTrainer, SPARK: SparKPretrainTrainer}

    @property
    def run(self) -> str:
        return f"pretrain_{self.name}"

    def prepared_plans(self, settings: Settings) -> str:
        return super().prepared_plans(settings) + LIKE

    def variables(self, settings: Settings) -> dict[str, str]:
        """Environment variables of the training."""
        width = {"decoder_width": settings.pretrain_decoder_width or None} if self.family == HYSPARK else {}
        fields = {
            "num_epochs": self.epochs(settings.pretrain_epochs),
            "num_iterations_per_epoch": settings.pretrain_iterations,
            "num_val_iterations_per_epoch": settings.pretrain_val_iterations,
            "batch_size": settings.pretrain_batch,
            "initial_lr": settings.pretrain_lr,
            "warmup_fraction": settings.pretrain_warmup,
            "save_every": settings.save_every,
            "picture_every": settings.pretrain_epochs,
            "seed": 0,
        }
        return self._variables("pretrain", fields | width)


REFERENCE, SPARK_REFERENCE = Pretraining("reference"), Pretraining("spark", family=SPARK)


@dataclass(frozen=True)
class Arm(Training):
    """A way to train with labels.

    Attributes:
        pretraining: whose weights it starts from; None: random ones.
    """

    pretraining: Pretraining | None = None

    dataset = LABELLED
    trainers = {HYSPARK: HySparKFinetuneTrainer, SPARK: SparKFinetuneTrainer, STOCK: FewLabelsStockTrainer}

    def variables(self, settings: Settings, seed: int) -> dict[str, str]:
        """Environment variables of a training."""
        lengths = {
            "num_epochs": self.epochs(settings.finetune_epochs),
            "num_iterations_per_epoch": settings.finetune_iterations,
            "num_val_iterations_per_epoch": settings.finetune_val_iterations,
            "save_every": settings.save_every,
            "seed": seed,
        }
        if self.family == STOCK:
            return {f"{PREFIX}{name.upper()}": str(value) for name, value in lengths.items()}
        ours = {"batch_size": settings.finetune_batch, "initial_lr": settings.finetune_lr}
        return self._variables("finetune", lengths | ours)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("pretrained", pretraining=REFERENCE),
        Arm("scratch"),
        Arm("spark_pretrained", family=SPARK, pretraining=SPARK_REFERENCE),
        Arm("spark_scratch", family=SPARK),
        Arm("stock", family=STOCK),
    )
}


@dataclass(frozen=True)
class Run:
    """One training with labels: an arm, number of labelled cases, seed, and nnU-Net's fold, which says the cases."""

    arm: Arm
    labels: int
    seed: int
    fold: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}_labels{self.labels}_seed{self.seed}"
