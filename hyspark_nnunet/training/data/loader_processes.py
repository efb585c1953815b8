"""Starts nnU-Net's loader processes, and ends them with their training."""

import ctypes
import multiprocessing
import signal
import sys
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def augmenter(loader: Any, processes: int, num_cached: int, pin_memory: bool) -> Any:
    """nnU-Net's augmenter for a loader: in this process, or with loader processes, already started.

    Mirrors nnUNetTrainer.get_dataloaders.
    """
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    augmenter = NonDetMultiThreadedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=processes,
        num_cached=num_cached,
        seeds=None,
        pin_memory=pin_memory,
        wait_time=0.002,
    )
    _ = next(augmenter)
    return augmenter


def end_with_parent() -> None:
    """Ends this loader process when the training process ends for any reason.

    nnU-Net's loader processes would outlive a training that is killed. Works only on Linux.
    """
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
