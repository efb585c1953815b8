"""What is varied to see why pre-training helps: one entry, one command, one row of the table.

A new question is a new entry: any field of ``PretrainRecipe`` or ``FinetuneRecipe`` by its name, or any argument of the
network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.few_labels.arms import REFERENCE, Arm, Pretraining


@dataclass(frozen=True)
class Ablation:
    """What differs from the benchmark's pre-trained arm.

    Attributes:
        pretrain: fields of the pre-training's recipe.
        pretrain_length: its epochs, in parts of the benchmark's.
        finetune: fields of the fine-tuning's recipe.
        network: arguments of the network, in both.
        with_scratch: also train from random weights with this fine-tuning: what it changes there, too, is no merit of
            the pre-training.
    """

    pretrain: Mapping[str, Any] = field(default_factory=dict)
    pretrain_length: float = 1.0
    finetune: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    with_scratch: bool = False

    def pretraining(self, name: str) -> Pretraining:
        """The pre-training: that of the benchmark where nothing about it differs."""
        if not self.pretrain and not self.network and self.pretrain_length == 1:
            return REFERENCE
        return Pretraining(name, self.pretrain, self.pretrain_length, self.network)

    def arms(self, name: str) -> list[Arm]:
        """What is trained with labels."""
        arms = [Arm(name, self.pretraining(name), self.finetune, network=self.network)]
        scratch = Arm(f"{name}_scratch", recipe=self.finetune, network=self.network)
        return [*arms, scratch] if self.with_scratch else arms


ABLATIONS: Mapping[str, Ablation] = {
    "mask_ratio_0.5": Ablation(pretrain={"mask_ratio": 0.5}),
    "mask_ratio_0.6": Ablation(pretrain={"mask_ratio": 0.6}),
    "mask_ratio_0.9": Ablation(pretrain={"mask_ratio": 0.9}),
    # 192 is the default of preset S with the four stages of this data
    "decoder_width_48": Ablation(pretrain={"decoder_width": 48}),
    "decoder_width_192": Ablation(pretrain={"decoder_width": 192}),
    "without_vit": Ablation(network={"vit_n_blocks": 0}, with_scratch=True),
    "pretraining_a_third": Ablation(pretrain_length=1 / 3),
    "pretraining_twice": Ablation(pretrain_length=2),
    "intensity_augmentation_of_input": Ablation(pretrain={"intensity_augmentation": "input"}),
    "intensity_augmentation_of_both": Ablation(pretrain={"intensity_augmentation": "both"}),
    "mask_block_2": Ablation(pretrain={"mask_block": 2}),
    "targets_not_standardised": Ablation(pretrain={"standardise_targets": False}),
    "decoder_warmup_5_epochs": Ablation(finetune={"decoder_warmup_epochs": 5}),
    "encoder_frozen_5_epochs": Ablation(finetune={"encoder_hold_epochs": 5}),
    "layer_decay_0.75": Ablation(finetune={"layer_decay": 0.75}),
    "finetune_lr_1e-3": Ablation(finetune={"initial_lr": 1e-3}, with_scratch=True),
    "finetune_lr_1e-2": Ablation(finetune={"initial_lr": 1e-2}, with_scratch=True),
}
