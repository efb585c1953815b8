"""Which tensor of a file corresponds to a tensor of the network, if their numbers of stages may differ.

Stage 0 has the full resolution. Two of nnU-Net's networks, of n and m < n stages, have the first m stages in common.
Two of HySparK's have the first m - 1: stage m - 1 is the bottleneck of the smaller network (one block, no widening
convolution, the ViT), but an ordinary stage of the larger one. Decoder levels, heads, projections and mask tokens are
numbered from coarse to fine, so their numbers shift by n - m.
"""

import re

from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes
from hyspark_nnunet.checkpoints.sizes import EncoderSizes

Sizes = EncoderSizes | PlanSizes

# tensors that are loaded together or not at all
GROUPS = (
    r"encoder\.stages\.\d+\.(blocks\.\d+|widen|0\.convs\.\d+)\.",
    r"encoder\.vit\.(blocks\.\d+|norm)\.",
    r"densify\.(projections|mask_tokens)\.\d+",
    r"decoder\.(levels|stages)\.\d+\.",
    r"decoder\.project\.",
    r"decoder\.seg_layers\.\d+\.",
)


def group_of(name: str) -> str:
    """The prefix of the tensors that a tensor is loaded with, such as its block's; its own name if there are none."""
    name = re.sub(r"decoder\.transpconvs\.(\d+)\.", r"decoder.stages.\1.", name)
    for pattern in GROUPS:
        if match := re.match(pattern, name):
            return match[0]
    return name


def n_common_stages(source: Sizes, target: Sizes) -> int:
    """Number of stages that both networks have in common, and whose widths must be equal."""
    if source.n_stages == target.n_stages:
        return target.n_stages
    common = min(source.n_stages, target.n_stages)
    return common if isinstance(target, PlanSizes) else common - 1


def source_name(name: str, source: Sizes, target: Sizes) -> str | None:
    """Name in the file of a tensor of the network; None if the file has no corresponding one.

    Args:
        name: of a tensor of the network.
        source: sizes of the file's encoder.
        target: sizes of the network's encoder.
    """
    deeper = source.n_stages - target.n_stages
    if match := re.match(r"encoder\.stages\.(\d+)\.", name):
        stage = int(match[1])
        is_bottleneck = isinstance(target, EncoderSizes) and stage == target.n_stages - 1
        if deeper and is_bottleneck and source.features_per_stage[-1] == target.features_per_stage[-1]:
            stage = source.n_stages - 1  # the bottleneck, with the ViT it was trained with
        return f"encoder.stages.{stage}.{name[match.end() :]}"
    if match := re.match(
        r"(decoder\.(?:levels|stages|transpconvs|seg_layers)|densify\.(?:projections|mask_tokens))\.(\d+)", name
    ):
        index = int(match[2]) + deeper
        return f"{match[1]}.{index}{name[match.end() :]}" if index >= 0 else None
    return name


def is_required(name: str, source: Sizes, target: Sizes) -> bool:
    """Whether another width in the file is an error; tensors that are not required are then left at random."""
    if not name.startswith("encoder."):
        return False
    if source.n_stages == target.n_stages:
        return True
    common = n_common_stages(source, target)
    if isinstance(target, PlanSizes):
        match = re.match(r"encoder\.stages\.(\d+)\.", name)
        return match is None or int(match[1]) < common
    if match := re.match(r"encoder\.stages\.(\d+)\.(blocks|widen)", name):
        # the last common stage widens to the first stage that may differ
        return int(match[1]) < common and not (match[2] == "widen" and int(match[1]) == common - 1)
    return not name.startswith("encoder.vit.")


def level_of_head(name: str, target: Sizes) -> str:
    """The prefix of the tensors of the decoder level that a head reads."""
    return f"decoder.{'stages' if isinstance(target, PlanSizes) else 'levels'}.{name.split('.')[2]}."
