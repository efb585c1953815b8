"""What is compared: an arm is a trainer with a recipe; a run is an arm on some labelled cases with a seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.few_labels.prepare import PROBED_ID, STOCK_PLANS, hyspark_plans, pretraining_plans
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import fold_number
from benchmarks.few_labels.trainers.few_labels_stock import PREFIX, FewLabelsStockTrainer
from hyspark_nnunet.recipe.fields import variable_name
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer

FINETUNER, PRETRAINER = HySparKFinetuneTrainer.__name__, HySparKPretrainTrainer.__name__
STOCK_TRAINER = FewLabelsStockTrainer.__name__
PRETRAIN_SEED = 0


def with_network(plans: str, network: Mapping[str, Any]) -> str:
    """The name of plans whose network has these arguments instead."""
    return plans + "".join(f"_{name}_{value}" for name, value in network.items())


@dataclass(frozen=True)
class Pretraining:
    """A pre-training.

    Attributes:
        name: of its folder and record.
        recipe: fields of ``PretrainRecipe`` that differ from the settings.
        length: its epochs, in parts of those of the settings.
        network: arguments of the network that differ from the plan's.
    """

    name: str = "reference"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        return f"pretrain_{self.name}"

    def plans(self, settings: Settings) -> str:
        return with_network(pretraining_plans(settings), self.network)

    def epochs(self, settings: Settings) -> int:
        return max(1, round(self.length * settings.pretrain_epochs))

    def variables(self, settings: Settings) -> dict[str, str]:
        """Environment variables of the training."""
        fields = {
            "num_epochs": self.epochs(settings),
            "num_iterations_per_epoch": settings.pretrain_iterations,
            "num_val_iterations_per_epoch": settings.pretrain_val_iterations,
            "batch_size": settings.pretrain_batch,
            "initial_lr": settings.pretrain_lr,
            "warmup_fraction": settings.pretrain_warmup,
            "decoder_width": settings.pretrain_decoder_width or None,
            "save_every": settings.save_every,
            "picture_every": settings.pretrain_epochs,
            "probe_dataset": PROBED_ID,
            "probe_every": settings.save_every,
            "seed": PRETRAIN_SEED,
            **self.recipe,
        }
        return {variable_name(name, "pretrain"): str(value) for name, value in fields.items()}


REFERENCE = Pretraining()


@dataclass(frozen=True)
class Arm:
    """A way to train with labels.

    Attributes:
        name: in tables, and of its folder of results.
        pretraining: whose weights it starts from; None: random ones.
        recipe: fields of ``FinetuneRecipe`` that differ from the settings.
        length: its epochs, in parts of those of the settings.
        stock: nnU-Net's own network, trainer and optimiser.
        network: arguments of the network that differ from the plan's.
    """

    name: str
    pretraining: Pretraining | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    stock: bool = False
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> str:
        return STOCK_TRAINER if self.stock else FINETUNER

    def plans(self, settings: Settings) -> str:
        return STOCK_PLANS if self.stock else with_network(hyspark_plans(settings), self.network)

    def epochs(self, settings: Settings) -> int:
        return max(1, round(self.length * settings.finetune_epochs))

    def variables(self, settings: Settings, seed: int) -> dict[str, str]:
        """Environment variables of a training."""
        lengths = {
            "num_epochs": self.epochs(settings),
            "num_iterations_per_epoch": settings.finetune_iterations,
            "num_val_iterations_per_epoch": settings.finetune_val_iterations,
            "save_every": settings.save_every,
            "seed": seed,
        }
        if self.stock:
            return {f"{PREFIX}{name.upper()}": str(value) for name, value in lengths.items()}
        fields = {**lengths, "batch_size": settings.finetune_batch, "initial_lr": settings.finetune_lr, **self.recipe}
        return {variable_name(name, "finetune"): str(value) for name, value in fields.items()}


ARMS = {arm.name: arm for arm in (Arm("pretrained", REFERENCE), Arm("scratch"), Arm("stock", stock=True))}


@dataclass(frozen=True)
class Run:
    """One training with labels."""

    arm: Arm
    labels: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}_labels{self.labels}_seed{self.seed}"

    @property
    def fold(self) -> int:
        return fold_number(self.labels, self.seed)


def balanced(arms: Iterable[Arm], labels: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    """All runs, seed by seed, fewest labels first, arms side by side: whatever is done can be compared at any time."""
    arms = list(arms)
    return [Run(arm, count, seed) for seed in seeds for count in sorted(labels) for arm in arms]
