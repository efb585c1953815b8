"""The recipe of a training: defaults, overridden by the plans, overridden by the environment.

"hyspark": {"preset": "S", "pretrain": {"num_epochs": 500}, "finetune": {"num_epochs": 250}}
HYSPARK_NUM_EPOCHS=50 nnUNetv2_train ...             both trainers
HYSPARK_PRETRAIN_NUM_EPOCHS=50 nnUNetv2_train ...    pre-training only; wins over the line above
"""

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import Field
from typing import Any, TypeVar

from hyspark_nnunet.recipe.fields import PREFIX, SGD, SGD_DEFAULTS, checked_type, parsed, recipe_fields, variable_name
from hyspark_nnunet.recipe.recipe import RECIPES, Recipe

# read elsewhere: tests/test_parity.py, tests/test_real_scans.py, checkpoints/transfer.py
OTHER_VARIABLES = frozenset({"HYSPARK_REFERENCE_FIXTURES", "HYSPARK_REAL_DATA", "HYSPARK_ALLOW_PARTIAL"})

R = TypeVar("R", bound=Recipe)
# by scope: None for both trainers or a trainer's kind; then field, value, source
Found = dict[str | None, list[tuple[str, Any, str]]]


def resolve_recipe(
    recipe_class: type[R],
    section: Mapping[str, Any] | None,
    environment: Mapping[str, str] = os.environ,
    section_words: str = 'section "hyspark"',
) -> R:
    """The recipe of a training: defaults, overridden by the plans, overridden by the environment.

    In plans and environment, a value for one trainer overrides the value for both. Fields that only the other trainer
    has are checked, but not used.

    Args:
        recipe_class: of the trainer.
        section: "hyspark" of the plan's configuration: field names, and "pretrain" and "finetune" with fields of one
            trainer; None if the plans have no such section.
        environment: variables, of which those named HYSPARK_... are read.
        section_words: names the section in messages.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type or is not allowed.
    """
    values: dict[str, Any] = {}
    sources = {field.name: "default" for field in recipe_fields(recipe_class)}
    everything = (_from_plan(section, f"the plan's {section_words}"), _from_environment(environment))
    for found in everything:
        # values for one trainer override those for both
        for scope in (None, recipe_class.kind):
            for name, value, source in found.get(scope, []):
                if name in sources:
                    values[name], sources[name] = value, source
    if values.get("optimizer") == SGD:
        for name, value in SGD_DEFAULTS.items():
            if name not in values:
                values[name], sources[name] = value, f"default of optimizer {SGD}"
    recipe = recipe_class(**values, sources=sources)
    for found in everything:
        _check_other_trainers(found, recipe_class)
    return recipe


def _check_other_trainers(found: Found, recipe_class: type[Recipe]) -> None:
    """Refuses wrong values of the other trainer now instead of when it starts, hours later."""
    for kind, other in RECIPES.items():
        fields = {} if other is recipe_class else _fields_of(kind)
        for name, value, source in [*found.get(None, []), *found.get(kind, [])]:
            field = fields.get(name)
            if field is not None and value is not None and not field.metadata["allowed"].test(value):
                words = field.metadata["allowed"].words
                raise ValueError(
                    f"{name} is {value!r}, but it must {words}: {field.metadata['help']} (set by the {source})"
                )


def _from_plan(section: Mapping[str, Any] | None, where: str) -> Found:
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
                checked = checked_type(inner_value, fields[inner_name], f"{inner_name} in {inner}")
                found[name].append((inner_name, checked, f'plan, "{name}"'))
        elif name in both:
            found[None].append((name, checked_type(value, both[name], f"{name} in {where}"), "plan"))
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
        value = parsed(environment[variable], field, variable)
        found.setdefault(scope, []).append((field.name, value, f"environment variable {variable}"))
    return found


def _fields_of(kind: str | None) -> dict[str, Field[Any]]:
    """The fields of a trainer's recipe by name; None: of both recipes."""
    recipes = RECIPES.values() if kind is None else [RECIPES[kind]]
    return {field.name: field for recipe in recipes for field in recipe_fields(recipe)}


def _unknown(name: str, valid: Collection[str], where: str) -> ValueError:
    # without the prefix, which would make all names similar
    by_rest = {known.removeprefix(PREFIX): known for known in valid}
    close = difflib.get_close_matches(str(name).removeprefix(PREFIX), by_rest, n=1)
    if close:
        return ValueError(f"unknown name {name} {where}; did you mean {by_rest[close[0]]}? All names: docs/recipes.md")
    return ValueError(f"unknown name {name} {where}. Valid names: {', '.join(sorted(valid))}")


def _checked_section(section: Any, where: str) -> Mapping[str, Any]:
    if isinstance(section, Mapping):
        return section
    raise ValueError(f"{where} is {section!r}, but it must be a dictionary of recipe fields")
