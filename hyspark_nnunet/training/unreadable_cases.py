"""Cases whose preprocessed files cannot be read: named, and replaced by another draw."""

from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from hyspark_nnunet.training.loader_processes import end_with_parent


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

    def generate_train_batch(self) -> dict[str, Any]:
        """A batch of nnU-Net with "unreadable": what is wrong with cases found unreadable so far, by case.

        Raises:
            UnreadableCase: no case is left.
        """
        while True:
            try:
                batch = super().generate_train_batch()
            except Exception as error:
                case = self._data.case
                fault = None if case is None else fault_of(self._data.dataset, str(case))
                if fault is None:  # not the files' fault
                    raise
                # the case stays in the draw: which cases are drawn next must not depend on what failed before,
                # or a training that is continued would draw others
                self.unreadable[str(case)] = fault
                if len(self.unreadable) == len(set(self.indices)):
                    raise UnreadableCase(
                        f"none of the {len(self.unreadable)} cases can be read; preprocess again. First: {fault}"
                    ) from error
            else:
                return {**batch, "unreadable": dict(self.unreadable)}

    def set_thread_id(self, thread_id: int) -> None:
        """Called by batchgenerators in each loader process, when it starts."""
        super().set_thread_id(thread_id)
        end_with_parent()
        # batchgenerators seeds NumPy alone: forked processes would all augment with the same numbers of torch
        torch.manual_seed(int(np.random.randint(2**31)))
