"""What is varied to see why pre-training helps: one entry, one command, one row of the table.

A new question is a new entry: any field of ``PretrainRecipe`` or ``FinetuneRecipe`` by its name, or any argument of the
network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.few_labels.arms import ARMS, HYSPARK, REFERENCES, SPARK, STOCK, Arm, Pretraining

SCRATCH = "_scratch"  # what the same training from random weights is called by, after the ablation's name


@dataclass(frozen=True)
class Ablation:
    """What differs from the benchmark's pre-trained arm.

    Attributes:
        pretrain, finetune: fields of the recipes.
        pretrain_length, finetune_length: epochs, in parts of the benchmark's.
        network: arguments of the network, in both.
        with_scratch: also train from random weights with this fine-tuning: what it changes there, too, is no merit of
            the pre-training.
        against: the arm or ablation from which nothing else differs.
        family: whose network.
    """

    pretrain: Mapping[str, Any] = field(default_factory=dict)
    pretrain_length: float = 1.0
    finetune: Mapping[str, Any] = field(default_factory=dict)
    finetune_length: float = 1.0
    network: Mapping[str, Any] = field(default_factory=dict)
    with_scratch: bool = False
    against: str = "pretrained"
    family: str = HYSPARK

    def pretraining(self, name: str) -> Pretraining:
        """The pre-training: that of the benchmark where nothing about it differs."""
        if not self.pretrain and not self.network and self.pretrain_length == 1:
            return REFERENCES[self.family]
        return Pretraining(name, self.pretrain, self.pretrain_length, self.network, self.family)

    def arms(self, name: str) -> list[Arm]:
        """What is trained with labels."""
        both = (self.finetune, self.finetune_length, self.network, self.family)
        scratch = [Arm(f"{name}{SCRATCH}", *both)] if self.with_scratch else []
        pretraining = None if self.family == STOCK else self.pretraining(name)
        return [Arm(name, *both, pretraining), *scratch]


BRIEF_PRETRAINING = "brief_pretraining"
HALF_THE_STEPS = "half_the_steps"
# what training from random weights has by default
ALL_LAYERS_ALIKE = "layer_decay_1"
# pre-training shows most where there are few steps to train with labels, and what takes a pre-training of its own is
# compared at a length at which both take twenty minutes of one core
_spark = partial(Ablation, family=SPARK, against="spark_pretrained")
_stock = partial(Ablation, family=STOCK, against="stock")
_halved = partial(Ablation, finetune_length=0.5)
_of_halved = partial(_halved, against=HALF_THE_STEPS)
_brief = partial(_of_halved, pretrain_length=0.12)
_of_brief = partial(_brief, against=BRIEF_PRETRAINING)

ABLATIONS: Mapping[str, Ablation] = {
    HALF_THE_STEPS: _halved(with_scratch=True),
    "twice_the_steps": Ablation(finetune_length=2, with_scratch=True),
    "three_times_the_steps": Ablation(finetune_length=3, with_scratch=True),
    ALL_LAYERS_ALIKE: Ablation(finetune={"layer_decay": 1.0}),
    # with a decay for layers that were not trained before, too
    "layer_decay_0.75": Ablation(finetune={"layer_decay": 0.75}, with_scratch=True),
    "short_pretraining": Ablation(pretrain_length=0.24, finetune={"layer_decay": 1.0}, against=ALL_LAYERS_ALIKE),
    f"{HALF_THE_STEPS}_{ALL_LAYERS_ALIKE}": _of_halved(finetune={"layer_decay": 1.0}),
    f"{HALF_THE_STEPS}_layer_decay_0.25": _of_halved(finetune={"layer_decay": 0.25}),
    f"{HALF_THE_STEPS}_layer_decay_0.75": _of_halved(finetune={"layer_decay": 0.75}, with_scratch=True),
    f"{HALF_THE_STEPS}_layer_decay_0.9": _of_halved(finetune={"layer_decay": 0.9}),
    "decoder_warmup_2_epochs": _of_halved(finetune={"decoder_warmup_epochs": 2}),
    "encoder_frozen_2_epochs": _of_halved(finetune={"encoder_hold_epochs": 2}),
    "finetune_lr_1e-3": _of_halved(finetune={"initial_lr": 1e-3}, with_scratch=True),
    "finetune_lr_1e-2": _of_halved(finetune={"initial_lr": 1e-2}, with_scratch=True),
    BRIEF_PRETRAINING: _brief(),
    "mask_ratio_0.5": _of_brief(pretrain={"mask_ratio": 0.5}),
    "mask_ratio_0.6": _of_brief(pretrain={"mask_ratio": 0.6}),
    "mask_ratio_0.9": _of_brief(pretrain={"mask_ratio": 0.9}),
    # 192 is the default of preset S with the four stages of this data
    "decoder_width_48": _of_brief(pretrain={"decoder_width": 48}),
    "decoder_width_192": _of_brief(pretrain={"decoder_width": 192}),
    "without_vit": _of_brief(network={"vit_n_blocks": 0}, with_scratch=True),
    "intensity_augmentation_of_input": _of_brief(pretrain={"intensity_augmentation": "input"}),
    "intensity_augmentation_of_both": _of_brief(pretrain={"intensity_augmentation": "both"}),
    "mask_block_2": _of_brief(pretrain={"mask_block": 2}),
    "targets_not_standardised": _of_brief(pretrain={"standardise_targets": False}),
    f"spark_{HALF_THE_STEPS}": _spark(finetune_length=0.5, with_scratch=True),
    "spark_twice_the_steps": _spark(finetune_length=2, with_scratch=True),
    "stock_twice_the_steps": _stock(finetune_length=2),
    "stock_four_times_the_steps": _stock(finetune_length=4),
    f"spark_{ALL_LAYERS_ALIKE}": _spark(finetune={"layer_decay": 1.0}),
    "spark_reconstruction_decoder": _spark(pretrain={"decoder": "reconstruction"}),
}
# those that differ in the length of fine-tuning alone, with the arms themselves
LENGTHS = [
    name for name, a in ABLATIONS.items() if not (a.pretrain or a.finetune or a.network) and a.pretrain_length == 1
]
OF_ALL_LENGTHS = {
    arm.name: arm for arm in [*ARMS.values(), *(arm for name in LENGTHS for arm in ABLATIONS[name].arms(name))]
}


def compared_with(arm: str) -> str:
    """The arm or ablation that differs from this one of an ablation in one thing alone.

    Training from random weights has no pre-training to differ in: there it is the next one that was trained so, too.
    """
    if arm in ABLATIONS:
        return ABLATIONS[arm].against
    against = ABLATIONS[arm.removesuffix(SCRATCH)].against
    while against in ABLATIONS and not ABLATIONS[against].with_scratch:
        against = ABLATIONS[against].against
    return against + SCRATCH if against in ABLATIONS else against.replace("pretrained", "scratch")
