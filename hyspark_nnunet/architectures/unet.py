"""The segmentation network, in the shape nnU-Net builds networks from plans."""

from collections.abc import Sequence

from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hyspark_nnunet.architectures.plan_arguments import check_dimensions
from hyspark_nnunet.building_blocks.encoder import HybridEncoder
from hyspark_nnunet.building_blocks.segmentation_decoder import SegmentationDecoder


class HySparKUNet(AbstractDynamicNetworkArchitectures):
    """HySparK's encoder with its segmentation decoder.

    Args:
        input_channels: channels of the image.
        n_stages: number of stages n, at least 2.
        features_per_stage: n channel counts.
        conv_op: torch.nn.Conv3d or Conv2d.
        kernel_sizes: n kernel sizes, per axis, odd.
        strides: n strides, per axis; the first is 1.
        n_blocks_per_stage: n numbers of MedNeXt blocks.
        num_classes: segmentation heads.
        expansion_per_stage: n expansions of the MedNeXt blocks.
        expansion_per_stage_decoder: n - 1 expansions of the decoder's blocks, fine to coarse; None: the encoder's.
        vit_n_blocks: transformer blocks on the last stage.
        vit_num_heads: their heads; None: heads of size 32.
        deep_supervision: logits of every level in training.

    Raises:
        ValueError: arguments that do not fit together, each with its value.
    """

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        num_classes: int,
        expansion_per_stage: Sequence[int],
        expansion_per_stage_decoder: Sequence[int] | None = None,
        vit_n_blocks: int = 3,
        vit_num_heads: int | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.key_to_encoder = "encoder"
        self.key_to_stem = "encoder.stem"
        self.keys_to_in_proj = ("encoder.stem",)
        self.key_to_lpe = None  # positions are fixed and computed for each input size

        check_dimensions(conv_op, kernel_sizes, strides)
        if expansion_per_stage_decoder is None:
            expansion_per_stage_decoder = expansion_per_stage[: n_stages - 1]
        if len(expansion_per_stage_decoder) != n_stages - 1:
            raise ValueError(
                f"expansion_per_stage_decoder has {len(expansion_per_stage_decoder)} entries, but {n_stages} stages "
                f"have {n_stages - 1} decoder levels"
            )
        self.encoder = HybridEncoder(
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
        self.decoder = SegmentationDecoder(
            features_per_stage,
            self.encoder.output_channels,
            strides,
            kernel_sizes,
            expansion_per_stage_decoder,
            num_classes,
            deep_supervision,
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Image (B, input_channels, *spatial) to logits (B, num_classes, *spatial).

        Returns:
            the logits; with deep supervision a list of them, fine to coarse.
        """
        return self.decoder(self.encoder(image))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Voxels times channels written for one image of ``input_size``; nnU-Net's measure of memory."""
        return self.encoder.compute_conv_feature_map_size(input_size) + self.decoder.compute_conv_feature_map_size(
            input_size
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net's hook for initial weights. Each part sets its own when it is built (see ``VisionTransformer``)."""
