"""Masked autoencoders: the networks of pre-training."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hyspark_nnunet.architectures.plan_arguments import check_dimensions
from hyspark_nnunet.building_blocks.densify import Densify
from hyspark_nnunet.building_blocks.encoder import HybridEncoder
from hyspark_nnunet.building_blocks.layouts import Feature
from hyspark_nnunet.building_blocks.plan_encoder import PlanEncoder
from hyspark_nnunet.building_blocks.reconstruction_decoder import ReconstructionDecoder

FINEST_WIDTH = 48


class MaskedAutoencoder(nn.Module):
    """The encoder sees the visible mask units; the decoder rebuilds the image from its densified features.

    Args:
        encoder: HybridEncoder or PlanEncoder.
        decoder: takes dense skips, coarse to fine.
        densify: makes these skips of the encoder's coarsest features.

    Attributes:
        trainer_of_prediction: the trainer whose network segments, for the message.
    """

    trainer_of_prediction: ClassVar[str]

    def __init__(self, encoder: HybridEncoder | PlanEncoder, decoder: nn.Module, densify: Densify) -> None:
        super().__init__()
        self.encoder, self.decoder, self.densify = encoder, decoder, densify

    def forward(self, image: Tensor, visible: Tensor | None = None, num_visible: int | None = None) -> Tensor:
        """Rebuilds an image from its visible mask units.

        Args:
            image: (B, input_channels, *spatial).
            visible: BoolTensor (B, 1, *grid), True = kept, equally many per sample.
            num_visible: visible units of each sample, where known: then nothing waits for the device.

        Returns:
            reconstruction (B, input_channels, *spatial), each mask unit standardised (see ``reconstruction_loss``).

        Raises:
            ValueError: there is no mask, the image is no whole number of mask units, or the mask does not fit it.
        """
        if visible is None:  # nnU-Net's prediction calls a network with the image alone
            raise ValueError(
                f"{type(self).__name__} needs a mask: it reconstructs images and does not segment. To predict, "
                f"fine-tune it first with -tr {self.trainer_of_prediction} -pretrained_weights"
            )
        features = self.encode(image, visible, num_visible)[::-1]
        return self.decoder(self.densify(features[: len(self.densify.mask_tokens)]))

    def encode(self, image: Tensor, visible: Tensor, num_visible: int | None) -> list[Feature]:
        """The encoder's features of the visible units, fine to coarse; ``compile_encoder`` compiles it."""
        return self.encoder.features(image, visible, num_visible)

    def compile_encoder(self, backend: str = "inductor") -> None:
        """Compiles what the forward pass does in the encoder, and nothing else.

        Args:
            backend: of torch.compile.
        """
        self.encode = torch.compile(self.encode, backend=backend)  # type: ignore[method-assign]


class HySparKMaskedAutoencoder(MaskedAutoencoder):
    """HySparK's masked autoencoder: the encoder sees the visible mask units, the decoder rebuilds the image.

    Source: HySparK (arXiv 2408.05815), section 2. The arguments are plan-shaped, as in dynamic-network-architectures.

    Args:
        input_channels: channels of the image and of the reconstruction.
        n_stages: number of stages n, at least 2.
        features_per_stage: n channel counts.
        conv_op: torch.nn.Conv3d or Conv2d.
        kernel_sizes: n kernel sizes, per axis, odd.
        strides: n strides, per axis; the first is 1.
        n_blocks_per_stage: n numbers of MedNeXt blocks.
        expansion_per_stage: n expansions of the MedNeXt blocks.
        vit_n_blocks: transformer blocks on the last stage.
        vit_num_heads: their heads; None: heads of size 32.
        decoder_width: channels of the decoder at the coarsest level; None: 48 * 2^(n-1), so that the finest has 48.

    Raises:
        ValueError: arguments that do not fit together, each with its value.
    """

    trainer_of_prediction = "HySparKFinetuneTrainer"

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        expansion_per_stage: Sequence[int],
        vit_n_blocks: int = 3,
        vit_num_heads: int | None = None,
        decoder_width: int | None = None,
    ) -> None:
        check_dimensions(conv_op, kernel_sizes, strides)
        encoder = HybridEncoder(
            input_channels,
            n_stages,
            features_per_stage,
            kernel_sizes,
            strides,
            n_blocks_per_stage,
            expansion_per_stage,
            vit_n_blocks,
            vit_num_heads,
        )
        if decoder_width is None:
            decoder_width = FINEST_WIDTH * 2 ** (n_stages - 1)
        decoder = ReconstructionDecoder(decoder_width, input_channels, strides, kernel_sizes)
        # without the finest feature: the decoder reaches full resolution without a skip
        super().__init__(encoder, decoder, reconstruction_skips(encoder, decoder_width))


def reconstruction_skips(encoder: HybridEncoder | PlanEncoder, width: int) -> Densify:
    """The skips of a ``ReconstructionDecoder``: of all features but the finest, with its widths."""
    channels, kernel_sizes = encoder.output_channels[:0:-1], encoder.kernel_sizes[:0:-1]
    return Densify(channels, [width // 2**k for k in range(len(channels))], kernel_sizes)
