"""The command ``hyspark_nnunet checkpoint publish``: a folder to upload to the Hugging Face hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyspark_nnunet import __version__
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints.hub import ADAPTATION_PLAN, NNSSL_WEIGHTS, WEIGHTS, local_file
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, required_sizes
from hyspark_nnunet.checkpoints.reference import own_form
from hyspark_nnunet.checkpoints.storage import SourceWeights, plain, read_weights
from hyspark_nnunet.commands.convert_checkpoint import SAFETENSORS, convert_checkpoint
from hyspark_nnunet.commands.model_card import citations_of, data_of, model_card
from hyspark_nnunet.commands.plan_network_files import NNSSL, plan_of_file
from hyspark_nnunet.training.probe.scheduled import PROBE_BEFORE_KEY, PROBE_KEY
from hyspark_nnunet.visualisation import progress_picture

CONFIG, CARD, PROGRESS = "config.json", "README.md", "progress.png"


def publish_checkpoint(file: str, folder: str) -> int:
    """Writes weights, description, loss curve and model card; uploading is left to the hub's own command.

    Args:
        file: a checkpoint that ``-pretrained_weights`` takes.
        folder: new, or empty.

    Returns:
        exit status.

    Raises:
        FileNotFoundError, ValueError: see ``convert_checkpoint``; or the folder holds files.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another name, or empty it")
    path = local_file(file)
    weights = read_weights(path)
    sizes = required_sizes(weights.state, file, weights.origin)
    target.mkdir(parents=True, exist_ok=True)
    convert_checkpoint(str(path), str(target / WEIGHTS), SAFETENSORS)
    plan = plan_of_file(weights, sizes) if isinstance(sizes, PlanSizes) else None
    if plan is not None:
        _write_json(target / ADAPTATION_PLAN, plan)
        convert_checkpoint(str(path), str(target / NNSSL_WEIGHTS), NNSSL)
    elif isinstance(sizes, PlanSizes):
        print(f"{ADAPTATION_PLAN} is not written: {file} does not say the patch size and spacing of its training")
    _write_json(target / CONFIG, _config(weights, sizes.network if isinstance(sizes, PlanSizes) else None))
    picture = _picture(weights, target / PROGRESS)
    _write_text(target / CARD, model_card(weights, target.absolute().name, picture))
    print(
        f"{folder} holds {', '.join(sorted(path.name for path in target.iterdir()))}.\n"
        f"Fill in the licence in {target / CARD}, then upload: hf upload ORG/NAME {folder}"
    )
    return 0


def _config(weights: SourceWeights, network: str | None) -> dict[str, Any]:
    """What programs read: the network, the recipe, the data, and how images must be preprocessed."""
    return {
        "library": "hyspark_nnunet",
        "library_version": __version__,
        "weights": WEIGHTS,
        "network": network or own_form(weights.state),
        "trainer": weights.origin,
        "epochs": weights.rest.get("current_epoch"),
        "description": weights.description,
        "recipe": weights.rest.get("recipe"),
        "data": data_of(weights),
        "citations": citations_of(weights),
    }


def _picture(weights: SourceWeights, path: Path) -> str | None:
    """Draws the losses over the epochs, as the training did; None where the file does not have them all."""
    log = weights.rest.get("logging")
    if not isinstance(log, Mapping) or not log.get("train_losses"):
        return None
    if any(name.startswith("densify.") for name in weights.state):
        progress_picture(log, path, log.get(PROBE_KEY), (log.get(PROBE_BEFORE_KEY) or [None])[0])
    else:
        from nnunetv2.training.logging.nnunet_logger import LocalLogger

        logger = LocalLogger()
        if not set(logger.get_checkpoint()) <= set(log):
            return None
        logger.load_checkpoint(dict(log))
        logger.plot_progress_png(str(path.parent))
    return path.name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(plain(content), indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
