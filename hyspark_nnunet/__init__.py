"""HySparK (hybrid sparse masking, MICCAI 2024) as a plugin of nnU-Net v2."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["build_network", "load_encoder", "load_network"]

if TYPE_CHECKING:
    from hyspark_nnunet.loading import build_network, load_encoder, load_network


def __getattr__(name: str) -> Any:
    """Imports torch when a function is asked for, not before: commands and nnU-Net's start import this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hyspark_nnunet import loading

    return getattr(loading, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
