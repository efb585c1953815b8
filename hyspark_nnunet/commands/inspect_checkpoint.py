"""The command ``hyspark_nnunet checkpoint inspect``: describes a file and checks whether it fits a dataset."""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hyspark_nnunet.checkpoints.hub import local_file
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, finetuning_trainer, network_sizes
from hyspark_nnunet.checkpoints.reference import own_form
from hyspark_nnunet.checkpoints.report import part_of
from hyspark_nnunet.checkpoints.storage import SourceWeights, description_by_nnunet, read_weights
from hyspark_nnunet.checkpoints.transfer import (
    ALLOW_PARTIAL,
    MIN_ENCODER_SHARE,
    Transfer,
    partial_is_allowed,
    preset_of,
)
from hyspark_nnunet.recipe.fields import text_of


def inspect_checkpoint(
    file: str,
    dataset: str | None = None,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    trainer: str | None = None,
) -> int:
    """Prints what a file holds and, with a dataset, what ``-pretrained_weights`` would do with it.

    Args:
        file: path or address of the checkpoint.
        dataset: number or name; None: only describe the file.
        configuration: of the dataset's plans.
        plans: name of the dataset's plans.
        trainer: name; None: the fine-tuning trainer of the file's network.

    Returns:
        exit status: 1 if the file does not fit the dataset.

    Raises:
        FileNotFoundError, ValueError: see ``read_weights`` and ``network_of_dataset``.
    """
    path = local_file(file)
    weights = read_weights(path)
    print(f"{file}, {path.stat().st_size / 1e6:.1f} MB")
    print(describe_file(weights))
    if dataset is None:
        return 0
    from hyspark_nnunet.commands.dataset_network import network_of_dataset

    trainer = trainer or finetuning_trainer(network_sizes(weights.state))
    target = network_of_dataset(dataset, configuration, plans, trainer, device="meta")
    place = f"{target.description['dataset']}, {configuration}, {plans}, {trainer}"
    try:
        report = Transfer(
            weights.state,
            target.network.state_dict(),
            file,
            weights.description,
            target.description,
            target.recipe.input_channel_mapping,
        ).report
    except ValueError as error:
        print(f"\nDoes not fit {place}: {error}")
        return 1
    print(f"\nOn {place}:\n{report.table()}")
    if report.encoder_share >= MIN_ENCODER_SHARE:
        print("Fits.")
        return 0
    if partial_is_allowed():
        print(f"Fits in part: {report.encoder_share:.1%} of the encoder, which {ALLOW_PARTIAL}=1 allows.")
        return 0
    print(
        f"Does not fit: less than {MIN_ENCODER_SHARE:.0%} of the encoder. Set {ALLOW_PARTIAL}=1 to load the matching "
        "part."
    )
    return 1


def describe_file(weights: SourceWeights) -> str:
    """Describes a file: a line per fact, its sizes and its recipe."""
    rest, description = weights.rest, weights.description
    known = {**description_by_nnunet(rest), **description}
    form, sizes = own_form(weights.state), network_sizes(weights.state)
    what = weights.origin if form is None or "release" in weights.origin else f"{weights.origin}, {form}"
    rows = [("source", what.replace("_", " ")), ("trained on", _training_data(rest, known))]
    epoch = rest.get("current_epoch", rest.get("epoch"))
    if epoch is not None:
        rows.append(("epoch", f"{epoch}"))
    if sizes is not None:
        named = description.get("channel_names")
        names = f": {', '.join(map(str, named.values()))}" if isinstance(named, Mapping) else ""
        blocks = ", ".join(map(str, sizes.n_blocks_per_stage))
        if isinstance(sizes, PlanSizes):
            rows.append(("network", sizes.network))
        else:
            rows.append(("preset", description.get("preset") or preset_of(sizes) or "none of S, B, L"))
            blocks += f"; {sizes.vit_n_blocks} transformer blocks"
        rows += [
            ("input channels", f"{sizes.input_channels}{names}"),
            ("stages", f"{sizes.n_stages} of widths {', '.join(map(str, sizes.features_per_stage))}"),
            ("blocks", blocks),
            ("kernels", ", ".join("x".join(map(str, kernel)) for kernel in sizes.kernel_sizes)),
        ]
    rows += [
        (key.replace("_", " "), json.dumps(known[key]))
        for key in ("strides", "patch_size", "spacing")
        if known.get(key) is not None
    ]
    if description.get("labels"):
        rows.append(("regions" if description.get("regions") else "labels", ", ".join(description["labels"])))
    if weights.dropped:
        rows.append(("not used", f"{len(weights.dropped)} tensors of the release"))
    text = [f"{name:<16}{value}" for name, value in rows if value]
    text += ["", f"{'part':<24}{'tensors':>8}{'parameters':>14}", *_sizes_of_parts(weights.state)]
    recipe = rest.get("recipe")
    if isinstance(recipe, Mapping):
        # the network of a plan has no preset, and HySparK's has one decoder
        unused = "preset" if isinstance(sizes, PlanSizes) else "decoder"
        shown = {name: value for name, value in recipe.items() if name != unused}
        width = max(map(len, shown), default=0)
        text += ["", "recipe", *(f"  {name:<{width}}  {text_of(value)}" for name, value in shown.items())]
    return "\n".join(text)


def _training_data(rest: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Dataset, configuration, plans and fold, as far as the file names them."""
    arguments = rest.get("init_args")
    if isinstance(arguments, Mapping):
        known = {**known, "fold": arguments.get("fold")}
    words = {"dataset": "", "configuration": "configuration ", "plans": "plans ", "fold": "fold "}
    named = [f"{word}{known[key]}" for key, word in words.items() if known.get(key) is not None]
    return ", ".join(named) or "not in the file"


def _sizes_of_parts(state: Mapping[str, Tensor]) -> list[str]:
    parts: dict[str, list[int]] = defaultdict(list)
    for name, tensor in state.items():
        parts[part_of(name)].append(tensor.numel())
    lines = [f"{part:<24}{len(counts):>8}{sum(counts):>14,}" for part, counts in parts.items()]
    return [*lines, f"{'all':<24}{len(state):>8}{sum(map(sum, parts.values())):>14,}"]
