"""Whether earlier checkpoints fit a training whose recipe or plan may have changed since."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.checkpoints.transfer import differences
from hyspark_nnunet.recipe.fields import text_of, variable_name
from hyspark_nnunet.recipe.recipe import Recipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.optimization import optimizer_of

# recipe fields that a network is built from: stored in the results' plans.json, where prediction finds them
NETWORK_FIELDS = ("preset", "decoder", "decoder_width")
# with another value the same weights mean something else
FIXED_FIELDS = (*NETWORK_FIELDS, "standardise_targets")
# differences in these are reported elsewhere, or the checkpoint's value is taken
UNREPORTED_FIELDS = ("num_epochs", "seed")
# entries of a checkpoint's description that determine what its weights compute
NETWORK = (
    "network",
    "input_channels",
    "n_stages",
    "features_per_stage",
    "kernel_sizes",
    "strides",
    "n_blocks_per_stage",
    "n_conv_per_stage",
    "n_conv_per_stage_decoder",
    "expansion_per_stage",
    "vit_n_blocks",
    "vit_num_heads",
    "norm_op",
    "norm_op_kwargs",
    "nonlin",
    "nonlin_kwargs",
)


def check_network(checkpoint: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Compares the network of a checkpoint with the one that was built.

    Raises:
        ValueError: the plan has changed since; names what differs.
    """
    here = {key: value for key, value in description.items() if key in NETWORK}
    differing = differences(checkpoint.get("hyspark", {}), here)
    if differing:
        raise ValueError("the checkpoint does not fit the current plan:\n" + "\n".join(differing))


def check_recipe(checkpoint: Mapping[str, Any], recipe: Recipe, log: Callable[[str], object]) -> None:
    """Compares the recipe of a checkpoint with the current one: variables are easily forgotten in a new shell.

    Raises:
        ValueError: the weights mean something else with this recipe.
    """
    trained, here = checkpoint.get("recipe", {}), recipe.as_dict()
    other = {name: trained[name] for name in here if name in trained and trained[name] != here[name]}
    for name in FIXED_FIELDS:
        if name in other:
            raise ValueError(
                f"the checkpoint was trained with {name} {text_of(other[name])}, but the recipe has "
                f"{text_of(here[name])}; set {variable_name(name)}={text_of(other[name])}"
            )
    reported = {name: text_of(value) for name, value in other.items() if name not in UNREPORTED_FIELDS}
    if reported:
        differing = ", ".join(f"{name} {text_of(here[name])} (there: {value})" for name, value in reported.items())
        variables = " ".join(f"{variable_name(name)}={value}" for name, value in reported.items())
        log(
            f"WARNING: the recipe differs from the checkpoint's: {differing}. To train with the checkpoint's values, "
            f"set: {variables}"
        )


def check_other_folds(
    output_folder: Path,
    configuration_name: str,
    recipe: Recipe,
    section_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """All folds share one plans.json, which can describe one network only.

    Args:
        output_folder: of this fold.
        configuration_name: of the plans.
        recipe: of this fold.
        section_of: gives the recipe's fields that a configuration sets.

    Raises:
        ValueError: other folds were trained with another network.
    """
    folder = output_folder.parent
    others = [file for file in folder.glob("fold_*/checkpoint_*.pth") if file.parent != output_folder]
    if not others or not (folder / "plans.json").is_file():
        return
    earlier = PlansManager(str(folder / "plans.json")).get_configuration(configuration_name)
    trained = resolve_recipe(type(recipe), section_of(earlier.configuration), environment={}).as_dict()
    for name, value in recipe.as_dict().items():
        if name in NETWORK_FIELDS and value != trained[name]:
            raise ValueError(
                f"{folder} holds folds trained with {name} {trained[name]} ({others[0].parent.name}), but this "
                f"recipe has {name} {value}: the folds share one plans.json, which describes one network. Set "
                f"{variable_name(name)}={trained[name]}, or use another plans name (-p) or results folder"
            )


def group_mismatch(checkpoint: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the optimizer's state does not fit these parameter groups; None: it fits.

    PyTorch's own message does not say what to do.
    """
    trained_groups = checkpoint["optimizer_state"]["param_groups"]
    kinds = [optimizer_of(some) for some in (trained_groups, groups)]
    if kinds[0] != kinds[1]:
        return (
            f"the checkpoint was trained with optimizer {kinds[0]}, but the recipe has {kinds[1]}: set "
            f"{variable_name('optimizer')}={kinds[0]}"
        )
    trained = [group.get("name") for group in trained_groups]
    here = [group.get("name") for group in groups]
    if trained == here:
        return None
    return (
        f"the checkpoint was trained with the parameter groups {', '.join(map(str, trained))}, but this recipe "
        f"gives {', '.join(map(str, here))}: set layer_decay, encoder_hold_epochs and decoder_warmup_epochs to the "
        "checkpoint's values (hyspark_nnunet checkpoint inspect shows them)"
    )
