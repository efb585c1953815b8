"""The command ``hyspark_nnunet checkpoint probe``: linear-probe Dice of encoders."""

from collections.abc import Iterator, Sequence

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.commands.dataset_network import DatasetNetwork, network_of_dataset
from hyspark_nnunet.training.data.held_out import SEED
from hyspark_nnunet.training.probe.cases import preprocessed_cases
from hyspark_nnunet.training.probe.linear_probe import LinearProbe, ProbeScore, divided

RANDOM = "random weights"


def probe_checkpoints(
    files: Sequence[str],
    dataset: str,
    configuration: str,
    plans: str,
    n_cases: int,
    device: str = "cpu",
) -> int:
    """Prints the linear-probe Dice of random weights and of each file.

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
    torch.manual_seed(SEED)
    target = network_of_dataset(dataset, configuration, plans, "HySparKFinetuneTrainer", device)
    probe = probe_of(target, configuration, max(1, n_cases))
    width = max(map(len, [RANDOM, *files]))
    for name, score in scores(target, probe, files, torch.device(device)):
        by_label = "  ".join(f"label {label} {dice:.4f}" for label, dice in score.items())
        print(f"{name:<{width}}  {score.mean:.4f}  {by_label}", flush=True)
    return 0


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


def scores(
    target: DatasetNetwork, probe: LinearProbe, files: Sequence[str], device: torch.device
) -> Iterator[tuple[str, ProbeScore]]:
    """Probe scores of the network's random weights, then of each file."""
    random_weights = {name: tensor.clone() for name, tensor in target.network.state_dict().items()}
    network = target.network.eval()
    yield RANDOM, probe.score(network.encoder, device)
    for file in files:
        weights = read_weights(file)
        network.load_state_dict(random_weights)
        mapping = target.recipe.input_channel_mapping
        transfer_weights(network, weights.state, file, weights.description, target.description, mapping)
        yield file, probe.score(network.encoder, device)
