"""The sizes of a network, from the shapes in its state dict."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class EncoderSizes(NamedTuple):
    """Sizes of an encoder.

    Attributes:
        input_channels: of the stem.
        features_per_stage: channels of the stages.
        n_blocks_per_stage: MedNeXt blocks of the stages.
        expansion_per_stage: of the first block of each stage; 0 for a stage without blocks.
        kernel_sizes: of the stages, per axis.
        vit_width: of a token.
        vit_n_blocks: transformer blocks.
    """

    input_channels: int
    features_per_stage: list[int]
    n_blocks_per_stage: list[int]
    expansion_per_stage: list[int]
    kernel_sizes: list[tuple[int, ...]]
    vit_width: int
    vit_n_blocks: int

    @property
    def stem(self) -> str:
        """Name of the weight that reads the image."""
        return "encoder.stem.weight"

    @property
    def n_stages(self) -> int:
        """Number of stages."""
        return len(self.features_per_stage)


def encoder_sizes(state: Mapping[str, Tensor]) -> EncoderSizes | None:
    """The sizes of an encoder under our names; None if some of its tensors are missing."""
    stem = state.get("encoder.stem.weight")
    if stem is None or "encoder.vit.norm.weight" not in state:
        return None
    n_stages = 1 + highest(state, r"encoder\.stages\.(\d+)\.")
    features, blocks, expansions, kernels = [len(stem)], [], [], []
    for stage in range(n_stages):
        block = f"encoder.stages.{stage}.blocks.0"
        widen = state.get(f"encoder.stages.{stage}.widen.weight")
        first, expand = state.get(f"{block}.conv.weight"), state.get(f"{block}.expand.weight")
        shaped = widen if first is None else first
        if shaped is None or (widen is None and stage < n_stages - 1):
            return None
        kernels.append(tuple(shaped.shape[2:]))
        blocks.append(1 + highest(state, rf"encoder\.stages\.{stage}\.blocks\.(\d+)\."))
        expansions.append(0 if expand is None else expand.shape[0] // expand.shape[1])
        if widen is not None:
            features.append(widen.shape[0])
    vit_width = len(state["encoder.vit.norm.weight"])
    n_transformer_blocks = 1 + highest(state, r"encoder\.vit\.blocks\.(\d+)\.")
    return EncoderSizes(stem.shape[1], features, blocks, expansions, kernels, vit_width, n_transformer_blocks)


def decoder_expansions(state: Mapping[str, Tensor]) -> list[int] | None:
    """Expansions of the segmentation decoder's blocks on the skips, fine to coarse; None if there is none."""
    levels = 1 + highest(state, r"decoder\.levels\.(\d+)\.skip_block\.")
    expand = [state.get(f"decoder.levels.{level}.skip_block.expand.weight") for level in reversed(range(levels))]
    found = [weight.shape[0] // weight.shape[1] for weight in expand if weight is not None]
    return found if found and len(found) == len(expand) else None


def highest(state: Mapping[str, Tensor], pattern: str) -> int:
    """The highest number in the pattern's group; -1 if no name matches."""
    return max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def as_lists(value: Any) -> Any:
    """Tuples as lists: older checkpoints hold tuples, JSON gives lists."""
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value
