"""The network of pre-training around an encoder that nnU-Net built from a plan."""

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from hyspark_nnunet.architectures.masked_autoencoder import MaskedAutoencoder, reconstruction_skips
from hyspark_nnunet.architectures.shared_tensors import store_tensors_once
from hyspark_nnunet.building_blocks.densify import Densify
from hyspark_nnunet.building_blocks.plan_decoder import PlanDecoder
from hyspark_nnunet.building_blocks.plan_encoder import PlanEncoder
from hyspark_nnunet.building_blocks.reconstruction_decoder import ReconstructionDecoder

DECODERS = PLAN_DECODER, RECONSTRUCTION_DECODER = ("unet", "reconstruction")


class SparKMaskedAutoencoder(MaskedAutoencoder):
    """A masked autoencoder with the encoder, and by default the decoder, of nnU-Net's own network.

    Parameters keep nnU-Net's names: ``encoder.stages...``, ``decoder.stages...``, ``decoder.transpconvs...``. Its state
    dictionary holds each tensor once. Source: SparK (arXiv 2301.03580).

    Args:
        network: as nnU-Net builds it from a plan; its modules are used, not copied.
        input_channels: channels of the image and of the reconstruction.
        decoder: "unet", the network's own decoder on skips of all stages, with a head for the image; or
            "reconstruction", HySparK's.
        decoder_width: of HySparK's decoder at the coarsest level; None: so that the finest has the first stage's
            channels.

    Raises:
        ValueError: a module that cannot be run on visible blocks, another decoder, or a width that cannot be halved.
    """

    trainer_of_prediction = "SparKFinetuneTrainer"

    def __init__(
        self,
        network: PlainConvUNet | ResidualEncoderUNet,
        input_channels: int,
        decoder: str = PLAN_DECODER,
        decoder_width: int | None = None,
    ) -> None:
        if decoder not in DECODERS:
            raise ValueError(f"decoder {decoder!r} is not one of {', '.join(DECODERS)}")
        encoder = PlanEncoder(network.encoder)
        if decoder == PLAN_DECODER:
            channels, kernel_sizes = encoder.output_channels[::-1], encoder.kernel_sizes[::-1]
            # fine-tuning continues with this decoder on raw skips
            densify = Densify(channels, channels, kernel_sizes, identity=True)
            super().__init__(encoder, PlanDecoder(network.decoder, input_channels), densify)
        else:
            width = decoder_width or encoder.output_channels[0] * 2 ** (len(encoder.strides) - 1)
            rebuild = ReconstructionDecoder(width, input_channels, encoder.strides, encoder.kernel_sizes)
            super().__init__(encoder, rebuild, reconstruction_skips(encoder, width))
        store_tensors_once(self)
