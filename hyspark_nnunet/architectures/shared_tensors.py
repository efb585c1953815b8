"""State dictionaries that hold each tensor once, of networks whose modules are registered under several names."""

from typing import Any

from torch import Tensor, nn


def store_tensors_once(network: nn.Module) -> None:
    """Lets a network's state dictionary hold each tensor under its first name alone, and load that.

    dynamic-network-architectures registers every convolution and norm twice: as ``conv`` and as ``all_modules.0``. A
    state dictionary with all names is loaded as well.
    """
    network.register_state_dict_post_hook(_drop_further_names)
    network.register_load_state_dict_pre_hook(_add_further_names)


def further_names(network: nn.Module) -> dict[str, str]:
    """The first name of a tensor for each of its other names."""
    first: dict[Tensor, str] = {}
    found = {}
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if first.setdefault(tensor, name) != name:
            found[name] = first[tensor]
    return found


def _drop_further_names(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in further_names(network):
        state.pop(prefix + name, None)


def _add_further_names(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in further_names(network).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
