"""The validation patches and masks of pre-training: drawn once, the same in every epoch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from hyspark_nnunet.masking import sample_visible

SEED = 2408_05815  # HySparK's arXiv number
DRAWS_PER_BATCH = 10  # at most, if patches have to be drawn again


def fixed_mask(index: int, batch_size: int, grid: Sequence[int], mask_ratio: float, mask_block: int = 1) -> Tensor:
    """The held-out mask number ``index``: the same in every epoch, run and process. BoolTensor (B, 1, *grid), CPU."""
    generator = torch.Generator().manual_seed(SEED + index)
    return sample_visible(batch_size, grid, mask_ratio, generator, block=mask_block)


@contextmanager
def fixed_numpy_seed(seed: int) -> Iterator[None]:
    """Seeds NumPy's global generator, from which nnU-Net's loaders draw; restores its state afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


class HeldOutPatches:
    """Batches of validation patches with fixed masks, in the same order in every epoch.

    They are kept in memory as float32: 50 batches of 2 patches of 128^3 voxels take 0.8 GB.

    Args:
        loader: nnU-Net's loader of the validation cases; patches are drawn once, with a fixed seed.
        n_batches: batches per epoch.
        grid: mask units per axis of a patch.
        mask_ratio: share of hidden units.
        rank: of this process; ranks draw different patches and the same masks.
        pin_memory: for copies to a CUDA device.
        mask_block: units per axis that are hidden together.

    Raises:
        ValueError: nearly all patches have voxels that are not finite; names cases.
    """

    def __init__(
        self,
        loader: nnUNetDataLoader,
        n_batches: int,
        grid: Sequence[int],
        mask_ratio: float,
        rank: int = 0,
        pin_memory: bool = False,
        mask_block: int = 1,
    ) -> None:
        # cases with voxels that are not finite; a single one would make the loss of every epoch NaN
        self.not_finite: set[str] = set()
        with fixed_numpy_seed(SEED + rank):
            drawn = self._draw(loader, n_batches)
        self.batches = []
        for index, batch in enumerate(drawn):
            image = batch["data"].pin_memory() if pin_memory else batch["data"]
            visible = fixed_mask(index, len(image), grid, mask_ratio, mask_block)
            kept = {"data": image, "visible": visible, "keys": list(batch["keys"])}
            self.batches.append({**kept, "unreadable": batch.get("unreadable", {})})
        self._position = 0

    def _draw(self, loader: nnUNetDataLoader, n_batches: int) -> list[dict]:
        """``n_batches`` batches of finite patches; other patches are left out, their cases are in ``not_finite``."""
        drawn, keys, images = [], [], []
        for _ in range(n_batches * DRAWS_PER_BATCH):
            batch = loader.generate_train_batch()
            size = len(batch["data"])
            for key, image in zip(batch["keys"], batch["data"], strict=True):
                if image.isfinite().all():
                    keys.append(key)
                    images.append(image)
                else:
                    self.not_finite.add(str(key))
            if len(images) >= size:
                drawn.append({**batch, "keys": keys[:size], "data": torch.stack(images[:size])})
                keys, images = keys[size:], images[size:]
            if len(drawn) == n_batches:
                return drawn
        raise ValueError(
            "hardly any validation patch is free of NaN and infinite voxels; cases with such voxels: "
            f"{', '.join(sorted(self.not_finite)[:10])}. See: hyspark_nnunet dataset check"
        )

    def restart(self) -> None:
        """Goes back to the first batch."""
        self._position = 0

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        batch = self.batches[self._position % len(self.batches)]
        self._position += 1
        return batch

    def examples(self, count: int) -> list[tuple[str, Tensor, Tensor]]:
        """Up to ``count`` (case, image (C, *spatial), visible (1, *grid)), if possible of different cases."""
        every = [
            (key, image, visible)
            for batch in self.batches
            for key, image, visible in zip(batch["keys"], batch["data"], batch["visible"], strict=True)
        ]
        seen: set[str] = set()
        first: list[tuple[str, Tensor, Tensor]] = []
        again: list[tuple[str, Tensor, Tensor]] = []
        for example in every:
            (again if example[0] in seen else first).append(example)
            seen.add(example[0])
        return (first + again)[:count]
