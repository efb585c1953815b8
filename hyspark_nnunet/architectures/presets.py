"""The sizes that a preset's name stands for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Sizes of the networks; a network of n stages takes the first n entries of each list.

    Args:
        features_per_stage: channels of the stages.
        n_blocks_per_stage: MedNeXt blocks of the stages.
        expansion_per_stage: expansions of the MedNeXt blocks.
        vit_n_blocks: transformer blocks.
        finest_width: channels of the reconstruction decoder at full resolution.
    """

    features_per_stage: tuple[int, ...]
    n_blocks_per_stage: tuple[int, ...]
    expansion_per_stage: tuple[int, ...]
    vit_n_blocks: int
    finest_width: int

    def encoder_sizes(self, n_stages: int) -> dict[str, Any]:
        """Sizes of an encoder of n stages, the last stage with one block and expansion 2."""
        return {
            "features_per_stage": self.features_per_stage[:n_stages],
            "n_blocks_per_stage": (*self.n_blocks_per_stage[: n_stages - 1], 1),
            "expansion_per_stage": (*self.expansion_per_stage[: n_stages - 1], 2),
            "vit_n_blocks": self.vit_n_blocks,
        }


PRESETS: Mapping[str, Preset] = {
    "S": Preset((16, 32, 64, 128, 192), (1, 1, 2, 2, 1), (2, 3, 3, 3, 2), 2, 24),
    # HySparK-B of the release
    "B": Preset((32, 64, 128, 256, 384), (1, 1, 3, 3, 1), (2, 4, 4, 4, 2), 3, 48),
    "L": Preset((48, 96, 192, 384, 576), (1, 2, 4, 4, 1), (2, 4, 4, 4, 2), 6, 48),
}


def decoder_width(n_stages: int, preset: str, width: int | None) -> int:
    """Width of the reconstruction decoder: as given, or the preset's finest width doubled per level."""
    return PRESETS[preset].finest_width * 2 ** (n_stages - 1) if width is None else width
