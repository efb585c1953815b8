"""The labelled cases of the linear probe: of the dataset that is trained on, or of another one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from hyspark_nnunet.datasets.preprocessed import check_holds_cases, holds_cases, plans_in, preprocessed_folder
from hyspark_nnunet.training.data.unreadable_cases import UnreadableCase, finite_case
from hyspark_nnunet.training.probe.linear_probe import has_labels, with_room


@dataclass(frozen=True)
class LabelledCases:
    """Preprocessed cases with labels.

    Attributes:
        folder: of the preprocessed data.
        dataset_class: nnU-Net's class for the format of these files.
        label_manager: of their labels.
        training: identifiers of the cases to fit to.
        held_out: identifiers of the cases to score; the same as ``training`` if no case is held out.
    """

    folder: str
    dataset_class: type
    label_manager: LabelManager
    training: Sequence[str]
    held_out: Sequence[str]

    def loader(self, key: str, patch_size: Sequence[int]) -> nnUNetDataLoader:
        """Loads patches of one case around its labels, larger than this size by ``with_room``."""
        case, size = self.dataset_class(self.folder, [key]), with_room(patch_size)
        return nnUNetDataLoader(case, 1, size, size, self.label_manager, oversample_foreground_percent=1)

    def fault_of(self, key: str) -> str | None:
        """Why a case cannot be used; None: it can."""
        try:
            finite_case(self.dataset_class(self.folder, [key]), key)
        except UnreadableCase as fault:
            return str(fault)
        return None


def cases_to_probe(
    own: LabelledCases,
    probe_dataset: str | None,
    plans_manager: PlansManager,
    configuration_name: str,
    dataset_json: dict[str, Any],
) -> LabelledCases | None:
    """The cases that a pre-training is probed on; None: its dataset has no labels.

    Args:
        own: cases of the dataset that is trained on.
        probe_dataset: of the recipe: another dataset, or None.
        plans_manager: of the dataset that is trained on.
        configuration_name: of the training.
        dataset_json: of the dataset that is trained on.

    Raises:
        FileNotFoundError: see ``cases_of_dataset``.
        ValueError: see ``cases_of_dataset``.
    """
    if probe_dataset is not None:
        return cases_of_dataset(probe_dataset, plans_manager, configuration_name, dataset_json)
    return own if has_labels(dataset_json) else None


def cases_of_dataset(
    dataset: str, plans_manager: PlansManager, configuration_name: str, dataset_json: dict[str, Any]
) -> LabelledCases:
    """All cases of another dataset that was preprocessed like the one that is trained on.

    Args:
        dataset: its number or name.
        plans_manager: of the dataset that is trained on.
        configuration_name: of the training.
        dataset_json: of the dataset that is trained on.

    Raises:
        FileNotFoundError: there is no such dataset, or it is not preprocessed like ours.
        ValueError: it has no labels.
    """
    folder = preprocessed_folder(dataset)
    other_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if not has_labels(other_json):
        raise ValueError(
            f"probe_dataset is {dataset}, but {folder.name} has no labels of its own: name a labelled dataset, or none"
        )
    ours = plans_manager.get_configuration(configuration_name)
    channels = determine_num_input_channels(plans_manager, ours, dataset_json)
    for _, content in plans_in(folder):
        plans = PlansManager(content)
        if configuration_name not in plans.available_configurations:
            continue
        theirs = plans.get_configuration(configuration_name)
        same = (
            plans.transpose_forward == plans_manager.transpose_forward
            and determine_num_input_channels(plans, theirs, other_json) == channels
            and _describes_same_voxels(ours, theirs)
        )
        if same and holds_cases(folder / theirs.data_identifier):
            return _cases_in(folder / theirs.data_identifier, plans.get_label_manager(other_json))
    number = convert_dataset_name_to_id(plans_manager.dataset_name)
    raise FileNotFoundError(
        f"probe_dataset is {dataset}, but {folder} holds no preprocessed data for {configuration_name} with the "
        f"spacing {ours.spacing}, the normalisation {ours.normalization_schemes}, the order of axes and the {channels} "
        f"channels of {plans_manager.dataset_name}. Plan one with the topology of the other (hyspark_nnunet "
        f"plan_and_preprocess -d {number} --like {dataset}), or set probe_dataset to none"
    )


def preprocessed_cases(
    plans_manager: PlansManager, configuration_name: str, dataset_json: dict[str, Any]
) -> LabelledCases:
    """All preprocessed cases of a dataset.

    Args:
        plans_manager: of the dataset.
        configuration_name: of the preprocessed data.
        dataset_json: of the dataset.

    Raises:
        FileNotFoundError: it is not preprocessed for this configuration.
        ValueError: it has no labels.
    """
    name = plans_manager.dataset_name
    if not has_labels(dataset_json):
        raise ValueError(f"{name} has no labels of its own, which the probe needs: name a labelled dataset")
    data = preprocessed_folder(name) / plans_manager.get_configuration(configuration_name).data_identifier
    check_holds_cases(data, plans_manager, configuration_name)
    return _cases_in(data, plans_manager.get_label_manager(dataset_json))


def _cases_in(data: Path, label_manager: LabelManager) -> LabelledCases:
    dataset_class = infer_dataset_class(str(data))
    keys = sorted(dataset_class.get_identifiers(str(data)))
    return LabelledCases(str(data), dataset_class, label_manager, keys, keys)


def _describes_same_voxels(ours: ConfigurationManager, theirs: ConfigurationManager) -> bool:
    return (
        len(ours.spacing) == len(theirs.spacing)
        and np.allclose(ours.spacing, theirs.spacing, rtol=1e-3)
        and ours.normalization_schemes == theirs.normalization_schemes
    )
