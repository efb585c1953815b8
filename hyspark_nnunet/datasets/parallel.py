"""One function over many cases in worker processes; memory does not grow with their number."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def default_processes() -> int:
    """As many as nnU-Net takes: nnUNet_def_n_proc, 8 where it is not set; not more than there are CPUs."""
    return max(1, min(int(os.environ.get("nnUNet_def_n_proc", "8")), os.cpu_count() or 1))


def for_each(
    function: Callable[[Job], Outcome], jobs: Sequence[Job], processes: int, title: str, piece: int | None = None
) -> Iterator[tuple[Job, Outcome]]:
    """Yields every job with its outcome, in the order in which they finish.

    Only a few jobs per process are under way at any time, so outcomes that the caller does not keep are gone.

    Args:
        function: of a module, so that spawned processes find it.
        jobs: its arguments.
        processes: number of workers; 1: no other process is started.
        title: of the progress bar; "": no progress bar.
        piece: jobs that a worker gets at once; None: up to 16, which saves time where a job is short.

    Raises:
        ValueError: fewer than one process.
        RuntimeError: a worker died, usually because memory was full; or the function failed for a job with a ``name``,
            which the message tells.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes are too few: give -np 1 or more")
    with tqdm(total=len(jobs), desc=title, unit="case", mininterval=0.5, disable=not title) as bar:
        if processes == 1 or len(jobs) < 2:
            for job in jobs:
                yield job, _outcome(function, job)
                bar.update()
            return
        if piece is None:
            piece = max(1, min(16, len(jobs) // (processes * 8)))
        pieces = (jobs[start : start + piece] for start in range(0, len(jobs), piece))
        # spawn: a fork of a process with threads (ITK's, torch's) may hang
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_end_with_parent)
        under_way: set[Future[list[tuple[Job, Outcome]]]] = set()
        try:
            for some in pieces:
                under_way.add(executor.submit(_run_piece, function, some))
                if len(under_way) < 3 * processes:
                    continue
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    for pair in future.result():
                        yield pair
                        bar.update()
            while under_way:
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    for pair in future.result():
                        yield pair
                        bar.update()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker process was killed from outside, usually because memory ran out: use a smaller -np than "
                f"{processes}"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _run_piece(function: Callable[[Job], Outcome], jobs: Sequence[Job]) -> list[tuple[Job, Outcome]]:
    return [(job, _outcome(function, job)) for job in jobs]


def _outcome(function: Callable[[Job], Outcome], job: Job) -> Outcome:
    try:
        return function(job)
    except Exception as error:  # those that are expected are outcomes
        name = getattr(job, "name", None)
        if name is None:
            raise
        raise RuntimeError(f"case {name}: {type(error).__name__}: {error}") from error


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: a thread watches. One thread of ITK per worker."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
