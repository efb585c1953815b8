"""What the step benchmark computes, and in which ways."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from benchmarks.dense_baseline import DenseBaseline
from benchmarks.dense_spark import DenseSparK
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.masked_autoencoder import MaskedAutoencoder
from hyspark_nnunet.architectures.presets import PRESETS, decoder_width
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible


@dataclass(frozen=True)
class Shape:
    """A patch with the strides and kernels that nnU-Net plans for it."""

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return "x".join(map(str, self.patch))


def isotropic(patch: tuple[int, ...], n_stages: int = 5) -> Shape:
    """Kernels of 3, strides of 2."""
    return Shape(patch, ((1,) * 3,) + ((2,) * 3,) * (n_stages - 1), ((3,) * 3,) * n_stages)


CUBE = isotropic((96, 96, 96))
LARGE = isotropic((128, 128, 128))
HIPPOCAMPUS = isotropic((40, 56, 40), n_stages=4)
ANISOTROPIC = Shape(
    (28, 192, 192),
    ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
)


@dataclass(frozen=True)
class Variant:
    """How a step is computed.

    Attributes:
        name: in tables.
        dense: the dense baseline.
        channels_last: the dense baseline in torch's channels-last memory format.
        unmasked: nnU-Net's own forward pass, without a mask (SparK only).
        merge: the decoder's merged upsampling.
        recompute: activation checkpointing.
        keep_memory: glibc keeps freed memory (CPU).
        compiled: by torch.compile.
        backend: of torch.compile.
        autocast: "training": as pre-training has it on the device; "none"; or the name of a type, such as "float16".
        static_shapes: nothing in the dense baseline is gathered by the mask, as torch.compile wants it (HySparK).
    """

    name: str
    dense: bool = False
    channels_last: bool = False
    unmasked: bool = False
    merge: bool = False
    recompute: str = "none"
    keep_memory: bool = False
    compiled: bool = False
    backend: str = "inductor"
    autocast: str = "training"
    static_shapes: bool = False


DENSE = Variant("dense baseline", dense=True)
DENSE_KEPT = Variant("dense baseline, freed memory kept", dense=True, keep_memory=True)
LADDER = [
    DENSE,
    Variant("channels-last", dense=True, channels_last=True),
    Variant("visible blocks"),
    Variant("+ merged upsampling", merge=True),
    Variant("+ light checkpointing", merge=True, recompute="light"),
]
# SparK: everything with the same allocator
NNUNET_KEPT = [
    Variant("dense baseline", dense=True, keep_memory=True),
    Variant("dense baseline, channels-last", dense=True, channels_last=True, keep_memory=True),
    Variant("nnU-Net without a mask", unmasked=True, keep_memory=True),
]
BLOCKS_KEPT = [
    Variant("visible blocks", keep_memory=True),
    Variant("visible blocks, light checkpointing", recompute="light", keep_memory=True),
]
ON_CPU = Variant("+ freed memory kept", merge=True, recompute="light", keep_memory=True)
FULL = Variant("full instead of light checkpointing", merge=True, recompute="full", keep_memory=True)
ON_CUDA = Variant("+ torch.compile", merge=True, recompute="light", compiled=True)


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """What is computed."""

    shape: Shape
    mask_ratio: float = 0.75
    batch_size: int = 1
    encoder_only: bool = False
    device: str = "cpu"

    def network(self) -> MaskedAutoencoder:
        """The network for the shape, always with the same weights."""
        torch.manual_seed(0)
        return self._network().to(self.device)

    def network_without_weights(self) -> MaskedAutoencoder:
        """The network on the device "meta", for the memory estimate."""
        with torch.device("meta"):
            return self._network()

    @abstractmethod
    def _network(self) -> MaskedAutoencoder: ...

    @abstractmethod
    def dense(self, network: Any, variant: Variant) -> DenseBaseline | DenseSparK:
        """The dense baseline with the network's weights."""

    def batch(self, network: MaskedAutoencoder) -> tuple[Tensor, Tensor, int]:
        """Image, mask and number of visible units per sample."""
        generator = torch.Generator().manual_seed(1)
        grid = mask_grid(self.shape.patch, network.encoder.unit)
        visible = sample_visible(self.batch_size, grid, self.mask_ratio, generator)
        image = torch.randn(self.batch_size, 1, *self.shape.patch, generator=generator)
        return image.to(self.device), visible.to(self.device), num_visible_units(grid, self.mask_ratio)


@dataclass(frozen=True, kw_only=True)
class HySparKCase(Case):
    """HySparK's network with the sizes of a preset."""

    preset: str = "B"

    def encoder_arguments(self) -> dict[str, Any]:
        """What networks of pre-training and of fine-tuning share."""
        n = len(self.shape.strides)
        return {
            "input_channels": 1,
            "n_stages": n,
            "conv_op": nn.Conv3d,
            "kernel_sizes": self.shape.kernels,
            "strides": self.shape.strides,
            **PRESETS[self.preset].encoder_sizes(n),
        }

    def _network(self) -> MaskedAutoencoder:
        width = decoder_width(len(self.shape.strides), self.preset, None)
        return HySparKMaskedAutoencoder(**self.encoder_arguments(), decoder_width=width)

    def dense(self, network: Any, variant: Variant) -> DenseBaseline:
        count = num_visible_units(mask_grid(self.shape.patch, network.encoder.unit), self.mask_ratio)
        return DenseBaseline(network, num_visible=count if variant.static_shapes else None).to(self.device)


@dataclass(frozen=True, kw_only=True)
class SparKCase(Case):
    """nnU-Net's own network: by default with the sizes that its planner gives ResEnc-M."""

    residual: bool = True
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)

    def segmentation_network(self, deep_supervision: bool = False) -> nn.Module:
        """The network as nnU-Net builds it, for two classes."""
        n = len(self.shape.strides)
        blocks = {"n_blocks_per_stage": self.blocks[:n]} if self.residual else {"n_conv_per_stage": (2,) * n}
        return (ResidualEncoderUNet if self.residual else PlainConvUNet)(
            input_channels=1,
            n_stages=n,
            features_per_stage=self.features[:n],
            conv_op=nn.Conv3d,
            kernel_sizes=self.shape.kernels,
            strides=self.shape.strides,
            num_classes=2,
            n_conv_per_stage_decoder=(1 if self.residual else 2,) * (n - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
            **blocks,
        )

    def _network(self) -> MaskedAutoencoder:
        network = self.segmentation_network()
        network.apply(InitWeights_He(1e-2))
        return SparKMaskedAutoencoder(network, input_channels=1)

    def dense(self, network: Any, variant: Variant) -> DenseSparK:
        return DenseSparK(network)
