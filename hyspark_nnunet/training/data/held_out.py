"""The validation patches and masks of pre-training: drawn once, the same in every epoch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyspark_nnunet.masking import sample_visible

if TYPE_CHECKING:
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

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


class HeldOutPatch(NamedTuple):
    """A patch: its case, image (C, *spatial), visible (1, *grid), and which voxels count (1, *spatial), None: all."""

    case: str
    image: Tensor
    visible: Tensor
    counted: Tensor | None


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
        ignore_label: of the dataset: its voxels do not count; None: all count, and batches have no "counted".

    Raises:
        ValueError: nearly all patches have voxels that are not finite; names cases.
    """

    def __init__(
        self,
        loader: "nnUNetDataLoader",
        n_batches: int,
        grid: Sequence[int],
        mask_ratio: float,
        rank: int = 0,
        pin_memory: bool = False,
        mask_block: int = 1,
        ignore_label: int | None = None,
    ) -> None:
        # cases with voxels that are not finite; a single one would make the loss of every epoch NaN
        self.not_finite: set[str] = set()
        self._ignore_label = ignore_label
        with fixed_numpy_seed(SEED + rank):
            drawn = self._draw(loader, n_batches)
        self.batches = []
        for index, batch in enumerate(drawn):
            image = batch["data"].pin_memory() if pin_memory else batch["data"]
            visible = fixed_mask(index, len(image), grid, mask_ratio, mask_block)
            kept = {"data": image, "visible": visible, "keys": list(batch["keys"])}
            if "counted" in batch:
                kept["counted"] = batch["counted"].pin_memory() if pin_memory else batch["counted"]
            self.batches.append({**kept, "unreadable": batch.get("unreadable", {})})
        self._position = 0

    def _draw(self, loader: "nnUNetDataLoader", n_batches: int) -> list[dict]:
        """``n_batches`` batches of finite patches; other patches are left out, their cases are in ``not_finite``."""
        drawn, keys, images, counted = [], [], [], []
        for _ in range(n_batches * DRAWS_PER_BATCH):
            batch = loader.generate_train_batch()
            size = len(batch["data"])
            for index, (key, image) in enumerate(zip(batch["keys"], batch["data"], strict=True)):
                if image.isfinite().all():
                    keys.append(key)
                    images.append(image)
                    if self._ignore_label is not None:
                        counted.append(batch["target"][index][:1] != self._ignore_label)
                else:
                    self.not_finite.add(str(key))
            if len(images) >= size:
                complete = {**batch, "keys": keys[:size], "data": torch.stack(images[:size])}
                if counted:
                    complete["counted"] = torch.stack(counted[:size])
                drawn.append(complete)
                keys, images, counted = keys[size:], images[size:], counted[size:]
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

    def examples(self, count: int) -> list[HeldOutPatch]:
        """Up to ``count`` patches, if possible of different cases."""
        every = [
            HeldOutPatch(
                key, batch["data"][i], batch["visible"][i], batch["counted"][i] if "counted" in batch else None
            )
            for batch in self.batches
            for i, key in enumerate(batch["keys"])
        ]
        seen: set[str] = set()
        first: list[HeldOutPatch] = []
        again: list[HeldOutPatch] = []
        for example in every:
            (again if example.case in seen else first).append(example)
            seen.add(example.case)
        return (first + again)[:count]
