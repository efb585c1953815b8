"""How ``-pretrained_weights`` reaches our trainers."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

from nnunetv2.run import run_training
from torch import nn


def route_pretrained_weights(trainer: Any) -> None:
    """Makes nnU-Net's command load ``-pretrained_weights`` by ``trainer.load_pretrained_weights``.

    nnU-Net loads them by a function of its module ``run_training`` that demands every key with equal shape, and gives
    trainers no hook. Only this trainer's network is rerouted.
    """
    # nnU-Net's module outlives the trainer
    of_trainer = weakref.ref(trainer)
    stock: Callable[..., None] = run_training.load_pretrained_weights

    def load(network: nn.Module, fname: str, verbose: bool = False) -> None:
        here = of_trainer()
        if here is not None and network is here.network:
            here.load_pretrained_weights(fname)
        else:
            stock(network, fname, verbose=verbose)

    # run as a script, nnU-Net's module has another name
    for name in (run_training.__name__, "__main__", "__mp_main__"):
        module = sys.modules.get(name)
        if getattr(module, "load_pretrained_weights", None) is stock:
            module.load_pretrained_weights = load  # type: ignore[union-attr]
