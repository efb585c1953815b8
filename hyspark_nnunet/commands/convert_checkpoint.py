"""The command ``hyspark_nnunet checkpoint convert``: writes weights to another file format.

Values do not change: the new file is read again and compared bit by bit.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyspark_nnunet.architectures.presets import decoder_width
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints import nnssl
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, required_sizes
from hyspark_nnunet.checkpoints.reference import own_form, to_reference
from hyspark_nnunet.checkpoints.sizes import EncoderSizes
from hyspark_nnunet.checkpoints.storage import (
    SourceWeights,
    read_weights,
    write_atomically,
    write_safetensors,
)
from hyspark_nnunet.checkpoints.transfer import preset_of, transfer_weights
from hyspark_nnunet.commands.equal_weights import differing
from hyspark_nnunet.commands.plan_network_files import (
    NNSSL,
    NNUNET_WEIGHTS,
    PLAN_KINDS,
    plan_of_file,
    write_plan_network,
)
from hyspark_nnunet.datasets.dataset_json import without_files

RELEASE, NNUNET, SAFETENSORS = "hyspark-release", "nnunet", "safetensors"
KINDS = (RELEASE, NNUNET, NNUNET_WEIGHTS, NNSSL, SAFETENSORS)
TRAINER_OF_FORM = {
    "masked_autoencoder": "HySparKPretrainTrainer",
    "segmentation": "HySparKFinetuneTrainer",
    "encoder": "HySparKFinetuneTrainer",
}


def convert_checkpoint(
    file: str,
    out: str,
    kind: str,
    dataset: str | None = None,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    fold: str = "all",
) -> int:
    """Writes the weights of a file in another format.

    Args:
        file: any that ``read_weights`` takes.
        out: new file.
        kind: one of ``KINDS``.
        dataset: number or name of a preprocessed dataset: needed for "nnunet"; for the kinds of nnU-Net's own networks,
            whose plan is taken instead of the file's.
        configuration: of its plans.
        plans: name of its plans.
        fold: that the checkpoint names.

    Returns:
        exit status.

    Raises:
        FileNotFoundError, ValueError: see ``read_weights``; the file holds no complete encoder or another kind of
            network, the weights do not fit the dataset without adaptation, or ``out`` exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists: choose another name or remove it")
    if kind == NNUNET and dataset is None:
        raise ValueError("a checkpoint of nnU-Net belongs to a dataset: name it with -d (and -c, -p)")
    weights = read_weights(file)
    sizes, form = required_sizes(weights.state, file, weights.origin), own_form(weights.state)
    lines: list[str] = []
    left_out: list[str] = []
    if kind == SAFETENSORS:
        _to_safetensors(weights, sizes, out)
    elif isinstance(sizes, PlanSizes):
        if kind not in PLAN_KINDS:
            raise ValueError(
                f"--to {kind} is for HySparK's networks, but {file} holds nnU-Net's {sizes.network}: choose --to "
                f"{', '.join(PLAN_KINDS)} or {SAFETENSORS}"
            )
        lines, left_out = write_plan_network(weights, sizes, file, out, kind, dataset, configuration, plans)
    elif kind in PLAN_KINDS or form is None:
        raise ValueError(
            f"--to {kind} is for the networks that nnU-Net's own plans name, but {file} holds HySparK's network: "
            f"choose --to {NNUNET}, {RELEASE} or {SAFETENSORS}"
        )
    elif kind == RELEASE:
        lines, left_out = _to_release(weights, sizes, out)
    else:
        lines = _to_nnunet(weights, sizes, TRAINER_OF_FORM[form], file, out, str(dataset), configuration, plans, fold)
    compared = _check_read_back(weights.state, out, left_out)
    for line in lines:
        print(line)
    print(f"{out}: {compared} tensors written, read again and equal in every bit.")
    return 0


def _to_safetensors(weights: SourceWeights, sizes: EncoderSizes | PlanSizes, out: str) -> None:
    # the file stands alone: of nnU-Net's networks it also holds what shapes do not say
    plan = plan_of_file(weights, sizes) if isinstance(sizes, PlanSizes) else None
    about = {**weights.rest, "hyspark": weights.description or None, nnssl.KEY: plan}
    about.setdefault("trainer_name", weights.origin)
    write_safetensors(weights.state, about, out)


def _to_release(weights: SourceWeights, sizes: EncoderSizes, out: str) -> tuple[list[str], list[str]]:
    # the release stores positions of its own 96^3 patch, whatever the patch size of our plan
    conversion = to_reference(weights.state)
    write_atomically(conversion.state, out)
    lines = [f"not written, because the release has no such tensor: {name}" for name in conversion.dropped]
    odd = []
    if sizes.n_stages != 5:
        odd.append(f"{sizes.n_stages} stages")
    if any(set(kernel) != {3} for kernel in sizes.kernel_sizes):
        odd.append("kernels other than 3x3x3")
    if sizes.input_channels != 1:
        odd.append(f"{sizes.input_channels} input channels")
    strides = weights.description.get("strides", [])
    if any(set(stride) != {2} for stride in strides[1:]):
        odd.append(f"strides {strides}")
    if preset_of(sizes) != "B":
        odd.append(f"widths {sizes.features_per_stage}")
    if odd:
        lines.append(
            "WARNING: HySparK-B of the release has five stages of 3x3x3 kernels with stride 2, and one input channel. "
            f"This network has {', '.join(odd)}: configure the release in the same way to load it"
        )
    return lines, conversion.dropped


def _to_nnunet(
    weights: SourceWeights,
    sizes: EncoderSizes,
    trainer: str,
    file: str,
    out: str,
    dataset: str,
    configuration: str,
    plans: str,
    fold: str,
) -> list[str]:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    from hyspark_nnunet.commands.dataset_network import network_of_dataset
    from hyspark_nnunet.training.optimization import parameter_groups

    preset = preset_of(sizes)
    network_sizes: dict[str, Any] = {"preset": preset} if preset else {}
    if trainer == "HySparKPretrainTrainer":
        width = weights.state["decoder.levels.0.upsample.weight"].shape[0]
        # the default width is left out, as in a recipe, so that --c needs no setting
        if preset is None or width != decoder_width(sizes.n_stages, preset, None):
            network_sizes["decoder_width"] = width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights that the file does not hold are the same in every conversion
        target = network_of_dataset(dataset, configuration, plans, trainer, sizes=network_sizes)
    lines, description = [], dict(weights.description)
    heads = [t for name, t in weights.state.items() if name.startswith("decoder.seg_layers.")]
    labels = target.description.get("labels", [])
    if heads and "labels" not in description:
        if len(heads[0]) != len(labels):
            raise ValueError(
                f"{file} has {len(heads[0])} heads, but {target.description['dataset']} has {len(labels)} "
                f"({', '.join(labels)}): to use the other weights, fine-tune with -pretrained_weights"
            )
        lines.append(f"The file does not name its labels. They are assumed to be {', '.join(labels)}.")
        description.update(labels=labels, regions=target.description["regions"])
    report = transfer_weights(target.network, weights.state, file, description, target.description)
    changed = differing(weights.state, target.network.state_dict())
    if changed:
        raise ValueError(
            f"{file} does not fit {target.description['dataset']} without adaptation: {len(changed)} tensors would be "
            f"adapted or left out, first {changed[0]}. To adapt them, train with -pretrained_weights.\n{report.table()}"
        )
    # nnU-Net's default: mirroring along all axes
    every_axis = tuple(range(len(target.description["patch_size"])))
    dataset_json = without_files(target.dataset_json)
    optimizer = torch.optim.AdamW(
        parameter_groups(target.network, target.recipe.weight_decay, target.recipe.initial_lr)
    )
    write_atomically(
        {
            "network_weights": target.network.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "grad_scaler_state": None,
            "logging": LocalLogger().get_checkpoint(),
            "_best_ema": None,
            "current_epoch": 0,
            "init_args": {
                "plans": target.plans,
                "configuration": configuration,
                "fold": int(fold) if fold.isdecimal() else fold,
                "dataset_json": dataset_json,
                "device": "cpu",
            },
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": weights.rest.get("inference_allowed_mirroring_axes", every_axis),
            "recipe": target.recipe.as_dict(),
            "hyspark": target.description,
        },
        out,
    )
    return [*lines, report.table(), *_place_beside(Path(out), target.plans, dataset_json)]


def _place_beside(out: Path, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> list[str]:
    """Writes plans.json and dataset.json, with which nnU-Net predicts, where they are missing."""
    if not out.absolute().parent.name.startswith("fold_"):
        return [
            "To predict with it, put it into fold_all/ of a results folder that has this dataset's plans.json and "
            "dataset.json. If OUT is in a folder fold_..., convert writes them."
        ]
    written = []
    for name, content in (("plans.json", plans), ("dataset.json", dataset_json)):
        beside = out.absolute().parent.parent / name
        if not beside.exists():
            with replacing(beside) as new:
                new.write_text(json.dumps(content, indent=4), encoding="utf-8")
            written.append(f"{beside}: written for nnU-Net's prediction")
    return written


def _check_read_back(state: Mapping[str, Tensor], out: str, left_out: list[str]) -> int:
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    changed = differing(kept, read_weights(out).state)
    if changed:
        raise RuntimeError(f"{out} differs from what was written, first in {changed[0]}: do not use it")
    return len(kept)
