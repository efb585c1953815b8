"""The recipes of both trainers: every hyperparameter with its default, its unit and where it comes from.

Where values come from: ``recipe_sources``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.recipe.fields import (
    A_DATASET,
    ABOVE_ZERO_BELOW_ONE,
    ABOVE_ZERO_TO_ONE,
    ANYTHING,
    AT_LEAST_ONE,
    AUGMENTED,
    DEPTH,
    NNUNET,
    NO_AUGMENTATION,
    NOT_NEGATIVE,
    OURS,
    PAIRS,
    POSITIVE,
    PRESET_NAME,
    RELEASE,
    SEED,
    ZERO_TO_BELOW_ONE,
    ZERO_TO_ONE,
    checked_type,
    documented,
    is_optional,
    recipe_fields,
    text_of,
    variable_name,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both trainers share.

    Raises:
        ValueError: a value is not allowed; names the field, the value, and what is.
    """

    kind: ClassVar[str]

    preset: str = documented(
        "B", PRESET_NAME, unit="S, B or L", source="HySparK-B of the release", meaning="size of the network"
    )
    num_epochs: int = documented(1000, AT_LEAST_ONE, unit="epochs", source=NNUNET, meaning="length of the training")
    num_iterations_per_epoch: int = documented(
        250, AT_LEAST_ONE, unit="steps", source=NNUNET, meaning="training steps per epoch"
    )
    num_val_iterations_per_epoch: int = documented(
        50, AT_LEAST_ONE, unit="batches", source=NNUNET, meaning="validation batches per epoch"
    )
    save_every: int = documented(
        50, AT_LEAST_ONE, unit="epochs", source=NNUNET, meaning="epochs between two writes of checkpoint_latest.pth"
    )
    batch_size: int | None = documented(
        None,
        AT_LEAST_ONE,
        unit="patches",
        source=NNUNET,
        meaning="patches per batch over all GPUs; none: as the plan says",
    )
    gradient_accumulation: int = documented(
        1,
        AT_LEAST_ONE,
        unit="batches",
        source=OURS,
        meaning="batches whose mean gradient makes one step: a batch that many times as large",
    )
    max_nonfinite_steps: int = documented(
        20,
        NOT_NEGATIVE,
        unit="steps in a row",
        source=OURS,
        meaning="steps with a loss that is not finite are skipped; more than these in a row end the training",
    )
    seed: int | None = documented(
        None,
        SEED,
        unit="number",
        source=OURS,
        meaning="of initial weights, crops, augmentation and masks (crops and augmentation: with nnUNet_n_proc_DA=0); "
        "none: from the clock",
    )
    activation_checkpointing: str = documented(
        "light",
        DEPTH,
        unit="none, light or full",
        source=OURS,
        meaning="activations computed again in the backward pass, in place of being kept; light: the cheap ones, "
        "full: whole blocks, for the least memory",
    )
    initial_lr: float = documented(
        1e-4, POSITIVE, unit="per step", source=RELEASE, meaning="AdamW's learning rate at the end of the warm-up"
    )
    weight_decay: float = documented(
        0.04, NOT_NEGATIVE, unit="per step and learning rate", source=RELEASE, meaning="AdamW's weight decay"
    )
    warmup_fraction: float = documented(
        0.4,
        ZERO_TO_BELOW_ONE,
        unit="of the training",
        source=RELEASE,
        meaning="part of the training in which the learning rate rises",
    )
    oversample_foreground_percent: float = documented(
        0.33,
        ZERO_TO_ONE,
        unit="of a batch",
        source=NNUNET,
        meaning="part of a batch's patches that must hold foreground",
    )
    input_channel_mapping: str | None = documented(
        None,
        PAIRS,
        unit="T1=CT, T2=CT",
        source=OURS,
        meaning="channel of the -pretrained_weights file that each channel starts from, by name or number; "
        "none: by name where all are found, else averaged",
    )
    # per field: "default", "plan ..." or "environment ..."
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for field in recipe_fields(type(self)):
            value = checked_type(getattr(self, field.name), field, field.name)
            object.__setattr__(self, field.name, value)  # a whole number given for a float
            if isinstance(value, float) and not math.isfinite(value):
                raise self._refusal(field, "be finite")
            if value is not None and not field.metadata["allowed"].test(value):
                raise self._refusal(field, field.metadata["allowed"].words)

    def _refusal(self, field: Field[Any], words: str) -> ValueError:
        source = self.source_of(field.name)
        hint = "" if source in ("default", "argument") else f" (set by the {source})"
        words += " or none" if is_optional(field) else ""
        value = getattr(self, field.name)
        return ValueError(f"{field.name} is {value!r}, but it must {words}: {field.metadata['help']}{hint}")

    def source_of(self, name: str) -> str:
        """Where a field's value comes from."""
        is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
        return self.sources.get(name, "default" if is_default else "argument")

    def as_dict(self) -> dict[str, Any]:
        """The values by name, as JSON and checkpoints take them."""
        return {field.name: getattr(self, field.name) for field in recipe_fields(type(self))}

    def describe(self) -> str:
        """A table of fields, values and where they come from."""
        rows = [(name, text_of(value), self.source_of(name)) for name, value in self.as_dict().items()]
        rows = [("field", "value", "from"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Hyperparameters of HySparKPretrainTrainer."""

    kind: ClassVar[str] = "pretrain"

    final_weight_decay: float = documented(
        0.2,
        NOT_NEGATIVE,
        unit="per step and learning rate",
        source=RELEASE,
        meaning="weight decay at the end of the training; half a cosine leads there",
    )
    gradient_clip: float = documented(
        5.0, POSITIVE, unit="L2 norm", source=RELEASE, meaning="gradients of a larger norm are scaled down to it"
    )
    mask_ratio: float = documented(
        0.75,
        ABOVE_ZERO_BELOW_ONE,
        unit="of the mask units",
        source=RELEASE,
        meaning="part of the patch that is hidden; the encoder needs a visible unit, the loss a hidden one",
    )
    decoder_width: int | None = documented(
        None,
        AT_LEAST_ONE,
        unit="channels",
        source="HySparK-B of the release",
        meaning="of the decoder's coarsest level, halved per level; "
        "none: 48 * 2^(stages - 1) for presets B and L, 24 * 2^(stages - 1) for S",
    )
    mask_block: int = documented(
        1,
        AT_LEAST_ONE,
        unit="mask units per axis",
        source=RELEASE,
        meaning="units that are hidden together: a coarser mask; the number of visible units stays exact, so one block "
        "of a patch may be visible in part",
    )
    standardise_targets: bool = documented(
        True,
        ANYTHING,
        unit="yes or no",
        source=RELEASE,
        meaning="the loss takes every unit's own mean and spread out of what is to be rebuilt; "
        "no: intensities as preprocessed",
    )
    intensity_augmentation: str = documented(
        NO_AUGMENTATION,
        AUGMENTED,
        unit="none, input or both",
        source=RELEASE,
        meaning="also nnU-Net's noise, blur, brightness, contrast, low resolution and gamma; "
        "input: of what the network sees, it rebuilds the clean image; both: of what it rebuilds, too",
    )
    num_pictures: int = documented(
        4, NOT_NEGATIVE, unit="cases", source=OURS, meaning="validation cases whose reconstruction is pictured"
    )
    picture_every: int = documented(50, AT_LEAST_ONE, unit="epochs", source=OURS, meaning="epochs between two pictures")
    probe_every: int = documented(
        10,
        NOT_NEGATIVE,
        unit="epochs",
        source=OURS,
        meaning="epochs between two scores of a linear head on the frozen encoder, where there are labels; 0: off",
    )
    probe_cases: int = documented(
        20,
        AT_LEAST_ONE,
        unit="cases",
        source=OURS,
        meaning="labelled cases that the linear head is fitted to; as many others score it",
    )
    probe_dataset: str | None = documented(
        None,
        A_DATASET,
        unit="number or name",
        source=OURS,
        meaning="labelled data set, preprocessed alike, that the linear head is fitted to and scored on; "
        "none: the one that is trained on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # which parameters decay is read off a weight decay that is not zero (schedules.ProgressScheduler)
        if self.weight_decay == 0 and self.final_weight_decay != 0:
            raise ValueError(
                f"weight_decay is 0 and final_weight_decay {self.final_weight_decay}, but a weight decay cannot rise "
                f"from 0: set both to 0, or start above 0, for example at 1e-6"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Hyperparameters of HySparKFinetuneTrainer."""

    kind: ClassVar[str] = "finetune"

    warmup_fraction: float = documented(
        0.05,
        ZERO_TO_BELOW_ONE,
        unit="of the training",
        source=OURS,
        meaning="part of the training in which the learning rate rises",
    )
    polynomial_exponent: float = documented(
        0.9, POSITIVE, unit="exponent", source=NNUNET, meaning="of the learning rate's decay after the warm-up"
    )
    decoder_warmup_epochs: int = documented(
        0,
        NOT_NEGATIVE,
        unit="epochs",
        source=OURS,
        meaning="epochs before all others in which the decoder alone trains, at a rising rate; "
        "the schedule of the whole network follows in the rest",
    )
    encoder_hold_epochs: int = documented(
        0,
        NOT_NEGATIVE,
        unit="epochs",
        source=OURS,
        meaning="first epochs in which the encoder trains at encoder_hold_factor of its rate",
    )
    encoder_hold_factor: float = documented(
        0.0,
        ZERO_TO_ONE,
        unit="of the learning rate",
        source=OURS,
        meaning="the encoder's part of the learning rate in its first encoder_hold_epochs; 0 freezes it",
    )
    layer_decay: float | None = documented(
        None,
        ABOVE_ZERO_TO_ONE,
        unit="per layer",
        source=OURS,
        meaning="factor on the learning rate from each layer of the encoder (stem, stage, transformer block) to the "
        "one before it; 1: all alike; none: with -pretrained_weights such that the stem has 1/128 of the rate, else 1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decoder_warmup_epochs", "encoder_hold_epochs"):
            if getattr(self, name) >= self.num_epochs:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and num_epochs {self.num_epochs}, but the whole network must "
                    f"train for at least 1 epoch"
                )


RECIPES: Mapping[str, type[Recipe]] = {recipe.kind: recipe for recipe in (PretrainRecipe, FinetuneRecipe)}


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes values and sources as JSON; a reader sees the old file or the new one, whole."""
    sources = {name: recipe.source_of(name) for name in recipe.as_dict()}
    content = json.dumps({"trainer": recipe.kind, "recipe": recipe.as_dict(), "sources": sources}, indent=4)
    with replacing(path) as beside:
        beside.write_text(content + "\n", encoding="utf-8")


def recipe_table_markdown(recipe_class: type[Recipe]) -> str:
    """The table of a recipe's fields in docs/recipes.md."""
    rows = [("field", "default", "unit", "meaning", "source", "environment variable"), ("---",) * 6]
    for field in recipe_fields(recipe_class):
        about = field.metadata
        default, variable = f"`{text_of(field.default)}`", f"`{variable_name(field.name)}`"
        # bare asterisks and bars are markdown's
        meaning = about["help"].replace("|", "\\|").replace("*", "\\*")
        rows.append((f"`{field.name}`", default, about["unit"], meaning, about["source"], variable))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
