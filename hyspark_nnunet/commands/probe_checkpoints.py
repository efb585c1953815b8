"""The command ``hyspark_nnunet checkpoint probe``: what a linear head makes of encoders, without fine-tuning them."""

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
    """Prints the Dice of the probe for random weights and for each file, as soon as it is known.

    Args:
        files: checkpoints that ``-pretrained_weights`` takes.
        dataset: number or name of a labelled, preprocessed data set.
        configuration: of its plans.
        plans: name of them.
        n_cases: to fit to; as many others score.
        device: where the encoders run.

    Returns:
        exit status.

    Raises:
        FileNotFoundError, ValueError: of ``network_of_dataset``, ``read_weights`` and ``transfer_weights``; or there is
            nothing to score on.
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
    """The probe on the cases of a data set.

    Raises:
        FileNotFoundError: it is not preprocessed.
        ValueError: it has no labels, or a single case.
    """
    manager = PlansManager(target.plans)
    settings = manager.get_configuration(configuration)
    cases = preprocessed_cases(manager, configuration, target.dataset_json)
    fit, score = divided(cases.training, cases.held_out, n_cases)
    if not score:
        raise ValueError(f"{manager.dataset_name} has {len(fit)} preprocessed cases: the probe needs two or more")
    patch_size = settings.patch_size
    to_fit, to_score = ([cases.loader(key, patch_size) for key in part] for part in (fit, score))
    # as nnU-Net's trainers mirror
    axes = range(len(patch_size))
    return LinearProbe.drawn_from(to_fit, to_score, patch_size, cases.label_manager.ignore_label, axes)


def scores(
    target: DatasetNetwork, probe: LinearProbe, files: Sequence[str], device: torch.device
) -> Iterator[tuple[str, ProbeScore]]:
    """The probe of the network as it is, with its random weights, and with those of each file."""
    random_weights = {name: tensor.clone() for name, tensor in target.network.state_dict().items()}
    network = target.network.eval()
    yield RANDOM, probe.score(network.encoder, device)
    for file in files:
        weights = read_weights(file)
        network.load_state_dict(random_weights)
        mapping = target.recipe.input_channel_mapping
        transfer_weights(network, weights.state, file, weights.description, target.description, mapping)
        yield file, probe.score(network.encoder, device)
