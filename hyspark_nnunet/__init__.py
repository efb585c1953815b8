"""HySparK (hybrid sparse masking, MICCAI 2024) as a plugin of nnU-Net v2."""

__version__ = "0.1.0"
