"""Cases whose preprocessed files cannot be read: named, and replaced by another draw."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from hyspark_nnunet.training.data.loader_processes import end_with_parent

# of nnU-Net's data sets, in which it keeps the segmentations of a cascade's first stage, too
SEGMENTATION_ENDINGS = (".b2nd", ".npz", ".npy")
# so many errors in a row that a second reading does not show are tried again
PASSING_FAULTS = 10


class UnreadableCase(OSError):
    """A case's files are damaged or missing."""


def fault_of(dataset: nnUNetBaseDataset, case: str) -> str | None:
    """What is wrong with the files of a case; None where they can be read to the end.

    nnU-Net opens a case and reads the voxels of a patch later: damage shows anywhere on the way.
    """
    part = "files"
    try:
        names = ("image", "segmentation", "segmentation of the first stage")
        arrays = dict(zip(names, dataset.load_case(case)[:3], strict=True))
        for name, array in arrays.items():
            part = name
            if array is not None:
                np.asarray(array[:])
    except Exception as error:  # whatever the reader of a damaged file stumbles over
        folder = getattr(dataset, "source_folder", "")
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"case {case}: its {part} in {folder} cannot be read ({type(error).__name__}: {reason})"
    return None


def check_first_stage(dataset: nnUNetBaseDataset) -> None:
    """A cascade's second stage needs the first stage's segmentation of every case.

    Raises:
        FileNotFoundError: some are missing; names how many, and one.
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
    """A data set that knows which case was loaded last."""

    def __init__(self, dataset: nnUNetBaseDataset) -> None:
        self.dataset = dataset
        self.identifiers = dataset.identifiers
        self.case: str | None = None

    def load_case(self, identifier: str) -> Any:
        self.case = identifier
        return self.dataset.load_case(identifier)


class RedrawingLoader(nnUNetDataLoader):
    """nnU-Net's loader; a batch with an unreadable case is drawn again, and says so under "unreadable".

    Takes the arguments of nnUNetDataLoader.
    """

    def __init__(self, data: nnUNetBaseDataset, *args: Any, **kwargs: Any) -> None:
        super().__init__(LastCase(data), *args, **kwargs)
        # by case, what is wrong with it
        self.unreadable: dict[str, str] = {}
        # errors in a row of cases that could be read afterwards
        self.passing = 0

    def generate_train_batch(self) -> dict[str, Any]:
        """A batch of nnU-Net with "unreadable": what is wrong with cases that could not be read so far, by case.

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
                    # readable again: a network drive's hiccup, or not the files' fault at all
                    self.passing += 1
                    if not isinstance(error, OSError | RuntimeError) or self.passing > PASSING_FAULTS:
                        raise
                    # the same draw: what is no hiccup fails again, and what comes later is drawn as ever
                    np.random.set_state(drawn_from[0])
                    torch.set_rng_state(drawn_from[1])
                    continue
                # the case stays in the draw: which cases are drawn next must not depend on what failed before,
                # or a training that is continued would draw others
                self.unreadable[str(case)] = fault
                if len(self.unreadable) == len(set(self.indices)):
                    raise UnreadableCase(
                        f"none of the {len(self.unreadable)} cases can be read; preprocess again. First: {fault}"
                    ) from error
            else:
                # a fault of the file system may pass
                self.passing = 0
                for case in batch["keys"]:
                    self.unreadable.pop(str(case), None)
                return {**batch, "unreadable": dict(self.unreadable)}

    def set_thread_id(self, thread_id: int) -> None:
        """Called by batchgenerators in each loader process, when it starts."""
        super().set_thread_id(thread_id)
        end_with_parent()
        # batchgenerators seeds NumPy alone: forked processes would all augment with the same numbers of torch
        torch.manual_seed(int(np.random.randint(2**31)))
