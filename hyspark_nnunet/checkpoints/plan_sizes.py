"""The sizes of nnU-Net's own networks, from the shapes in a state dict."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hyspark_nnunet.checkpoints.sizes import EncoderSizes, as_lists, encoder_sizes, highest

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
CLASSES = "dynamic_network_architectures.architectures.unet"
BLOCKS = "dynamic_network_architectures.building_blocks.residual"
# the name of nnssl for the one residual network of its models
RESENC_L = "ResEncL"
RESENC_L_SIZES: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_conv_per_stage_decoder": [1] * 5,
}


class PlanSizes(NamedTuple):
    """Sizes of a PlainConvUNet or ResidualEncoderUNet.

    Attributes:
        network: name of the class.
        input_channels: of the first convolution.
        stem_channels: of the stem of a ResidualEncoderUNet; None for a PlainConvUNet.
        features_per_stage: channels of the stages.
        n_blocks_per_stage: convolutions or residual blocks of the stages.
        kernel_sizes: of the stages, per axis.
        bottleneck_channels: of the stages, if the residual blocks are BottleneckD.
        conv_bias: convolutions have biases.
        norm: "InstanceNorm", "BatchNorm" or None.
        strides: of the stages, per axis, from the transposed convolutions of the decoder; None without that decoder.
        n_conv_per_stage_decoder: convolutions of the decoder's stages, coarse to fine; None without that decoder.
    """

    network: str
    input_channels: int
    stem_channels: int | None
    features_per_stage: list[int]
    n_blocks_per_stage: list[int]
    kernel_sizes: list[tuple[int, ...]]
    bottleneck_channels: list[int] | None
    conv_bias: bool
    norm: str | None
    strides: list[tuple[int, ...]] | None
    n_conv_per_stage_decoder: list[int] | None

    @property
    def stem(self) -> str:
        """Name of the weight that reads the image."""
        return f"encoder.{'stages.0.0' if self.network == PLAIN else 'stem'}.convs.0.conv.weight"

    @property
    def n_stages(self) -> int:
        """Number of stages."""
        return len(self.features_per_stage)

    @property
    def class_name(self) -> str:
        """The class as a plan names it."""
        return f"{CLASSES}.{self.network}"

    def arguments(self, strides: list[list[int]] | None = None) -> dict[str, Any]:
        """Arguments of the network as a plan has them, with nnU-Net's norm, nonlinearity and no dropout.

        Args:
            strides: of the stages; None: those of the decoder, or 2 after the first stage.
        """
        dims = len(self.kernel_sizes[0])
        if strides is None:
            strides = [list(s) for s in self.strides or [(1,) * dims, *[(2,) * dims] * (self.n_stages - 1)]]
        blocks = "n_conv_per_stage" if self.network == PLAIN else "n_blocks_per_stage"
        arguments = {
            "n_stages": self.n_stages,
            "features_per_stage": self.features_per_stage,
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [list(kernel) for kernel in self.kernel_sizes],
            "strides": strides,
            blocks: self.n_blocks_per_stage,
            "n_conv_per_stage_decoder": self.n_conv_per_stage_decoder or [1] * (self.n_stages - 1),
            "conv_bias": self.conv_bias,
            "norm_op": self.norm and f"torch.nn.modules.{self.norm.lower()}.{self.norm}{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        if self.bottleneck_channels is not None:
            arguments |= {"block": f"{BLOCKS}.BottleneckD", "bottleneck_channels": self.bottleneck_channels}
        if self.stem_channels not in (None, self.features_per_stage[0]):
            arguments["stem_channels"] = self.stem_channels
        return arguments


def requiring_import(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments of a network that name a class."""
    return [name for name in ("conv_op", "norm_op", "dropout_op", "nonlin", "block") if name in arguments]


def is_resenc_l(class_name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a network is the one that nnssl calls ResEncL."""
    if class_name.rpartition(".")[2] != RESIDUAL or "block" in arguments or "stem_channels" in arguments:
        return False
    return all(as_lists(arguments.get(name)) == value for name, value in RESENC_L_SIZES.items())


def resenc_l_arguments() -> dict[str, Any]:
    """Arguments of the network that nnssl calls ResEncL."""
    sizes = {name: value for name, value in RESENC_L_SIZES.items() if name != "n_stages"}
    sizes |= {"conv_bias": True, "norm": "InstanceNorm", "bottleneck_channels": None}
    return PlanSizes(RESIDUAL, 1, 32, **sizes).arguments()


def plan_sizes(state: Mapping[str, Tensor]) -> PlanSizes | None:
    """The sizes of one of nnU-Net's networks; None if tensors of its encoder are missing.

    Args:
        state: each tensor under its first name, see ``state_dicts.stored_once``.
    """
    residual = "encoder.stem.convs.0.conv.weight" in state
    stem = state.get("encoder.stem.convs.0.conv.weight" if residual else "encoder.stages.0.0.convs.0.conv.weight")
    if stem is None:
        return None
    features, blocks, kernels, bottlenecks = [], [], [], []
    for stage in range(1 + highest(state, r"encoder\.stages\.(\d+)\.")):
        part = f"encoder.stages.{stage}.{'blocks' if residual else '0.convs'}"
        count = 1 + highest(state, rf"{re.escape(part)}\.(\d+)\.")
        names = ["conv1.", "conv2.", "conv3."] if residual else [""]
        weights = [state.get(f"{part}.0.{name}conv.weight") for name in names]
        shapes = [tuple(weight.shape) for weight in weights if weight is not None]
        if not shapes:
            return None
        features.append(shapes[-1][0])
        blocks.append(count)
        # of a BottleneckD, the second convolution has the plan's kernel
        kernels.append(shapes[len(shapes) // 2][2:])
        if len(shapes) == 3:
            bottlenecks.append(shapes[0][0])
    strides, decoder = _decoder(state, len(features), len(kernels[0]))
    where = "encoder.stem.convs.0" if residual else "encoder.stages.0.0.convs.0"
    norm = "BatchNorm" if f"{where}.norm.running_mean" in state else "InstanceNorm"
    return PlanSizes(
        RESIDUAL if residual else PLAIN,
        stem.shape[1],
        len(stem) if residual else None,
        features,
        blocks,
        kernels,
        bottlenecks or None,
        f"{where}.conv.bias" in state,
        norm if f"{where}.norm.weight" in state else None,
        strides,
        decoder,
    )


def network_sizes(state: Mapping[str, Tensor]) -> EncoderSizes | PlanSizes | None:
    """The sizes of HySparK's encoder or of one of nnU-Net's networks; None if some of its tensors are missing."""
    return encoder_sizes(state) or plan_sizes(state)


def finetuning_trainer(sizes: EncoderSizes | PlanSizes | None) -> str:
    """Name of the trainer that fine-tunes a network of these sizes; None: HySparK's."""
    return "SparKFinetuneTrainer" if isinstance(sizes, PlanSizes) else "HySparKFinetuneTrainer"


def required_sizes(state: Mapping[str, Tensor], file: str, origin: str) -> EncoderSizes | PlanSizes:
    """``network_sizes`` of a file that must hold a complete encoder.

    Args:
        state: weights under our names.
        file: their file, for the message.
        origin: what the file is, in words.

    Raises:
        ValueError: tensors of the encoder are missing.
    """
    if (sizes := network_sizes(state)) is None:
        raise ValueError(
            f"{file} holds no complete encoder of HySparK or of nnU-Net's networks ({origin}): it has "
            f"{', '.join(list(state)[:3])}. Give a checkpoint of our trainers, of nnU-Net or of nnssl, or a file of "
            "the HySparK release."
        )
    return sizes


def _decoder(state: Mapping[str, Tensor], n_stages: int, dims: int) -> tuple[list | None, list | None]:
    """Strides and number of convolutions; the kernel of a transposed convolution is its stride."""
    up = [state.get(f"decoder.transpconvs.{level}.weight") for level in range(n_stages - 1)]
    if any(weight is None for weight in up):
        return None, None
    strides = [(1,) * dims, *(tuple(weight.shape[2:]) for weight in reversed(up) if weight is not None)]
    counts = [1 + highest(state, rf"decoder\.stages\.{level}\.convs\.(\d+)\.") for level in range(n_stages - 1)]
    return strides, counts
