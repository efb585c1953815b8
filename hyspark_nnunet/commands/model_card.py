"""The model card of a published checkpoint: README.md on the Hugging Face hub.

What a stranger needs to use the weights. The card names no path and no case; the dataset is described by counts.
"""

from collections.abc import Mapping
from typing import Any

from hyspark_nnunet.checkpoints import nnssl
from hyspark_nnunet.checkpoints.hub import ADAPTATION_PLAN, NNSSL_WEIGHTS
from hyspark_nnunet.checkpoints.network_plan import network_plan
from hyspark_nnunet.checkpoints.plan_sizes import RESIDUAL, PlanSizes, network_sizes
from hyspark_nnunet.checkpoints.storage import SourceWeights
from hyspark_nnunet.checkpoints.transfer import preset_of
from hyspark_nnunet.commands.inspect_checkpoint import describe_file
from hyspark_nnunet.planning.file_plans import PLANS_NAME
from hyspark_nnunet.planning.planner import PLANS_NAME as HYSPARK_PLANS_NAME
from hyspark_nnunet.recipe.recipe import Recipe

CITATIONS: dict[str, dict[str, str]] = {
    "HySparK": {
        "type": "method of pre-training and network",
        "name": "HySparK",
        "citation": "Tang, F., Xu, R., Yao, Q., Fu, X., Quan, Q., Zhu, H., Liu, Z., Zhou, S. K. (2024). HySparK: "
        "Hybrid Sparse Masking for Large Scale Medical Image Pre-Training. MICCAI 2024. https://arxiv.org/abs/2408.05815",
    },
    "SparK": {
        "type": "method of pre-training",
        "name": nnssl.CITATION["name"],
        "citation": nnssl.CITATION["apa_citations"][0],
    },
    "ResEnc": {
        "type": "network",
        "name": "ResidualEncoderUNet of nnU-Net",
        "citation": "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., Jaeger, P. (2024). "
        "nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation. "
        "https://arxiv.org/abs/2404.09556",
    },
    "nnU-Net": {
        "type": "framework",
        "name": "nnU-Net",
        "citation": "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., Maier-Hein, K. H. (2021). nnU-Net: a "
        "self-configuring method for deep learning-based biomedical image segmentation. Nature Methods, 18(2), "
        "203-211.",
    },
}
DEFAULT_PRESET = Recipe.preset
# of a plan's configuration, what an image must be preprocessed by
PREPROCESSING = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
# of the whole plan: the same, and what the dataset was like
OF_PLANS = (
    "original_median_spacing_after_transp",
    "transpose_forward",
    "foreground_intensity_properties_per_channel",
)
FRONT_MATTER = """---
library_name: hyspark_nnunet
pipeline_tag: image-segmentation
# fill in the licence before uploading: https://huggingface.co/docs/hub/repositories-licenses
license: unknown
tags:
- medical-image-segmentation
- self-supervised-learning
- nnU-Net
---
"""


def data_of(weights: SourceWeights) -> dict[str, Any]:
    """What a checkpoint says about its training data: counts, channels, labels and geometry; {} where it says nothing.

    Args:
        weights: of the file; files of nnU-Net's trainers have plans and dataset.json in ``init_args``.
    """
    arguments = _mapping(weights.rest.get("init_args"))
    plans, dataset_json = _mapping(arguments.get("plans")), _mapping(arguments.get("dataset_json"))
    description = weights.description
    configuration = description.get("configuration") or arguments.get("configuration")
    settings = _mapping(_mapping(plans.get("configurations")).get(str(configuration)))
    known = {
        "cases": dataset_json.get("numTraining"),
        "fold": arguments.get("fold"),
        "channel_names": description.get("channel_names") or dataset_json.get("channel_names"),
        "labels": description.get("labels"),
        "configuration": configuration,
        "batch_size": settings.get("batch_size"),
        "patch_size": description.get("patch_size"),
        **{name: settings.get(name) for name in PREPROCESSING if name in settings},
        **{name: plans.get(name) for name in OF_PLANS if name in plans},
    }
    return {name: value for name, value in known.items() if value is not None}


def citations_of(weights: SourceWeights) -> list[dict[str, str]]:
    """What users of a file must cite: its method of pre-training, its network, and nnU-Net."""
    sizes = network_sizes(weights.state)
    names = ["nnU-Net"]
    if not isinstance(sizes, PlanSizes):
        names = ["HySparK", *names]
    else:
        if sizes.network == RESIDUAL:
            names = ["ResEnc", *names]
        if weights.origin.startswith("SparK"):
            names = ["SparK", *names]
    return [CITATIONS[name] for name in names]


def model_card(weights: SourceWeights, name: str, picture: str | None) -> str:
    """The text of README.md.

    Args:
        weights: of the file.
        name: of the model.
        picture: file of the loss curve, beside the card; None: there is none.
    """
    asked = "" if weights.heads else ", num_classes=14"
    sections = [
        FRONT_MATTER,
        f"# {name}\n\nWeights of a network for medical images ({weights.origin}), published with hyspark_nnunet.",
        f"## Use\n\nReplace ORG/NAME by this repository. {_training_command(weights)}\n\n"
        "In Python:\n\n"
        "```python\nimport hyspark_nnunet\n\n"
        f'network = hyspark_nnunet.load_network("hf://ORG/NAME"{asked})\n'
        'encoder = hyspark_nnunet.load_encoder("hf://ORG/NAME")\n```',
        f"## Data\n\n{_data_table(data_of(weights))}",
        f"## Training\n\n{_progress(weights, picture)}",
        f"## Network and recipe\n\n```text\n{describe_file(weights)}\n```",
        "## Licence\n\nThe authors of these weights have not named a licence yet.",
        "## Citation\n\n"
        + "\n".join(f"- {entry['name']}, {entry['type']}: {entry['citation']}" for entry in citations_of(weights)),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _training_command(weights: SourceWeights) -> str:
    """How nnU-Net starts from the weights."""
    sizes, configuration = network_sizes(weights.state), weights.description.get("configuration") or "3d_fullres"
    start = "-pretrained_weights hf://ORG/NAME"
    if isinstance(sizes, PlanSizes):
        configuration = "2d" if len(sizes.kernel_sizes[0]) == 2 else "3d_fullres"
        planning, plans = "", "PLANS"
        if network_plan(sizes, weights.rest, weights.description).patch_size is not None:
            plans = PLANS_NAME
            planning = f"    hyspark_nnunet plan_and_preprocess -d DATASET --like hf://ORG/NAME -c {configuration}\n"
        return (
            f"With nnU-Net, on plans that name this {sizes.network}:\n\n{planning}"
            f"    nnUNetv2_train DATASET {configuration} 0 -tr SparKFinetuneTrainer -p {plans} {start}\n\n"
            f"nnU-Net's development version reads `{ADAPTATION_PLAN}` and `{NNSSL_WEIGHTS}`."
        )
    preset = weights.description.get("preset") or (sizes and preset_of(sizes)) or DEFAULT_PRESET
    plans = HYSPARK_PLANS_NAME[preset]
    return (
        f"With nnU-Net:\n\n    hyspark_nnunet plan_and_preprocess -d DATASET -preset {preset} -c {configuration}\n"
        f"    nnUNetv2_train DATASET {configuration} 0 -tr HySparKFinetuneTrainer -p {plans} {start}"
    )


def _data_table(data: Mapping[str, Any]) -> str:
    if not data:
        return "The file does not describe its training data."
    fold = data.get("fold")
    cases = data.get("cases")
    if cases is not None and fold not in (None, "all"):
        cases = f"{cases}, of which fold {fold} was held out"
    rows = {
        "cases": cases,
        "modality (input channels)": ", ".join(map(str, _mapping(data.get("channel_names")).values())),
        "labels": ", ".join(map(str, data.get("labels", ()))),
        "spacing of the training, mm": _sizes(data.get("spacing")),
        "median spacing of the scans, mm": _sizes(data.get("original_median_spacing_after_transp")),
        "patch, voxels": _sizes(data.get("patch_size")),
        "normalisation": ", ".join(data.get("normalization_schemes", ())),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + (
        "\n\nAxes are in the order of the preprocessed arrays, usually z, y, x. `config.json` has the intensity "
        "statistics that the normalisation uses."
    )


def _progress(weights: SourceWeights, picture: str | None) -> str:
    log, epochs = _mapping(weights.rest.get("logging")), weights.rest.get("current_epoch")
    lines = [] if epochs is None else [f"{epochs} epochs."]
    for name, words in (("train_losses", "training"), ("val_losses", "validation")):
        if log.get(name):
            lines.append(f"Last {words} loss: {log[name][-1]:.4f}.")
    text = " ".join(lines) or "The file does not describe its training."
    return text if picture is None else f"{text}\n\n![Losses, learning rate and duration over the epochs]({picture})"


def _sizes(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values or ())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
