"""Finding the state dict of a network in a file, under whatever key and prefix its writer chose.

Checkpoints nest weights under keys such as ``state_dict``, ``model`` or ``module`` and may hold copies of the network,
for example a mean teacher. A network is found by the name of its stem, so no list of keys is needed.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# words that DDP, torch.compile, FSDP and activation checkpointing put into names, at the front or, where a part of a
# network was wrapped, in the middle
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# the stem of HySparK's networks, of the HySparK release or of nnU-Net's networks; before it, a prefix such as "model."
# of Lightning
STEM = re.compile(
    r"(.*?\.)??(?:(?:encoder|(?:sparse_encoder\.)?embeddings)\.stem|"
    r"encoder\.(?:stem|stages\.0\.0)\.convs\.0\.conv)\.weight"
)
# of two copies of a network, the averaged one is the better encoder, which other libraries load, too
AVERAGED = {"ema", "teacher"}
# a pickled dictionary may contain itself
MAX_DEPTH = 6


class StateDict(NamedTuple):
    """Named tensors of a file.

    Attributes:
        place: keys that lead to them and the prefix of their names, dotted; "" at the top level without a prefix.
        tensors: by name, without the prefix and without ``WRAPPERS``; of several names of a tensor in nnU-Net's
            networks, the first (``first_name``).
        rest: what the file holds beside them, on the way to them.
    """

    place: str
    tensors: dict[str, Tensor]
    rest: dict[str, Any]


def find_state_dicts(checkpoint: Mapping[Any, Any]) -> list[StateDict]:
    """All networks in a file, the one to load first; without a network, the largest group of named tensors.

    Args:
        checkpoint: content of a file.

    Returns:
        state dicts; empty if the file holds no named tensors.
    """
    groups = list(_groups(checkpoint))
    networks = [network for group in groups for network in _networks(group)]
    if networks:
        return sorted(networks, key=lambda network: not AVERAGED & set(re.split(r"\W|_", network.place.lower())))
    return sorted(groups, key=lambda group: -len(group.tensors))[:1]


def first_name(name: str) -> str:
    """The first of the names that nnU-Net's networks give to a tensor; names of other networks stay as they are.

    dynamic-network-architectures registers the encoder in the decoder, and each convolution and norm twice: a tensor of
    the encoder has the names ``encoder.`` and ``decoder.encoder.``, each with ``conv`` and ``all_modules.0``.
    """
    name = re.sub(r"(^|\.)decoder\.encoder\.", r"\1encoder.", name)
    return re.sub(r"\.all_modules\.(\d+)\.", lambda match: ".norm." if int(match[1]) else ".conv.", name)


def stored_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with each tensor under its ``first_name`` only."""
    found = {name: tensor for name, tensor in state.items() if first_name(name) == name}
    for name, tensor in state.items():
        found.setdefault(first_name(name), tensor)
    return found


def _groups(value: Any, keys: tuple[str, ...] = (), rest: Mapping[str, Any] | None = None) -> Iterator[StateDict]:
    """Every dictionary in a file that holds tensors by name."""
    rest = rest or {}
    items: dict[Any, Any]
    if isinstance(value, list | tuple):
        items, beside = dict(enumerate(value)), rest
    elif isinstance(value, Mapping):
        items, beside = dict(value), {**rest, **{k: v for k, v in value.items() if not isinstance(v, Tensor)}}
    else:
        return
    tensors = stored_once(
        {_unwrap(name): t for name, t in items.items() if isinstance(name, str) and isinstance(t, Tensor)}
    )
    if tensors:
        yield StateDict(".".join(keys), tensors, dict(rest))
    for key, item in items.items():
        # an optimizer's moments are no weights
        if len(keys) < MAX_DEPTH and "optim" not in str(key).lower():
            yield from _groups(item, (*keys, str(key)), {k: v for k, v in beside.items() if k != key})


def _networks(group: StateDict) -> Iterator[StateDict]:
    """The networks among the tensors of a group: one for each prefix that stands before a stem."""
    prefixes = {match[1] or "" for name in group.tensors if (match := STEM.fullmatch(name))}
    for prefix in sorted(prefixes):
        others = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in group.tensors.items()
            if name.startswith(prefix) and not name.startswith(others)
        }
        place = ".".join(filter(None, [group.place, prefix.rstrip(".")]))
        yield StateDict(place, tensors, group.rest)


def _unwrap(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)
