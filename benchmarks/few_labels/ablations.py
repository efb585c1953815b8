"""What is varied to see why pre-training helps: one entry, one arm of ``run --arms``, one row of the table.

A new question is a new entry: the arm it is compared with and the one thing that differs, which is a length, a field of
``PretrainRecipe`` or ``FinetuneRecipe``, or an argument of the network.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.few_labels.arms import ARMS, Arm

# pre-training shows most where there are few steps to train with labels, and what takes a pre-training of its own is
# compared at a length at which both take twenty minutes of one core
_HALF, _BRIEF, _NO_DECAY = "half_the_steps", "brief_pretraining", {"layer_decay": 1.0}
_NAMES_BY_LENGTH = {
    "pretrained": "{}",
    "scratch": "{}_scratch",
    "spark_pretrained": "spark_{}",
    "spark_scratch": "spark_{}_scratch",
    "stock": "stock_{}",
}
# by name: the arm that each is compared with, and the difference: "length" and "pretrain_length" in parts of those of
# the settings, fields of the recipes of "pretrain" and "finetune", arguments of the "network"
_BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    pattern.format(words): (arm, {"length": length})
    for words, length in ((_HALF, 0.5), ("twice_the_steps", 2), ("three_times_the_steps", 3))
    for arm, pattern in _NAMES_BY_LENGTH.items()
}
_FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    # what training from random weights has by default
    "layer_decay_1": ("pretrained", {"finetune": _NO_DECAY}),
    "short_pretraining": ("layer_decay_1", {"pretrain_length": 0.24}),
    "half_the_steps_layer_decay_1": (_HALF, {"finetune": _NO_DECAY}),
    "half_the_steps_layer_decay_0.25": (_HALF, {"finetune": {"layer_decay": 0.25}}),
    "half_the_steps_layer_decay_0.75": (_HALF, {"finetune": {"layer_decay": 0.75}}),
    "half_the_steps_layer_decay_0.75_scratch": ("half_the_steps_scratch", {"finetune": {"layer_decay": 0.75}}),
    "half_the_steps_layer_decay_0.9": (_HALF, {"finetune": {"layer_decay": 0.9}}),
    "decoder_warmup_2_epochs": (_HALF, {"finetune": {"decoder_warmup_epochs": 2}}),
    "encoder_frozen_2_epochs": (_HALF, {"finetune": {"encoder_hold_epochs": 2}}),
    "finetune_lr_1e-3": (_HALF, {"finetune": {"initial_lr": 1e-3}}),
    "finetune_lr_1e-2": (_HALF, {"finetune": {"initial_lr": 1e-2}}),
    _BRIEF: (_HALF, {"pretrain_length": 0.12}),
    "mask_ratio_0.5": (_BRIEF, {"pretrain": {"mask_ratio": 0.5}}),
    "mask_ratio_0.6": (_BRIEF, {"pretrain": {"mask_ratio": 0.6}}),
    "mask_ratio_0.9": (_BRIEF, {"pretrain": {"mask_ratio": 0.9}}),
    # 192 is the default of preset S with the four stages of the hippocampus
    "decoder_width_192": (_BRIEF, {"pretrain": {"decoder_width": 192}}),
    "without_vit": (_BRIEF, {"network": {"vit_n_blocks": 0}}),
    "without_vit_scratch": ("half_the_steps_scratch", {"network": {"vit_n_blocks": 0}}),
    "intensity_augmentation_of_input": (_BRIEF, {"pretrain": {"intensity_augmentation": "input"}}),
    "mask_block_2": (_BRIEF, {"pretrain": {"mask_block": 2}}),
    "targets_not_standardised": (_BRIEF, {"pretrain": {"standardise_targets": False}}),
    "spark_layer_decay_0.5": ("spark_pretrained", {"finetune": {"layer_decay": 0.5}}),
    "spark_layer_decay_1": ("spark_pretrained", {"finetune": _NO_DECAY}),
    "spark_twice_the_steps_layer_decay_1": ("spark_twice_the_steps", {"finetune": _NO_DECAY}),
    # stock nnU-Net's optimizer: what differs from stock nnU-Net is where it starts
    "spark_sgd": ("spark_layer_decay_1", {"finetune": {"optimizer": "sgd", "initial_lr": 1e-2}}),
    "spark_layer_decay_1_lr_1e-3": ("spark_layer_decay_1", {"finetune": {"initial_lr": 1e-3}}),
    "spark_twice_the_pretraining": ("spark_layer_decay_1", {"pretrain_length": 2}),
    "spark_twice_the_pretraining_and_steps": ("spark_twice_the_pretraining", {"length": 2}),
}


def _differing(arm: Arm, name: str, difference: Mapping[str, Any]) -> Arm:
    """The arm with that difference."""
    before, network = arm.pretraining, difference.get("network", arm.network)
    if before and not difference.keys() <= {"finetune", "length"}:
        recipe = {**before.recipe, **difference.get("pretrain", {})}
        length = difference.get("pretrain_length", before.length)
        before = replace(before, name=name, recipe=recipe, length=length, network=network)
    recipe, length = {**arm.recipe, **difference.get("finetune", {})}, difference.get("length", arm.length)
    return replace(arm, name=name, recipe=recipe, length=length, network=network, pretraining=before)


COMPARED_WITH = {name: against for name, (against, _) in (_BY_LENGTH | _FURTHER).items()}
ABLATIONS: dict[str, Arm] = {}
for _name, (_against, _difference) in (_BY_LENGTH | _FURTHER).items():
    ABLATIONS[_name] = _differing((ARMS | ABLATIONS)[_against], _name, _difference)
# the arms and those that differ in the length of fine-tuning alone
OF_ALL_LENGTHS = ARMS | {name: ABLATIONS[name] for name in _BY_LENGTH}
