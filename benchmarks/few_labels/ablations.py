"""What is varied to see why pre-training helps: one entry, one arm of ``run --arms``, one row of the table.

A new question is a new entry: the arm it is compared with and the one thing that differs, which is a length, a field of
``PretrainRecipe`` or ``FinetuneRecipe``, or an argument of the network.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.few_labels.arms import ARMS, Arm, Pretraining

HALF_THE_STEPS = "half_the_steps"
_LENGTHS = {HALF_THE_STEPS: 0.5, "twice_the_steps": 2, "three_times_the_steps": 3, "four_times_the_steps": 4}
_NAMES_BY_LENGTH = {
    "pretrained": "{}",
    "scratch": "{}_scratch",
    "spark_pretrained": "spark_{}",
    "spark_scratch": "spark_{}_scratch",
    "stock": "stock_{}",
}

# pre-training shows most where there are few steps to train with labels, and what takes a pre-training of its own is
# compared at a length at which both take twenty minutes of one core
_BRIEF_PRETRAINING, _NO_DECAY = "brief_pretraining", {"layer_decay": 1.0}
# by name: the arm that each is compared with, and the difference (arguments of _differing)
_BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    pattern.format(words): (arm, {"length": length})
    for words, length in _LENGTHS.items()
    for arm, pattern in _NAMES_BY_LENGTH.items()
}
_FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    # what training from random weights has by default
    "layer_decay_1": ("pretrained", {"finetune": _NO_DECAY}),
    "layer_decay_0.75": ("pretrained", {"finetune": {"layer_decay": 0.75}}),
    "layer_decay_0.75_scratch": ("scratch", {"finetune": {"layer_decay": 0.75}}),
    "short_pretraining": ("layer_decay_1", {"pretrain_length": 0.24}),
    "half_the_steps_layer_decay_1": (HALF_THE_STEPS, {"finetune": _NO_DECAY}),
    "half_the_steps_layer_decay_0.25": (HALF_THE_STEPS, {"finetune": {"layer_decay": 0.25}}),
    "half_the_steps_layer_decay_0.75": (HALF_THE_STEPS, {"finetune": {"layer_decay": 0.75}}),
    "half_the_steps_layer_decay_0.75_scratch": ("half_the_steps_scratch", {"finetune": {"layer_decay": 0.75}}),
    "half_the_steps_layer_decay_0.9": (HALF_THE_STEPS, {"finetune": {"layer_decay": 0.9}}),
    "decoder_warmup_2_epochs": (HALF_THE_STEPS, {"finetune": {"decoder_warmup_epochs": 2}}),
    "encoder_frozen_2_epochs": (HALF_THE_STEPS, {"finetune": {"encoder_hold_epochs": 2}}),
    "finetune_lr_1e-3": (HALF_THE_STEPS, {"finetune": {"initial_lr": 1e-3}}),
    "finetune_lr_1e-3_scratch": ("half_the_steps_scratch", {"finetune": {"initial_lr": 1e-3}}),
    "finetune_lr_1e-2": (HALF_THE_STEPS, {"finetune": {"initial_lr": 1e-2}}),
    "finetune_lr_1e-2_scratch": ("half_the_steps_scratch", {"finetune": {"initial_lr": 1e-2}}),
    _BRIEF_PRETRAINING: (HALF_THE_STEPS, {"pretrain_length": 0.12}),
    "mask_ratio_0.5": (_BRIEF_PRETRAINING, {"pretrain": {"mask_ratio": 0.5}}),
    "mask_ratio_0.6": (_BRIEF_PRETRAINING, {"pretrain": {"mask_ratio": 0.6}}),
    "mask_ratio_0.9": (_BRIEF_PRETRAINING, {"pretrain": {"mask_ratio": 0.9}}),
    # 192 is the default of preset S with the four stages of the hippocampus
    "decoder_width_48": (_BRIEF_PRETRAINING, {"pretrain": {"decoder_width": 48}}),
    "decoder_width_192": (_BRIEF_PRETRAINING, {"pretrain": {"decoder_width": 192}}),
    "without_vit": (_BRIEF_PRETRAINING, {"network": {"vit_n_blocks": 0}}),
    "without_vit_scratch": ("half_the_steps_scratch", {"network": {"vit_n_blocks": 0}}),
    "intensity_augmentation_of_input": (_BRIEF_PRETRAINING, {"pretrain": {"intensity_augmentation": "input"}}),
    "intensity_augmentation_of_both": (_BRIEF_PRETRAINING, {"pretrain": {"intensity_augmentation": "both"}}),
    "mask_block_2": (_BRIEF_PRETRAINING, {"pretrain": {"mask_block": 2}}),
    "targets_not_standardised": (_BRIEF_PRETRAINING, {"pretrain": {"standardise_targets": False}}),
    "spark_layer_decay_0.5": ("spark_pretrained", {"finetune": {"layer_decay": 0.5}}),
    "spark_layer_decay_1": ("spark_pretrained", {"finetune": _NO_DECAY}),
    "spark_twice_the_steps_layer_decay_1": ("spark_twice_the_steps", {"finetune": _NO_DECAY}),
    # stock nnU-Net's optimizer: what differs from stock nnU-Net is where it starts
    "spark_sgd": ("spark_layer_decay_1", {"finetune": {"optimizer": "sgd", "initial_lr": 1e-2}}),
    "spark_layer_decay_1_lr_1e-3": ("spark_layer_decay_1", {"finetune": {"initial_lr": 1e-3}}),
    "spark_twice_the_pretraining": ("spark_layer_decay_1", {"pretrain_length": 2}),
    "spark_reconstruction_decoder": ("spark_pretrained", {"pretrain": {"decoder": "reconstruction"}}),
}


def _differing(
    arm: Arm,
    name: str,
    finetune: Mapping[str, Any] | None = None,
    pretrain: Mapping[str, Any] | None = None,
    pretrain_length: float | None = None,
    network: Mapping[str, Any] | None = None,
    length: float | None = None,
) -> Arm:
    """The arm with that difference."""
    before, network = arm.pretraining, network or arm.network
    if before and (pretrain or pretrain_length or network != arm.network):
        recipe, part = {**before.recipe, **(pretrain or {})}, pretrain_length or before.length
        before = Pretraining(name, recipe, part, network, before.family)
    recipe = {**arm.recipe, **(finetune or {})}
    return replace(arm, name=name, recipe=recipe, length=length or arm.length, network=network, pretraining=before)


COMPARED_WITH: dict[str, str] = {}
ABLATIONS: dict[str, Arm] = {}
for _name, (_against, _difference) in (_BY_LENGTH | _FURTHER).items():
    COMPARED_WITH[_name] = _against
    ABLATIONS[_name] = _differing((ARMS | ABLATIONS)[_against], _name, **_difference)
# the arms and those that differ in the length of fine-tuning alone
OF_ALL_LENGTHS = ARMS | {name: ABLATIONS[name] for name in _BY_LENGTH}
