"""Fields of a recipe: default, unit, allowed values, and how a value is read from text."""

import dataclasses
from collections.abc import Callable
from dataclasses import Field, dataclass
from types import NoneType
from typing import Any, get_args

from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.architectures.spark import DECODERS
from hyspark_nnunet.building_blocks.recomputation import DEPTHS

PREFIX = "HYSPARK_"

# values of intensity_augmentation
AUGMENTATIONS = NO_AUGMENTATION, OF_INPUT, OF_BOTH = "none", "input", "both"

# values of optimizer, and what nnUNetTrainer trains with
OPTIMIZERS = ADAMW, SGD = "adamw", "sgd"
SGD_DEFAULTS = {"initial_lr": 1e-2, "weight_decay": 3e-5}

RELEASE = "HySparK's pre-training"
NNUNET = "nnU-Net"
OURS = "this project"


@dataclass(frozen=True)
class Allowed:
    """Allowed values of a field: words that follow "it must", and a test."""

    words: str
    test: Callable[[Any], bool]


PRESET_NAME = Allowed(f"be one of {', '.join(PRESETS)}", lambda value: value in PRESETS)
AUGMENTED = Allowed(f"be one of {', '.join(AUGMENTATIONS)}", lambda value: value in AUGMENTATIONS)
OPTIMIZER = Allowed(f"be one of {', '.join(OPTIMIZERS)}", lambda value: value in OPTIMIZERS)
DECODER = Allowed(f"be one of {', '.join(DECODERS)}", lambda value: value in DECODERS)
DEPTH = Allowed(f"be one of {', '.join(DEPTHS)}", lambda value: value in DEPTHS)
AT_LEAST_ONE = Allowed("be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Allowed("be at least 0", lambda value: value >= 0)
POSITIVE = Allowed("be above 0", lambda value: value > 0)
ZERO_TO_ONE = Allowed("lie in [0, 1]", lambda value: 0 <= value <= 1)
ZERO_TO_BELOW_ONE = Allowed("lie in [0, 1)", lambda value: 0 <= value < 1)
ABOVE_ZERO_BELOW_ONE = Allowed("lie strictly between 0 and 1", lambda value: 0 < value < 1)
SEED = Allowed("lie in [0, 2^63)", lambda value: 0 <= value < 2**63)
ABOVE_ZERO_TO_ONE = Allowed("lie in (0, 1]", lambda value: 0 < value <= 1)
PAIRS = Allowed(
    "be pairs such as T1=CT, T2=CT", lambda value: all(0 < p.find("=") < len(p) - 1 for p in value.split(","))
)
A_DATASET = Allowed("name a dataset", lambda value: bool(value.strip()))
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
    """A dataclass field with its documentation.

    Args:
        default: value if none is set.
        allowed: values, in addition to None for optional fields.
        unit: of the value.
        source: of the default.
        meaning: of the field; also the end of error messages.
    """
    metadata = {"help": meaning, "unit": unit, "source": source, "allowed": allowed}
    return dataclasses.field(default=default, metadata=metadata)


def recipe_fields(recipe_class: type) -> list[Field[Any]]:
    """The hyperparameters of a recipe, in order."""
    return [field for field in dataclasses.fields(recipe_class) if "help" in field.metadata]


def variable_name(field: str, kind: str | None = None) -> str:
    """The environment variable that sets a field for both trainers, or for "pretrain" or "finetune"."""
    return PREFIX + (field if kind is None else f"{kind}_{field}").upper()


def is_optional(field: Field[Any]) -> bool:
    return NoneType in get_args(field.type)


def _type_of(field: Field[Any]) -> type:
    """The type of a field's values other than None."""
    return next(t for t in (*get_args(field.type), field.type) if t in TYPE_WORDS)


def _wrong_type(value: Any, field: Field[Any], label: str) -> ValueError:
    words = TYPE_WORDS[_type_of(field)] + (", or none" if is_optional(field) else "")
    return ValueError(f"{label} is {value!r}, but it must be {words}: {field.metadata['help']}")


def checked_type(value: Any, field: Field[Any], label: str) -> Any:
    expected = _type_of(field)
    if value is None and is_optional(field):
        return None
    # True is an int in Python
    if isinstance(value, bool) and expected is not bool:
        raise _wrong_type(value, field, label)
    if expected is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, expected):
        raise _wrong_type(value, field, label)
    return value


def parsed(text: str, field: Field[Any], label: str) -> Any:
    expected, stripped = _type_of(field), text.strip()
    if is_optional(field) and stripped.lower() in ("", "none"):
        return None
    try:
        return TRUTHS[stripped.lower()] if expected is bool else expected(stripped)
    except (ValueError, KeyError):
        raise _wrong_type(text, field, label) from None


def text_of(value: Any) -> str:
    """A value as it is written in an environment variable."""
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else f"{value}"
