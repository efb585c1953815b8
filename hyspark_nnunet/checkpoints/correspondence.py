"""Which tensor of a file corresponds to a tensor of the network, if their numbers of stages may differ.

Stage 0 has the full resolution. Two networks of n and m < n stages have the first m - 1 stages in common. Stage m - 1
is the bottleneck of the smaller network (one block, no widening convolution, the ViT), but an ordinary stage of the
larger one. Decoder levels, heads, projections and mask tokens are numbered from coarse to fine, so their numbers shift
by n - m.
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
    """The prefix of the tensors that a tensor is loaded with, such as its block's; its own name if there are none."""
    for pattern in GROUPS:
        if match := re.match(pattern, name):
            return match[0]
    return name


def n_common_stages(source: EncoderSizes, target: EncoderSizes) -> int:
    """Number of stages that both networks have in common, and whose widths must be equal."""
    if source.n_stages == target.n_stages:
        return target.n_stages
    return min(source.n_stages, target.n_stages) - 1


def source_name(name: str, source: EncoderSizes, target: EncoderSizes) -> str | None:
    """Name in the file of a tensor of the network; None if the file has no corresponding one.

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
    """Whether another width in the file is an error; tensors that are not required are then left at random."""
    if not name.startswith("encoder."):
        return False
    if source.n_stages == target.n_stages:
        return True
    common = n_common_stages(source, target)
    if match := re.match(r"encoder\.stages\.(\d+)\.(blocks|widen)", name):
        # the last common stage widens to the first stage that may differ
        return int(match[1]) < common and not (match[2] == "widen" and int(match[1]) == common - 1)
    return not name.startswith("encoder.vit.")
