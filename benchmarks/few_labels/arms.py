"""What is compared: an arm is a trainer with a recipe; a run is an arm on some labelled cases with a seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.few_labels.prepare import LIKE, STOCK_PLANS, hyspark_plans
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import Splits
from benchmarks.few_labels.trainers.few_labels_stock import PREFIX, FewLabelsStockTrainer
from hyspark_nnunet.recipe.fields import variable_name
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.spark import SparKFinetuneTrainer, SparKPretrainTrainer

# HySparK's network, or that of nnU-Net's plan; the latter is also trained by nnU-Net itself
HYSPARK, SPARK, STOCK = "HySparK", "SparK", "stock nnU-Net"
PRETRAINERS = {HYSPARK: HySparKPretrainTrainer.__name__, SPARK: SparKPretrainTrainer.__name__}
TRAINERS = {
    HYSPARK: HySparKFinetuneTrainer.__name__,
    SPARK: SparKFinetuneTrainer.__name__,
    STOCK: FewLabelsStockTrainer.__name__,
}
PRETRAIN_SEED = 0


def plans_of(family: str, settings: Settings) -> str:
    """The plans of a family's network for the labelled dataset."""
    return hyspark_plans(settings) if family == HYSPARK else STOCK_PLANS


def with_network(plans: str, network: Mapping[str, Any]) -> str:
    """The name of plans whose network has these arguments instead."""
    return plans + "".join(f"_{name}_{value}" for name, value in network.items())


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

    def _variables(self, kind: str, fields: Mapping[str, Any]) -> dict[str, str]:
        return {variable_name(name, kind): str(value) for name, value in {**fields, **self.recipe}.items()}


class Pretraining(Training):
    """A pre-training."""

    @property
    def run(self) -> str:
        return f"pretrain_{self.name}"

    @property
    def trainer(self) -> str:
        return PRETRAINERS[self.family]

    def plans(self, settings: Settings) -> str:
        return with_network(plans_of(self.family, settings) + LIKE, self.network)

    def epochs(self, settings: Settings) -> int:
        return max(1, round(self.length * settings.pretrain_epochs))

    def variables(self, settings: Settings) -> dict[str, str]:
        """Environment variables of the training."""
        width = {"decoder_width": settings.pretrain_decoder_width or None} if self.family == HYSPARK else {}
        fields = {
            "num_epochs": self.epochs(settings),
            "num_iterations_per_epoch": settings.pretrain_iterations,
            "num_val_iterations_per_epoch": settings.pretrain_val_iterations,
            "batch_size": settings.pretrain_batch,
            "initial_lr": settings.pretrain_lr,
            "warmup_fraction": settings.pretrain_warmup,
            "save_every": settings.save_every,
            "picture_every": settings.pretrain_epochs,
            "seed": PRETRAIN_SEED,
        }
        return self._variables("pretrain", fields | width)


REFERENCE = Pretraining("reference")
REFERENCES = {HYSPARK: REFERENCE, SPARK: Pretraining("spark", family=SPARK)}


@dataclass(frozen=True)
class Arm(Training):
    """A way to train with labels.

    Attributes:
        pretraining: whose weights it starts from; None: random ones.
    """

    pretraining: Pretraining | None = None

    @property
    def trainer(self) -> str:
        return TRAINERS[self.family]

    def plans(self, settings: Settings) -> str:
        return with_network(plans_of(self.family, settings), self.network)

    def variables(self, settings: Settings, seed: int) -> dict[str, str]:
        """Environment variables of a training."""
        lengths = {
            "num_epochs": max(1, round(self.length * settings.finetune_epochs)),
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
        Arm("spark_pretrained", family=SPARK, pretraining=REFERENCES[SPARK]),
        Arm("spark_scratch", family=SPARK),
        Arm("stock", family=STOCK),
    )
}


@dataclass(frozen=True)
class Run:
    """One training with labels.

    Attributes:
        arm: how.
        labels: number of labelled cases.
        seed: of the training and its choice of cases.
        fold: of nnU-Net, which says the cases.
    """

    arm: Arm
    labels: int
    seed: int
    fold: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}_labels{self.labels}_seed{self.seed}"


def runs_of(arms: Iterable[Arm], labels: Sequence[int], seeds: Sequence[int], splits: Splits) -> list[Run]:
    """All runs, in the order given: seed by seed, in it by number of labels, arms side by side.

    So whatever is done can be compared at any time.
    """
    arms = list(arms)
    return [Run(arm, count, seed, splits.fold(count, seed)) for seed in seeds for count in labels for arm in arms]
