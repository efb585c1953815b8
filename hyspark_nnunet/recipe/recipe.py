"""The recipes of both trainers: every hyperparameter with its default, its unit and its source.

``sources`` reads the values from plans and environment variables.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar

from hyspark_nnunet.architectures.spark import PLAN_DECODER
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.recipe.fields import (
    A_DATASET,
    ABOVE_ZERO_BELOW_ONE,
    ABOVE_ZERO_TO_ONE,
    ADAMW,
    ANYTHING,
    AT_LEAST_ONE,
    AUGMENTED,
    DECODER,
    DEPTH,
    NNUNET,
    NO_AUGMENTATION,
    NOT_NEGATIVE,
    OPTIMIZER,
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
    """Hyperparameters of both trainers.

    Raises:
        ValueError: a value is not allowed; the message has the field, the value and what is allowed.
    """

    kind: ClassVar[str]

    preset: str = documented(
        "B", PRESET_NAME, unit="S, B or L", source="HySparK-B of the release", meaning="size of HySparK's network"
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
        meaning="batches per optimizer step, which uses their mean gradient, like one batch of all their patches",
    )
    max_nonfinite_steps: int = documented(
        20,
        NOT_NEGATIVE,
        unit="consecutive steps",
        source=OURS,
        meaning="steps whose loss or gradient is not finite are skipped; more consecutive ones than this end the "
        "training",
    )
    seed: int | None = documented(
        None,
        SEED,
        unit="number",
        source=OURS,
        meaning="seed of initial weights, masks, crops and augmentation (the last two with nnUNet_n_proc_DA=0); "
        "none: a different one in every training",
    )
    activation_checkpointing: str = documented(
        "light",
        DEPTH,
        unit="none, light or full",
        source=OURS,
        meaning="activations that are recomputed in the backward pass instead of stored; light: the cheap ones; "
        "full: all of a block, for the least memory",
    )
    initial_lr: float = documented(
        1e-4, POSITIVE, unit="the optimizer's lr", source=RELEASE, meaning="learning rate at the end of the warm-up"
    )
    weight_decay: float = documented(
        0.04, NOT_NEGATIVE, unit="the optimizer's weight_decay", source=RELEASE, meaning="weight decay"
    )
    warmup_fraction: float = documented(
        0.4,
        ZERO_TO_BELOW_ONE,
        unit="of the training",
        source=RELEASE,
        meaning="first part of the training, in which the learning rate rises",
    )
    oversample_foreground_percent: float = documented(
        0.33,
        ZERO_TO_ONE,
        unit="of a batch",
        source=NNUNET,
        meaning="fraction of the patches that are centred on foreground",
    )
    input_channel_mapping: str | None = documented(
        None,
        PAIRS,
        unit="T1=CT, T2=CT",
        source=OURS,
        meaning="for each channel, the channel of the -pretrained_weights file that it starts from, by name or number; "
        "none: by name if all names are found, by position if there are equally many, otherwise averaged",
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
        """The source of a field's value."""
        is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
        return self.sources.get(name, "default" if is_default else "argument")

    def as_dict(self) -> dict[str, Any]:
        """The values by name, for JSON and checkpoints."""
        return {field.name: getattr(self, field.name) for field in recipe_fields(type(self))}

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuses fields that were set although the trainer does not use them.

        Args:
            reasons: why it does not use them, by field.

        Raises:
            ValueError: one of them was set; names it, its value and its source.
        """
        for name, reason in reasons.items():
            if (source := self.source_of(name)) != "default":
                value = text_of(getattr(self, name))
                raise ValueError(f"{name} is set to {value} (by the {source}), but {reason}: remove it")

    def describe(self, unused: Collection[str] = ()) -> str:
        """A table of fields, values and their sources, without unused fields."""
        values = {name: value for name, value in self.as_dict().items() if name not in unused}
        rows = [(name, text_of(value), self.source_of(name)) for name, value in values.items()]
        rows = [("field", "value", "from"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Hyperparameters of HySparKPretrainTrainer and SparKPretrainTrainer."""

    kind: ClassVar[str] = "pretrain"

    final_weight_decay: float = documented(
        0.2,
        NOT_NEGATIVE,
        unit="AdamW's weight_decay",
        source=RELEASE,
        meaning="weight decay at the end of the training; it rises along a half cosine",
    )
    gradient_clip: float = documented(
        5.0, POSITIVE, unit="L2 norm", source=RELEASE, meaning="gradients of a larger norm are scaled down to it"
    )
    mask_ratio: float = documented(
        0.75,
        ABOVE_ZERO_BELOW_ONE,
        unit="of the mask units",
        source=RELEASE,
        meaning="fraction of the patch that is hidden; at least one unit must stay visible and one hidden",
    )
    decoder: str = documented(
        PLAN_DECODER,
        DECODER,
        unit="unet or reconstruction",
        source=OURS,
        meaning="decoder of SparKPretrainTrainer; unet: the plan's own, which fine-tuning continues with; "
        "reconstruction: HySparK's, which fine-tuning does not use",
    )
    decoder_width: int | None = documented(
        None,
        AT_LEAST_ONE,
        unit="channels",
        source="HySparK-B of the release",
        meaning="width of the coarsest level of HySparK's decoder; it is halved per level; "
        "none: 48 * 2^(stages - 1) for presets B and L, 24 * 2^(stages - 1) for S; with SparK, so that the finest "
        "level has the first stage's channels",
    )
    mask_block: int = documented(
        1,
        AT_LEAST_ONE,
        unit="mask units per axis",
        source=RELEASE,
        meaning="units that are hidden together, for a coarser mask; the number of visible units stays exact, so one "
        "block of a patch can be partly visible",
    )
    standardise_targets: bool = documented(
        True,
        ANYTHING,
        unit="yes or no",
        source=RELEASE,
        meaning="yes: the target of each unit is standardised by its own mean and standard deviation; "
        "no: the target is the preprocessed intensities",
    )
    intensity_augmentation: str = documented(
        NO_AUGMENTATION,
        AUGMENTED,
        unit="none, input or both",
        source=RELEASE,
        meaning="nnU-Net's noise, blur, brightness, contrast, low resolution and gamma; input: for what the network "
        "sees, with the clean image as target; both: also for the target",
    )
    final_validation_cases: int | None = documented(
        40,
        NOT_NEGATIVE,
        unit="cases",
        source=OURS,
        meaning="validation cases, chosen at random, that are reconstructed after the last epoch; 0: skip this; "
        "none: no limit, all cases",
    )
    num_pictures: int = documented(
        4, NOT_NEGATIVE, unit="cases", source=OURS, meaning="validation cases with a picture of their reconstruction"
    )
    picture_every: int = documented(50, AT_LEAST_ONE, unit="epochs", source=OURS, meaning="epochs between two pictures")
    probe_every: int = documented(
        0,
        NOT_NEGATIVE,
        unit="epochs",
        source=OURS,
        meaning="epochs between two linear probes of the encoder, if there are labels; 0: off",
    )
    probe_cases: int = documented(
        20,
        AT_LEAST_ONE,
        unit="cases",
        source=OURS,
        meaning="labelled cases to which the linear probe is fitted; it is scored on as many others",
    )
    probe_dataset: str | None = documented(
        None,
        A_DATASET,
        unit="number or name",
        source=OURS,
        meaning="labelled dataset for the linear probe, planned like the training dataset; none: the training dataset",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # schedules.ProgressScheduler takes parameters with a weight decay of 0 for those that never decay
        if self.weight_decay == 0 and self.final_weight_decay != 0:
            raise ValueError(
                f"weight_decay is 0 and final_weight_decay {self.final_weight_decay}, but a weight decay cannot rise "
                f"from 0: set both to 0, or start above 0, for example at 1e-6"
            )
        if self.probe_dataset is not None and not self.probe_every:
            raise ValueError(
                f"probe_dataset is {self.probe_dataset}, but probe_every is 0, so there is no linear probe: set "
                f"probe_every, for example HYSPARK_PROBE_EVERY=10, or remove probe_dataset"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Hyperparameters of HySparKFinetuneTrainer and SparKFinetuneTrainer."""

    kind: ClassVar[str] = "finetune"

    optimizer: str = documented(
        ADAMW,
        OPTIMIZER,
        unit="adamw or sgd",
        source=OURS,
        meaning="sgd: nnU-Net's, with Nesterov momentum 0.99, and initial_lr 0.01 and weight_decay 3e-5 unless they "
        "are set",
    )
    warmup_fraction: float = documented(
        0.05,
        ZERO_TO_BELOW_ONE,
        unit="of the training",
        source=OURS,
        meaning="first part of the training, in which the learning rate rises",
    )
    polynomial_exponent: float = documented(
        0.9,
        POSITIVE,
        unit="exponent",
        source=NNUNET,
        meaning="exponent of the learning rate's polynomial decay after the warm-up",
    )
    decoder_warmup_epochs: int = documented(
        0,
        NOT_NEGATIVE,
        unit="epochs",
        source=OURS,
        meaning="first epochs, in which only the decoder trains, at a rising rate; the schedule of the complete "
        "network fills the remaining epochs",
    )
    encoder_hold_epochs: int = documented(
        0,
        NOT_NEGATIVE,
        unit="epochs",
        source=OURS,
        meaning="first epochs, in which the encoder is frozen",
    )
    layer_decay: float | None = documented(
        None,
        ABOVE_ZERO_TO_ONE,
        unit="per layer",
        source=OURS,
        meaning="each layer of the encoder (stem, stage, transformer block) trains at this fraction of the learning "
        "rate of the layer after it; 1: equal rates; none: with -pretrained_weights the stem trains at 1/128 of the "
        "decoder's rate, otherwise 1",
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
    """Writes values and sources as JSON; a reader sees the old file or the complete new one."""
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
