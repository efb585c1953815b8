"""Which tensor of a file belongs to which tensor of a network, where the two may differ in their number of stages.

Stages count from the full resolution. Of two networks of n and m < n stages, the first m - 1 stages are built alike;
stage m - 1 is the bottleneck of one (a block, no convolution to wider channels, the ViT) and a stage as any other of
the other. Decoder levels, heads, projections and mask tokens run coarse to fine and so belong to other numbers.
"""

import re

from hyspark_nnunet.checkpoints.sizes import EncoderSizes

# tensors that are loaded together or not at all
GROUPS = (
    r"encoder\.stages\.\d+\.(blocks\.\d+|widen)\.",
    r"encoder\.vit\.(blocks\.\d+|norm)\.",
    r"densify\.(projections|mask_tokens)\.\d+",
    r"decoder\.levels\.\d+\.",
    r"decoder\.project\.",
    r"decoder\.seg_layers\.\d+\.",
)


def group_of(name: str) -> str:
    """The part of a network that makes sense as a whole: a block, a decoder level; the name itself elsewhere."""
    for pattern in GROUPS:
        if match := re.match(pattern, name):
            return match[0]
    return name


def n_common_stages(source: EncoderSizes, target: EncoderSizes) -> int:
    """How many stages both networks build alike, and so must have of equal width."""
    if source.n_stages == target.n_stages:
        return target.n_stages
    return min(source.n_stages, target.n_stages) - 1


def source_name(name: str, source: EncoderSizes, target: EncoderSizes) -> str | None:
    """The file's name for a tensor of the network; None where the file has no such place.

    Args:
        name: of a tensor of the network.
        source: sizes of the file's encoder.
        target: sizes of the network's encoder.
    """
    deeper = source.n_stages - target.n_stages
    if match := re.match(r"encoder\.stages\.(\d+)\.", name):
        stage = int(match[1])
        if deeper and stage == target.n_stages - 1 and source.features_per_stage[-1] == target.features_per_stage[-1]:
            stage = source.n_stages - 1  # the bottleneck, with the ViT it was trained with
        return f"encoder.stages.{stage}.{name[match.end() :]}"
    if match := re.match(
        r"(decoder\.levels|decoder\.seg_layers|densify\.projections|densify\.mask_tokens)\.(\d+)", name
    ):
        index = int(match[2]) + deeper
        return f"{match[1]}.{index}{name[match.end() :]}" if index >= 0 else None
    return name


def is_required(name: str, source: EncoderSizes, target: EncoderSizes) -> bool:
    """Whether a tensor that has another width in the file is an error rather than left out."""
    if not name.startswith("encoder."):
        return False
    if source.n_stages == target.n_stages:
        return True
    common = n_common_stages(source, target)
    if match := re.match(r"encoder\.stages\.(\d+)\.(blocks|widen)", name):
        # the last common stage leads to a stage that may differ
        return int(match[1]) < common and not (match[2] == "widen" and int(match[1]) == common - 1)
    return not name.startswith("encoder.vit.")
