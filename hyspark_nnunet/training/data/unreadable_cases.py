"""Cases whose preprocessed files cannot be read are named, and others are drawn instead."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from hyspark_nnunet.training.data.loader_processes import end_with_parent

# file formats of nnU-Net's datasets, and of the segmentations of a cascade's first stage
SEGMENTATION_ENDINGS = (".b2nd", ".npz", ".npy")
# consecutive errors that a second reading does not confirm; more than these are raised
PASSING_FAULTS = 10


class UnreadableCase(OSError):
    """A case cannot be used: its files are damaged or missing, or its voxels are not finite."""


def read_case(dataset: nnUNetBaseDataset, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads all files of a case completely.

    nnU-Net opens a case and reads the voxels of a patch later: damage may show at any point.

    Returns:
        image and segmentation, (C, *spatial).

    Raises:
        UnreadableCase: one of its files is damaged or missing.
    """
    part = "files"
    arrays: list[Any] = []
    try:
        names = ("image", "segmentation", "segmentation of the first stage")
        for name, array in zip(names, dataset.load_case(case)[:3], strict=True):
            part = name
            arrays.append(array if array is None else np.asarray(array[:]))
    except Exception as error:  # readers fail on a damaged file in any way
        folder = getattr(dataset, "source_folder", "")
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UnreadableCase(
            f"case {case}: its {part} in {folder} cannot be read ({type(error).__name__}: {reason})"
        ) from error
    return arrays[0], arrays[1]


def fault_of(dataset: nnUNetBaseDataset, case: str) -> str | None:
    """What is wrong with the files of a case; None: they can be read completely."""
    try:
        read_case(dataset, case)
    except UnreadableCase as fault:
        return str(fault)
    return None


def finite_case(dataset: nnUNetBaseDataset, case: str) -> tuple[torch.Tensor, np.ndarray]:
    """The image (C, *spatial) of a case, float32, and its segmentation.

    Raises:
        UnreadableCase: its files cannot be read, or it has voxels that are not finite.
    """
    voxels, segmentation = read_case(dataset, case)
    image = torch.from_numpy(voxels.astype(np.float32))
    if not image.isfinite().all():
        raise UnreadableCase(f"case {case} has voxels that are not finite")
    return image, segmentation


def check_first_stage(dataset: nnUNetBaseDataset) -> None:
    """Checks that the first stage of a cascade has segmented every case.

    Raises:
        FileNotFoundError: segmentations are missing; says how many, and names one case.
    """
    folder = dataset.folder_with_segs_from_previous_stage
    if folder is None:
        return
    there = {file.name for file in Path(folder).glob("*")} if Path(folder).is_dir() else set()
    missing = [key for key in dataset.identifiers if not there & {f"{key}{ending}" for ending in SEGMENTATION_ENDINGS}]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the first stage's segmentation of {len(missing)} of {len(dataset.identifiers)} cases, "
            f"such as {missing[0]}: train, or with --val validate, the first stage on every fold that holds one out"
        )


class LastCase:
    """A dataset that remembers which case was loaded last."""

    def __init__(self, dataset: nnUNetBaseDataset) -> None:
        self.dataset = dataset
        self.identifiers = dataset.identifiers
        self.case: str | None = None

    def load_case(self, identifier: str) -> Any:
        self.case = identifier
        return self.dataset.load_case(identifier)


class RedrawingLoader(nnUNetDataLoader):
    """nnU-Net's loader; a batch with an unreadable case is drawn again, and reports the case under "unreadable".

    Takes the arguments of nnUNetDataLoader.
    """

    def __init__(self, data: nnUNetBaseDataset, *args: Any, **kwargs: Any) -> None:
        super().__init__(LastCase(data), *args, **kwargs)
        # the fault of each case
        self.unreadable: dict[str, str] = {}
        # consecutive errors of cases that could be read afterwards
        self.passing = 0

    def generate_train_batch(self) -> dict[str, Any]:
        """A batch of nnU-Net with "unreadable": the faults of the cases that could not be read so far, by case.

        Raises:
            UnreadableCase: no case is left.
        """
        while True:
            drawn_from = np.random.get_state(), torch.get_rng_state()
            try:
                batch = super().generate_train_batch()
            except Exception as error:
                case = self._data.case
                fault = None if case is None else fault_of(self._data.dataset, str(case))
                if fault is None:
                    # it can be read now: a short failure of a network drive, or another error
                    self.passing += 1
                    if not isinstance(error, OSError | RuntimeError) or self.passing > PASSING_FAULTS:
                        raise
                    # the same draw again: other errors repeat, and later draws are unchanged
                    np.random.set_state(drawn_from[0])
                    torch.set_rng_state(drawn_from[1])
                    continue
                # the case may be drawn again: if later draws depended on earlier failures, a resumed training would
                # draw other cases
                self.unreadable[str(case)] = fault
                if len(self.unreadable) == len(set(self.indices)):
                    raise UnreadableCase(
                        f"none of the {len(self.unreadable)} cases can be read; preprocess again. First: {fault}"
                    ) from error
            else:
                # the file system may have recovered
                self.passing = 0
                for case in batch["keys"]:
                    self.unreadable.pop(str(case), None)
                return {**batch, "unreadable": dict(self.unreadable)}

    def set_thread_id(self, thread_id: int) -> None:
        """Called by batchgenerators in each loader process, when it starts."""
        super().set_thread_id(thread_id)
        end_with_parent()
        # batchgenerators seeds only NumPy: all forked processes would augment with the same random numbers of torch
        torch.manual_seed(int(np.random.randint(2**31)))
