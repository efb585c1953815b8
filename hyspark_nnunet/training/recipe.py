"""The recipe of a training: every hyperparameter with its default, its unit and where it comes from.

Defaults are overridden by the ``"hyspark"`` section of the plan's configuration, that by environment variables:

    "hyspark": {"preset": "S", "pretrain": {"num_epochs": 500}, "finetune": {"num_epochs": 250}}
    HYSPARK_NUM_EPOCHS=50 nnUNetv2_train ...             both trainers
    HYSPARK_PRETRAIN_NUM_EPOCHS=50 nnUNetv2_train ...    pre-training only; wins over the line above
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args

from hyspark_nnunet.architectures.from_plans import PRESETS
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.building_blocks.recomputation import DEPTHS

PREFIX = "HYSPARK_"
# read elsewhere: tests/test_parity.py, tests/test_real_scans.py, checkpoints/transfer.py
OTHER_VARIABLES = frozenset({"HYSPARK_REFERENCE_FIXTURES", "HYSPARK_REAL_DATA", "HYSPARK_ALLOW_PARTIAL"})

# values of intensity_augmentation
AUGMENTATIONS = NO_AUGMENTATION, OF_INPUT, OF_BOTH = "none", "input", "both"

RELEASE = "HySparK's pre-training"
NNUNET = "nnU-Net"
OURS = "this project"


@dataclass(frozen=True)
class Allowed:
    """Values a field may take, in words that follow "it must", and as a test."""

    words: str
    test: Callable[[Any], bool]


PRESET_NAME = Allowed(f"be one of {', '.join(PRESETS)}", lambda value: value in PRESETS)
AUGMENTED = Allowed(f"be one of {', '.join(AUGMENTATIONS)}", lambda value: value in AUGMENTATIONS)
DEPTH = Allowed(f"be one of {', '.join(DEPTHS)}", lambda value: value in DEPTHS)
AT_LEAST_ONE = Allowed("be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Allowed("be at least 0", lambda value: value >= 0)
POSITIVE = Allowed("be above 0", lambda value: value > 0)
SHARE = Allowed("lie in [0, 1]", lambda value: 0 <= value <= 1)
PART = Allowed("lie in [0, 1)", lambda value: 0 <= value < 1)
BETWEEN = Allowed("lie strictly between 0 and 1", lambda value: 0 < value < 1)
SEED = Allowed("lie in [0, 2^63)", lambda value: 0 <= value < 2**63)
ABOVE_ZERO_TO_ONE = Allowed("lie in (0, 1]", lambda value: 0 < value <= 1)
PAIRS = Allowed(
    "be pairs such as T1=CT, T2=CT", lambda value: all(0 < p.find("=") < len(p) - 1 for p in value.split(","))
)
ANYTHING = Allowed("be true or false", lambda value: True)

# in error messages
TYPE_WORDS = {
    bool: "1, 0, true, false, yes or no",
    int: "a whole number such as 5",
    float: "a number such as 0.5 or 1e-4",
    str: "text",
}
TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


# untyped result, as dataclasses.field has: the annotation beside it says the type
def documented(default: Any, allowed: Allowed, *, unit: str, source: str, meaning: str) -> Any:
    """A dataclass field that knows what it means.

    Args:
        default: value where nobody says another.
        allowed: values; None is allowed besides, where the annotation says so.
        unit: of the value.
        source: where the default comes from.
        meaning: what the field is for; ends error messages, too.
    """
    metadata = {"help": meaning, "unit": unit, "source": source, "allowed": allowed}
    return dataclasses.field(default=default, metadata=metadata)


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
        PART,
        unit="of the training",
        source=RELEASE,
        meaning="part of the training in which the learning rate rises",
    )
    oversample_foreground_percent: float = documented(
        0.33, SHARE, unit="of a batch", source=NNUNET, meaning="part of a batch's patches that must hold foreground"
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
            value = _checked_type(getattr(self, field.name), field, field.name)
            object.__setattr__(self, field.name, value)  # a whole number given for a float
            if isinstance(value, float) and not math.isfinite(value):
                raise self._refusal(field, "be finite")
            if value is not None and not field.metadata["allowed"].test(value):
                raise self._refusal(field, field.metadata["allowed"].words)

    def _refusal(self, field: Field[Any], words: str) -> ValueError:
        source = self.source_of(field.name)
        hint = "" if source in ("default", "argument") else f" (set by the {source})"
        words += " or none" if _is_optional(field) else ""
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
        rows = [(name, _text(value), self.source_of(name)) for name, value in self.as_dict().items()]
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
        BETWEEN,
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
        meaning="units that are hidden together: a coarser mask; of one block of a patch a part may stay visible",
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
        4, NOT_NEGATIVE, unit="cases", source=OURS, meaning="held-out cases whose reconstruction is pictured"
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
        0.05, PART, unit="of the training", source=OURS, meaning="part of the training in which the learning rate rises"
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
        SHARE,
        unit="of the learning rate",
        source=OURS,
        meaning="the encoder's part of the learning rate in its first encoder_hold_epochs; 0 freezes it",
    )
    layer_decay: float = documented(
        1.0,
        ABOVE_ZERO_TO_ONE,
        unit="per layer",
        source=OURS,
        meaning="factor on the learning rate from each layer of the encoder (stem, stage, transformer block) to the "
        "one before it; 1: all alike",
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
R = TypeVar("R", bound=Recipe)


def recipe_fields(recipe_class: type[Recipe]) -> list[Field[Any]]:
    """The hyperparameters of a recipe, in order."""
    return [field for field in dataclasses.fields(recipe_class) if "help" in field.metadata]


def resolve_recipe(
    recipe_class: type[R], section: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ
) -> R:
    """The recipe in force: defaults, overridden by the plan, overridden by the environment.

    In the plan and in the environment, what is said for one trainer overrides what is said for both. A field that only
    the other trainer has is checked and not used.

    Args:
        recipe_class: of the trainer.
        section: "hyspark" of the plan's configuration: field names, and "pretrain" and "finetune" with fields of one
            trainer; None where the plan has none.
        environment: variables; those named HYSPARK_... are read.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type or is not allowed.
    """
    values: dict[str, Any] = {}
    sources = {field.name: "default" for field in recipe_fields(recipe_class)}
    everything = (_from_plan(section), _from_environment(environment))
    for found in everything:
        # those of one trainer after those of both
        for scope in (None, recipe_class.kind):
            for name, value, source in found.get(scope, []):
                if name in sources:
                    values[name], sources[name] = value, source
    recipe = recipe_class(**values, sources=sources)
    for found in everything:
        _check_other_trainers(found, recipe_class)
    return recipe


def _check_other_trainers(found: "Found", recipe_class: type[Recipe]) -> None:
    """Values of the other trainer are errors now, not when it is started after hours of this one."""
    for kind, other in RECIPES.items():
        fields = {} if other is recipe_class else _fields_of(kind)
        for name, value, source in [*found.get(None, []), *found.get(kind, [])]:
            field = fields.get(name)
            if field is not None and value is not None and not field.metadata["allowed"].test(value):
                words = field.metadata["allowed"].words
                raise ValueError(
                    f"{name} is {value!r}, but it must {words}: {field.metadata['help']} (set by the {source})"
                )


# by scope: None for both trainers or a trainer's kind; then field, value, source
Found = dict[str | None, list[tuple[str, Any, str]]]


def _from_plan(section: Mapping[str, Any] | None) -> Found:
    where = 'the plan\'s section "hyspark"'
    section = {} if section is None else _checked_section(section, where)
    both = _fields_of(None)
    found: Found = {None: []}
    for name, value in section.items():
        if name in RECIPES:
            inner = f'{where}, "{name}"'
            fields = _fields_of(name)
            found[name] = []
            for inner_name, inner_value in _checked_section(value, inner).items():
                if inner_name not in fields:
                    raise _unknown(inner_name, fields, f"in {inner}")
                checked = _checked_type(inner_value, fields[inner_name], f"{inner_name} in {inner}")
                found[name].append((inner_name, checked, f'plan, "{name}"'))
        elif name in both:
            found[None].append((name, _checked_type(value, both[name], f"{name} in {where}"), "plan"))
        else:
            raise _unknown(name, [*both, *RECIPES], f"in {where}")
    return found


def _from_environment(environment: Mapping[str, str]) -> Found:
    known = {
        variable_name(field.name, scope): (scope, field)
        for scope in (None, *RECIPES)
        for field in _fields_of(scope).values()
    }
    found: Found = {}
    for variable in sorted(environment):
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in known:
            raise _unknown(variable, [*known, *OTHER_VARIABLES], "among the environment variables")
        scope, field = known[variable]
        value = _parsed(environment[variable], field, variable)
        found.setdefault(scope, []).append((field.name, value, f"environment variable {variable}"))
    return found


def variable_name(field: str, kind: str | None = None) -> str:
    """The environment variable of a field, for both trainers or for one ("pretrain", "finetune")."""
    return PREFIX + (field if kind is None else f"{kind}_{field}").upper()


def _fields_of(kind: str | None) -> dict[str, Field[Any]]:
    """The fields of a trainer's recipe by name; of both recipes for None."""
    recipes = RECIPES.values() if kind is None else [RECIPES[kind]]
    return {field.name: field for recipe in recipes for field in recipe_fields(recipe)}


def _unknown(name: str, valid: Collection[str], where: str) -> ValueError:
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return ValueError(f"unknown name {name} {where}{hint} Valid names: {', '.join(sorted(valid))}")


def _checked_section(section: Any, where: str) -> Mapping[str, Any]:
    if isinstance(section, Mapping):
        return section
    raise ValueError(f"{where} is {section!r}, but it must be a dictionary of recipe fields")


def _is_optional(field: Field[Any]) -> bool:
    return NoneType in get_args(field.type)


def _type_of(field: Field[Any]) -> type:
    """The type of a field's values besides None."""
    return next(t for t in (*get_args(field.type), field.type) if t in TYPE_WORDS)


def _wrong_type(value: Any, field: Field[Any], label: str) -> ValueError:
    words = TYPE_WORDS[_type_of(field)] + (", or none" if _is_optional(field) else "")
    return ValueError(f"{label} is {value!r}, but it must be {words}: {field.metadata['help']}")


def _checked_type(value: Any, field: Field[Any], label: str) -> Any:
    expected = _type_of(field)
    if value is None and _is_optional(field):
        return None
    # to Python, True is a number
    if isinstance(value, bool) and expected is not bool:
        raise _wrong_type(value, field, label)
    if expected is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, expected):
        raise _wrong_type(value, field, label)
    return value


def _parsed(text: str, field: Field[Any], label: str) -> Any:
    expected, stripped = _type_of(field), text.strip()
    if _is_optional(field) and stripped.lower() in ("", "none"):
        return None
    try:
        return TRUTHS[stripped.lower()] if expected is bool else expected(stripped)
    except (ValueError, KeyError):
        raise _wrong_type(text, field, label) from None


def _text(value: Any) -> str:
    """A value as a person would type it into a variable."""
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else f"{value}"


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
        default, variable = f"`{_text(field.default)}`", f"`{variable_name(field.name)}`"
        # bare asterisks and bars are markdown's
        meaning = about["help"].replace("|", "\\|").replace("*", "\\*")
        rows.append((f"`{field.name}`", default, about["unit"], meaning, about["source"], variable))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
