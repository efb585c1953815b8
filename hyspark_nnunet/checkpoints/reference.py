"""Converting state dicts of the public HySparK release to our names and back.

The release has three forms: the encoder alone (``embeddings.*``, ``mae.*``), the masked autoencoder
(``sparse_encoder.*``, ``dense_decoder.*``, ``densify_projs.*``, ``mask_tokens.*``) and the segmentation network
(``embeddings.*``, ``mae.*``, ``decoder.*``). Its ``layerN``, ``expendN`` and ``decoderN`` count from 1, fine to coarse;
its ``dec``, ``fuse``, ``densify_projs`` and ``mask_tokens`` run coarse to fine, as ours do.

Values do not change: tensors are renamed, and 1^3 convolutions are reshaped to linear layers. Our networks have no
place for the unused parameters of the release (``fuse.0``, the last of ``densify_projs`` and of ``mask_tokens``, the
transformer's ``mask_token``) and for its stored positions. These are dropped, and written with neutral values when our
weights are converted to the release.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hyspark_nnunet.building_blocks.transformer import sincos_positions

Form = Literal["encoder", "masked_autoencoder", "segmentation"]

# our block's part <- the release's, for everything built like a MedNeXt block
MEDNEXT_PARTS = {"conv1": "conv", "norm": "norm", "conv2": "expand", "conv3": "project", "res_conv": "residual"}
FUSION_PARTS = {"conv1": "conv1", "conv2": "conv2", "conv3": "shortcut"}


class Conversion(NamedTuple):
    """A converted state dict, and the names that were dropped."""

    state: dict[str, Tensor]
    dropped: list[str]


def reference_form(state: Mapping[str, Tensor]) -> Form | None:
    """The form of the release that a state dict has; None: it is not of the release."""
    if "sparse_encoder.embeddings.stem.weight" in state:
        return "masked_autoencoder"
    if "embeddings.stem.weight" in state:
        return "segmentation" if any(name.startswith("decoder.") for name in state) else "encoder"
    return None


def own_form(state: Mapping[str, Tensor]) -> Form | None:
    """Which of our networks a state dict belongs to; None: it is not one of ours."""
    if "encoder.stem.weight" not in state:
        return None
    if any(name.startswith("densify.") for name in state):
        return "masked_autoencoder"
    return "segmentation" if any(name.startswith("decoder.") for name in state) else "encoder"


def from_reference(state: Mapping[str, Tensor]) -> Conversion:
    """Converts a state dict of the release to our names.

    Args:
        state: one of the three forms.

    Returns:
        our names, and the release's names that were dropped. The release has no heads for deep supervision, so the
        result has none either.

    Raises:
        ValueError: the state dict is not of the release, or has unknown names.
    """
    form = reference_form(state)
    if form is None:
        raise ValueError(f"not a state dict of the HySparK release, because it has no stem: it holds {_first(state)}")
    n_stages = _count(state, r"(?:sparse_encoder\.)?embeddings\.layer(\d+)\.")
    converted, dropped, unknown = {}, [], []
    for name, tensor in state.items():
        ours = _our_name(name, n_stages)
        if ours is None:
            unknown.append(name)
        elif ours == "":
            dropped.append(name)
        else:
            converted[ours] = _flatten(ours, tensor)
    if unknown:
        raise ValueError(f"{len(unknown)} names are unknown in the HySparK release: {_first(unknown)}")
    return Conversion(converted, dropped)


def to_reference(state: Mapping[str, Tensor], grid: Sequence[int] = (6, 6, 6)) -> Conversion:
    """Converts a state dict of ours to the complete state dict of the release.

    Args:
        state: of our encoder (names with ``encoder.``), masked autoencoder or segmentation network.
        grid: mask units per axis for the stored positions; (6, 6, 6) is the release's 96^3 patch.

    Returns:
        the release's names, and our names that were dropped: all heads of deep supervision except the finest.

    Raises:
        ValueError: the state dict is not one of ours, or has unknown names.
    """
    form = own_form(state)
    if form is None:
        raise ValueError(f"not a state dict of a HySparK network, because it has no stem: it holds {_first(state)}")
    n_stages = _count(state, r"encoder\.stages\.(\d+)\.") + 1
    dims = state["encoder.stem.weight"].ndim - 2
    converted, dropped, unknown = {}, [], []
    for name, tensor in state.items():
        theirs = _their_name(name, n_stages, form)
        if theirs is None:
            unknown.append(name)
        elif theirs == "":
            dropped.append(name)
        else:
            converted[theirs] = _unflatten(theirs, tensor, dims)
    if unknown:
        raise ValueError(f"{len(unknown)} names are unknown in our networks: {_first(unknown)}")
    converted.update(_unused_parameters(state, form, n_stages, grid))
    return Conversion(converted, dropped)


def _our_name(name: str, n_stages: int) -> str | None:
    """Our name of a tensor of the release; "" if ours has none, None if the name is unknown."""
    last = n_stages - 1

    def level(number: str) -> int:  # decoder1 is the finest
        return last - int(number)

    unused = rf"mae\.pos_embed|mae\.mask_token|dense_decoder\.fuse\.0\..+|densify_projs\.{last}\..+|mask_tokens\.{last}"
    name = name.removeprefix("sparse_encoder.")
    if re.fullmatch(unused, name):
        return ""
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"embeddings\.stem\.(.+)", lambda m: f"encoder.stem.{m[1]}"),
        (
            r"embeddings\.layer(\d+)\.(\d+)\.(conv1|norm|conv2|conv3)\.(.+)",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks.{m[2]}.{MEDNEXT_PARTS[m[3]]}.{m[4]}",
        ),
        (r"embeddings\.expend(\d+)\.(.+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.widen.{m[2]}"),
        (r"mae\.((?:blocks|norm)\..+)", lambda m: f"encoder.vit.{m[1]}"),
        (r"densify_projs\.(\d+)\.(.+)", lambda m: f"densify.projections.{m[1]}.{m[2]}"),
        (r"mask_tokens\.(\d+)", lambda m: f"densify.mask_tokens.{m[1]}"),
        (r"dense_decoder\.dec\.(\d+)\.up_sample\.(.+)", lambda m: f"decoder.levels.{m[1]}.upsample.{m[2]}"),
        (r"dense_decoder\.dec\.(\d+)\.conv\.(.+)", lambda m: f"decoder.levels.{m[1]}.refine.{m[2]}"),
        (r"dense_decoder\.fuse\.(\d+)\.conv\.(.+)", lambda m: f"decoder.levels.{m[1]}.fuse.{m[2]}"),
        (r"dense_decoder\.proj\.(.+)", lambda m: f"decoder.project.{m[1]}"),
        (
            r"decoder\.decoder(\d+)\.layer\.(conv1|norm|conv2|conv3)\.(.+)",
            lambda m: f"decoder.levels.{level(m[1])}.skip_block.{MEDNEXT_PARTS[m[2]]}.{m[3]}",
        ),
        (
            r"decoder\.decoder(\d+)\.up_block\.(conv1|norm|conv2|conv3|res_conv)\.(.+)",
            lambda m: f"decoder.levels.{level(m[1])}.up_block.{MEDNEXT_PARTS[m[2]]}.{m[3]}",
        ),
        (
            r"decoder\.decoder(\d+)\.fusion\.(conv1|conv2|conv3)\.(.+)",
            lambda m: f"decoder.levels.{level(m[1])}.fusion.{FUSION_PARTS[m[2]]}.{m[3]}",
        ),
        (r"decoder\.out\.conv\.(.+)", lambda m: f"decoder.seg_layers.{last - 1}.{m[1]}"),
    ]
    return _apply(rules, name)


def _their_name(name: str, n_stages: int, form: Form) -> str | None:
    """The release's name of a tensor of ours; "" if the release has none, None if the name is unknown."""
    last = n_stages - 1
    mednext = {ours: theirs for theirs, ours in MEDNEXT_PARTS.items()}
    fusion = {ours: theirs for theirs, ours in FUSION_PARTS.items()}
    encoder = "sparse_encoder." if form == "masked_autoencoder" else ""
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"encoder\.stem\.(.+)", lambda m: f"{encoder}embeddings.stem.{m[1]}"),
        (
            r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv|norm|expand|project)\.(.+)",
            lambda m: f"{encoder}embeddings.layer{int(m[1]) + 1}.{m[2]}.{mednext[m[3]]}.{m[4]}",
        ),
        (r"encoder\.stages\.(\d+)\.widen\.(.+)", lambda m: f"{encoder}embeddings.expend{int(m[1]) + 1}.{m[2]}"),
        (r"encoder\.vit\.(.+)", lambda m: f"{encoder}mae.{m[1]}"),
        (r"densify\.projections\.(\d+)\.(.+)", lambda m: f"densify_projs.{m[1]}.{m[2]}"),
        (r"densify\.mask_tokens\.(\d+)", lambda m: f"mask_tokens.{m[1]}"),
        (r"decoder\.levels\.(\d+)\.upsample\.(.+)", lambda m: f"dense_decoder.dec.{m[1]}.up_sample.{m[2]}"),
        (r"decoder\.levels\.(\d+)\.refine\.(.+)", lambda m: f"dense_decoder.dec.{m[1]}.conv.{m[2]}"),
        (r"decoder\.levels\.(\d+)\.fuse\.(.+)", lambda m: f"dense_decoder.fuse.{m[1]}.conv.{m[2]}"),
        (r"decoder\.project\.(.+)", lambda m: f"dense_decoder.proj.{m[1]}"),
        (
            r"decoder\.levels\.(\d+)\.skip_block\.(conv|norm|expand|project)\.(.+)",
            lambda m: f"decoder.decoder{last - int(m[1])}.layer.{mednext[m[2]]}.{m[3]}",
        ),
        (
            r"decoder\.levels\.(\d+)\.up_block\.(conv|norm|expand|project|residual)\.(.+)",
            lambda m: f"decoder.decoder{last - int(m[1])}.up_block.{mednext[m[2]]}.{m[3]}",
        ),
        (
            r"decoder\.levels\.(\d+)\.fusion\.(conv1|conv2|shortcut)\.(.+)",
            lambda m: f"decoder.decoder{last - int(m[1])}.fusion.{fusion[m[2]]}.{m[3]}",
        ),
        (
            r"decoder\.seg_layers\.(\d+)\.(.+)",
            lambda m: f"decoder.out.conv.{m[2]}" if int(m[1]) == last - 1 else "",
        ),
    ]
    return _apply(rules, name)


def _apply(rules: Sequence[tuple[str, Callable[[re.Match[str]], str]]], name: str) -> str | None:
    for pattern, rename in rules:
        if match := re.fullmatch(pattern, name):
            return rename(match)
    return None


def _unused_parameters(
    state: Mapping[str, Tensor], form: Form, n_stages: int, grid: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors that only the release has: recomputed positions, and unused parameters at neutral values."""
    norm = state["encoder.vit.norm.weight"]
    embedding, dims = len(norm), len(grid)
    encoder = "sparse_encoder." if form == "masked_autoencoder" else ""
    unused = {f"{encoder}mae.pos_embed": sincos_positions(grid, embedding, norm.device).to(norm.dtype)[None]}
    if form != "segmentation":
        unused[f"{encoder}mae.mask_token"] = norm.new_zeros(1, 1, embedding)
    if form == "masked_autoencoder":
        last = n_stages - 1
        width = state["decoder.levels.0.upsample.weight"].shape[0]
        kernel = state[f"encoder.stages.{last}.blocks.0.conv.weight"].shape[2:]
        finest = state["encoder.stages.0.widen.weight"]
        for index, channels in (("0", 2 * width), ("3", width)):
            unused[f"dense_decoder.fuse.0.conv.{index}.weight"] = norm.new_zeros(width, channels, *kernel)
            unused[f"dense_decoder.fuse.0.conv.{index}.bias"] = norm.new_zeros(width)
        for index in ("1", "4"):
            neutral = torch.nn.BatchNorm3d(width).to(norm).state_dict()
            unused.update({f"dense_decoder.fuse.0.conv.{index}.{k}": v for k, v in neutral.items()})
        unused[f"densify_projs.{last}.weight"] = norm.new_zeros(width // 2**last, finest.shape[0], *finest.shape[2:])
        unused[f"densify_projs.{last}.bias"] = norm.new_zeros(width // 2**last)
        unused[f"mask_tokens.{last}"] = norm.new_zeros(1, finest.shape[0], *[1] * dims)
    return unused


def _is_linear(our_name: str) -> bool:
    return re.search(r"\.(expand|project)\.weight$", our_name) is not None and our_name != "decoder.project.weight"


def _flatten(our_name: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if _is_linear(our_name) else tensor


def _unflatten(their_name: str, tensor: Tensor, dims: int) -> Tensor:
    is_pointwise = re.search(r"\.(conv2|conv3)\.weight$", their_name) is not None and tensor.ndim == 2
    return tensor.view(*tensor.shape, *[1] * dims) if is_pointwise else tensor


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _first(names: Mapping[str, Tensor] | Sequence[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."
