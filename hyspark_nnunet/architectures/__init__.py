"""The two networks: segmentation and masked pre-training."""

from hyspark_nnunet.architectures.masked_autoencoder import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.unet import HySparKUNet

__all__ = ["HySparKMaskedAutoencoder", "HySparKUNet"]
