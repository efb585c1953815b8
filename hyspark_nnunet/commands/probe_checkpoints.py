"""The command ``hyspark_nnunet checkpoint probe``: linear-probe Dice of encoders."""

import copy
from collections.abc import Sequence

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from hyspark_nnunet.checkpoints.plan_sizes import finetuning_trainer, network_sizes
from hyspark_nnunet.checkpoints.storage import SourceWeights, read_weights
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.commands.dataset_network import DatasetNetwork, network_of_dataset
from hyspark_nnunet.training.data.held_out import SEED
from hyspark_nnunet.training.probe.cases import preprocessed_cases
from hyspark_nnunet.training.probe.linear_probe import LinearProbe, ProbeScore, divided

HYSPARK, SPARK = "HySparKFinetuneTrainer", "SparKFinetuneTrainer"
RANDOM = {HYSPARK: "random weights", SPARK: "random weights, SparK"}


def probe_checkpoints(
    files: Sequence[str],
    dataset: str,
    configuration: str,
    plans: str,
    n_cases: int,
    device: str = "cpu",
) -> int:
    """Prints the linear-probe Dice of random weights and of each file.

    A file of HySparK or of SparK is loaded into the network that its trainer builds for the plans.

    Args:
        files: checkpoints for ``-pretrained_weights``.
        dataset: number or name of a labelled, preprocessed dataset.
        configuration: of its plans.
        plans: name of its plans.
        n_cases: cases to fit the linear head to; the same number of others is scored.
        device: where the encoders run.

    Returns:
        exit status.

    Raises:
        FileNotFoundError, ValueError: see ``network_of_dataset``, ``read_weights``, ``transfer_weights`` and
            ``probe_of``.
    """
    run = torch.device(device)
    width = max(map(len, [*RANDOM.values(), *files]))
    targets: dict[str, DatasetNetwork] = {}
    probe: LinearProbe | None = None

    def drawn_for(trainer: str) -> tuple[DatasetNetwork, LinearProbe]:
        """A trainer's network, whose random weights are scored first; all networks see the same patches."""
        nonlocal probe
        if trainer not in targets:
            torch.manual_seed(SEED)
            targets[trainer] = network_of_dataset(dataset, configuration, plans, trainer, device)
            probe = probe or probe_of(targets[trainer], configuration, max(1, n_cases))
            _print_score(RANDOM[trainer], width, probe.score(targets[trainer].network.eval().encoder, run))
        assert probe is not None  # for the type checker
        return targets[trainer], probe

    if not files:
        drawn_for(HYSPARK)
    for file in files:
        weights = read_weights(file)
        target, drawn = drawn_for(finetuning_trainer(network_sizes(weights.state)))
        _print_score(file, width, drawn.score(_encoder_of(file, weights, target), run))
    return 0


def _print_score(name: str, width: int, score: ProbeScore) -> None:
    by_label = "  ".join(f"label {label} {dice:.4f}" for label, dice in score.items())
    print(f"{name:<{width}}  {score.mean:.4f}  {by_label}", flush=True)


def _encoder_of(file: str, weights: SourceWeights, target: DatasetNetwork) -> nn.Module:
    """The encoder with a file's weights; what the file does not fill is random."""
    network = copy.deepcopy(target.network)
    mapping = target.recipe.input_channel_mapping
    transfer_weights(network, weights.state, file, weights.description, target.description, mapping)
    return network.encoder


def probe_of(target: DatasetNetwork, configuration: str, n_cases: int) -> LinearProbe:
    """The linear probe on the cases of a dataset.

    Raises:
        FileNotFoundError: the dataset is not preprocessed.
        ValueError: it has no labels or only one case.
    """
    manager = PlansManager(target.plans)
    settings = manager.get_configuration(configuration)
    cases = preprocessed_cases(manager, configuration, target.dataset_json)
    fit, score = divided(cases.training, cases.held_out, n_cases)
    if not score:
        raise ValueError(f"{manager.dataset_name} has {len(fit)} preprocessed cases, but the probe needs at least 2")
    patch_size = settings.patch_size
    to_fit, to_score = ([cases.loader(key, patch_size) for key in part] for part in (fit, score))
    # the mirroring of nnU-Net's trainers
    axes = range(len(patch_size))
    return LinearProbe.drawn_from(to_fit, to_score, patch_size, cases.label_manager.ignore_label, axes)
