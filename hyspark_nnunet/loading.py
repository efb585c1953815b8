"""Networks in Python, with or without pre-trained weights. nnU-Net's folders, plans and variables are not needed.

The functions are available in the top level, as ``hyspark_nnunet.load_network``. Weights are matched and adapted as in
the trainers (``checkpoints.transfer``).
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from torch import nn

from hyspark_nnunet.architectures.plan_arguments import per_axis
from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.architectures.unet import HySparKUNet
from hyspark_nnunet.building_blocks.encoder import HybridEncoder
from hyspark_nnunet.building_blocks.plan_encoder import PlanEncoder
from hyspark_nnunet.checkpoints.network_plan import network_plan
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, required_sizes
from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.checkpoints.sizes import EncoderSizes, decoder_expansions
from hyspark_nnunet.checkpoints.storage import SourceWeights, read_weights
from hyspark_nnunet.checkpoints.transfer import transfer_weights

PerStage = Sequence[int | Sequence[int]]


class LoadedEncoder(nn.Module):
    """The type of what ``load_encoder`` returns, for annotations: a HybridEncoder or PlanEncoder with its report.

    Attributes:
        transfer_report: what was loaded, adapted, left at random and unused.
        unit: input voxels per axis of one voxel of the coarsest feature.
        output_channels: of the features, fine to coarse.
    """

    transfer_report: TransferReport
    unit: tuple[int, ...]
    output_channels: Sequence[int]


class LoadedNetwork(nn.Module):
    """The type of what ``load_network`` returns, for annotations: a network of several classes with its report.

    Attributes:
        transfer_report: what was loaded, adapted, left at random and unused.
        encoder: makes features of an image.
        decoder: makes logits of features.
    """

    transfer_report: TransferReport
    encoder: nn.Module
    decoder: nn.Module


def load_network(
    file: str | Path,
    *,
    num_classes: int | None = None,
    input_channels: int | None = None,
    strides: PerStage | None = None,
    kernel_sizes: PerStage | None = None,
    deep_supervision: bool = False,
    labels: Sequence[str] | None = None,
    channel_names: Sequence[str] | None = None,
    input_channel_mapping: str | None = None,
    vit_num_heads: int | None = None,
) -> LoadedNetwork:
    """Builds a segmentation network and loads the weights of a file into it.

    Sizes come from the file. Arguments override them, and the weights are adapted as in the trainers.

    Args:
        file: anything that ``-pretrained_weights`` takes: a checkpoint of pre-training or fine-tuning, of nnU-Net or of
            nnssl, a file of the HySparK release, ``.pth`` or ``.safetensors``, or ``hf://ORG/NAME[/FILE][@REVISION]``.
        num_classes: number of segmentation heads; None: one per label; without labels, the heads of the file.
        input_channels: channels of the image; None: as in the file.
        strides: of the stages, one number or one per axis; None: as the file says, or 2 after the first stage.
        kernel_sizes: of the stages, one number or one per axis; None: as in the file.
        deep_supervision: return the logits of every level, fine to coarse.
        labels: names of the heads. Heads are loaded if the file has a label of that name.
        channel_names: names of the image's channels. Each is loaded from the file's channel of that name.
        input_channel_mapping: channel of the file for each channel of the image, for example ``T1=CT, T2=CT``.
        vit_num_heads: attention heads of HySparK's network; None: as the file says, or of size 32.

    Returns:
        a HySparKUNet, or nnU-Net's own network if the file holds one, on the CPU, in training mode. It takes images
        (B, input_channels, *spatial), each axis of ``spatial`` a multiple of the product of the strides, and returns
        logits (B, num_classes, *spatial). ``network.transfer_report``, a TransferReport, says what was loaded, adapted,
        left at random and unused.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError, PermissionError: see ``checkpoints.hub.local_file``.
        ValueError: the file is no checkpoint, holds no complete encoder, or does not fit what is asked for.
    """
    weights = read_weights(file)
    source = _source(weights, file, input_channels, strides, kernel_sizes, channel_names, vit_num_heads)
    source_description = dict(weights.description)
    target = source.description
    if num_classes is None and labels is None:
        if not weights.heads:
            raise ValueError(
                f"{file} holds no segmentation heads ({weights.origin}): give the number of classes, "
                "for example num_classes=14"
            )
        num_classes = len(weights.heads[0])
        # without label names, heads keep their order
        source_description.setdefault("labels", [str(number) for number in range(num_classes)])
        labels = source_description["labels"]
    if labels is not None:
        if num_classes not in (None, len(labels)):
            raise ValueError(f"num_classes is {num_classes}, but labels names {len(labels)}: {', '.join(labels)}")
        num_classes = len(labels)
        target |= {"labels": list(labels), "regions": source_description.get("regions", False)}
    assert num_classes is not None  # for the type checker
    network = source.segmentation_network(weights, num_classes, deep_supervision)
    _load(network, weights, str(file), source_description, target, input_channel_mapping, source.notes)
    return cast(LoadedNetwork, network)


def load_encoder(
    file: str | Path,
    *,
    input_channels: int | None = None,
    strides: PerStage | None = None,
    kernel_sizes: PerStage | None = None,
    channel_names: Sequence[str] | None = None,
    input_channel_mapping: str | None = None,
    vit_num_heads: int | None = None,
) -> LoadedEncoder:
    """Loads only the encoder of a file, for its features: classification, detection, retrieval.

    Args:
        file: as in ``load_network``.
        input_channels: as in ``load_network``.
        strides: as in ``load_network``.
        kernel_sizes: as in ``load_network``.
        channel_names: as in ``load_network``.
        input_channel_mapping: as in ``load_network``.
        vit_num_heads: as in ``load_network``.

    Returns:
        a HybridEncoder, or a PlanEncoder of nnU-Net's own network, on the CPU, in training mode. It takes images (B,
        input_channels, *spatial), each axis a multiple of ``encoder.unit``, and returns a list of features (B,
        ``encoder.output_channels[i]``, *spatial_i), fine to coarse: ``spatial`` divided by the product of the first
        i + 1 strides. ``encoder.transfer_report`` is that of ``load_network``; tensors of a decoder are unused.

    Raises:
        FileNotFoundError, ConnectionError, PermissionError, ValueError: see ``load_network``.
    """
    weights = read_weights(file)
    source = _source(weights, file, input_channels, strides, kernel_sizes, channel_names, vit_num_heads)
    encoder = source.encoder(weights)
    whole = nn.Module()
    whole.encoder = encoder  # under the names of a network
    report = _load(
        whole, weights, str(file), weights.description, source.description, input_channel_mapping, source.notes
    )
    encoder.transfer_report = report
    return cast(LoadedEncoder, encoder)


def build_network(
    preset: str = "B",
    *,
    num_classes: int,
    input_channels: int = 1,
    strides: PerStage | None = None,
    kernel_sizes: PerStage | None = None,
    deep_supervision: bool = False,
) -> HySparKUNet:
    """Builds HySparK's segmentation network with random weights.

    Args:
        preset: "S", "B" (HySparK-B of the release) or "L".
        num_classes: segmentation heads.
        input_channels: channels of the image.
        strides: of the 2 to 5 stages, one number or one per axis, the first 1; None: 1, 2, 2, 2, 2. Two numbers per
            axis make a network for 2d images.
        kernel_sizes: of the stages, one number or one per axis; None: 3.
        deep_supervision: return the logits of every level, fine to coarse.

    Returns:
        a network as of ``load_network``, without ``transfer_report``.

    Raises:
        ValueError: there is no such preset, or the arguments do not fit together.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but it must be one of {', '.join(PRESETS)}")
    longest = len(PRESETS[preset].features_per_stage)
    strides = (1, *(2,) * (longest - 1)) if strides is None else strides
    n_stages = len(strides)
    if n_stages > longest:
        raise ValueError(f"strides has {n_stages} entries, but preset {preset} has at most {longest} stages")
    dims = next((len(value) for value in (*strides, *(kernel_sizes or ())) if not isinstance(value, int)), 3)
    return HySparKUNet(
        input_channels=input_channels,
        n_stages=n_stages,
        conv_op=convert_dim_to_conv_op(dims),
        strides=[per_axis(value, dims) for value in strides],
        kernel_sizes=[per_axis(value, dims) for value in kernel_sizes or (3,) * n_stages],
        num_classes=num_classes,
        deep_supervision=deep_supervision,
        **PRESETS[preset].encoder_sizes(n_stages),
    )


class _Source(NamedTuple):
    """The network in a file, with the sizes that were asked for instead of its own.

    Attributes:
        sizes: of the file's network.
        arguments: of the network: of HySparK's encoder, with ``conv_op``; of nnU-Net's networks those that differ from
            the file's plan.
        input_channels: of the network.
        description: of the network, as ``checkpoints.description`` has it.
        notes: for the report.
    """

    sizes: EncoderSizes | PlanSizes
    arguments: dict[str, Any]
    input_channels: int
    description: dict[str, Any]
    notes: list[str]

    def segmentation_network(self, weights: SourceWeights, num_classes: int, deep_supervision: bool) -> nn.Module:
        """The segmentation network with random weights."""
        if isinstance(self.sizes, PlanSizes):
            plan = network_plan(self.sizes, weights.rest, weights.description)
            plan = plan._replace(arguments={**plan.arguments, **self.arguments})
            return plan.build(self.input_channels, num_classes, deep_supervision)
        return HySparKUNet(
            input_channels=self.input_channels,
            num_classes=num_classes,
            deep_supervision=deep_supervision,
            expansion_per_stage_decoder=decoder_expansions(weights.state),
            **self.arguments,
        )

    def encoder(self, weights: SourceWeights) -> HybridEncoder | PlanEncoder:
        """The encoder with random weights."""
        if isinstance(self.sizes, PlanSizes):
            return PlanEncoder(self.segmentation_network(weights, 1, False).encoder)
        arguments = {name: value for name, value in self.arguments.items() if name != "conv_op"}
        return HybridEncoder(input_channels=self.input_channels, **arguments)


def _source(
    weights: SourceWeights,
    file: str | Path,
    input_channels: int | None,
    strides: PerStage | None,
    kernel_sizes: PerStage | None,
    channel_names: Sequence[str] | None,
    vit_num_heads: int | None,
) -> _Source:
    sizes, source_description = required_sizes(weights.state, str(file), weights.origin), weights.description
    if vit_num_heads is not None and isinstance(sizes, PlanSizes):
        raise ValueError(f"vit_num_heads is {vit_num_heads}, but {file} holds a {sizes.network}, which has no ViT")
    dims, notes = len(sizes.kernel_sizes[0]), []
    for name, values in (("strides", strides), ("kernel_sizes", kernel_sizes)):
        if values is not None and len(values) != sizes.n_stages:
            raise ValueError(f"{name} has {len(values)} entries, but the encoder in {file} has {sizes.n_stages} stages")
    if strides is None:
        strides = (isinstance(sizes, PlanSizes) and sizes.strides) or source_description.get("strides")
    if strides is None:
        strides = (1, *(2,) * (sizes.n_stages - 1))
        notes.append(
            f"{file} does not contain its strides: stride 2 is assumed after the first stage. If that is "
            "wrong, give strides."
        )
        warnings.warn(notes[-1], stacklevel=3)
    count = sizes.input_channels if input_channels is None else input_channels
    if channel_names is not None and len(channel_names) != count:
        raise ValueError(f"channel_names has {len(channel_names)} names, but there are {count} input channels")
    names = None if channel_names is None else {str(number): name for number, name in enumerate(channel_names)}
    arguments: dict[str, Any] = {
        "kernel_sizes": [per_axis(value, dims) for value in kernel_sizes or sizes.kernel_sizes],
        "strides": [per_axis(value, dims) for value in strides],
    }
    description = {"input_channels": count, **arguments}
    if isinstance(sizes, EncoderSizes):
        arguments |= {
            "n_stages": sizes.n_stages,
            "features_per_stage": sizes.features_per_stage,
            "conv_op": convert_dim_to_conv_op(dims),
            "n_blocks_per_stage": sizes.n_blocks_per_stage,
            "expansion_per_stage": sizes.expansion_per_stage,
            "vit_n_blocks": sizes.vit_n_blocks,
            "vit_num_heads": vit_num_heads or source_description.get("vit_num_heads"),
        }
    if names is None and count == sizes.input_channels:
        names = source_description.get("channel_names")
    if names is not None:
        description["channel_names"] = names
    return _Source(sizes, arguments, count, description, notes)


def _load(
    network: nn.Module,
    weights: SourceWeights,
    file: str,
    source_description: Mapping[str, Any],
    target_description: Mapping[str, Any],
    input_channel_mapping: str | None,
    notes: Sequence[str],
) -> TransferReport:
    report = transfer_weights(
        network, weights.state, file, source_description, target_description, input_channel_mapping
    )
    report.notes.extend(notes)
    network.transfer_report = report
    return report
