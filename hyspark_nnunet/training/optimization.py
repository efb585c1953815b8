"""Parameter groups of the optimizer, and the learning rates of the encoder's layers."""

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hyspark_nnunet.recipe.fields import ADAMW, SGD

ENCODER, REST = "encoder", "decoder"
WEIGHTS, EXEMPT = "weights", "norms, biases, mask tokens"
# of the decoder's rate; with the seven layers of preset S at four stages this is a decay of 0.5 (docs/results.md)
FIRST_LAYER_RATE = 1 / 128


def optimizer_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """The kind of optimizer, "adamw" or "sgd", that parameter groups are from."""
    return SGD if "nesterov" in groups[0] else ADAMW


def parameter_groups(
    network: nn.Module,
    weight_decay: float,
    learning_rate: float,
    apart: bool = False,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Groups of weights, which decay, and of norms, biases and mask tokens, which do not.

    The first group has the full learning rate, because nnU-Net logs the rate of the first group.

    Args:
        network: its parameters, including those that need no gradient under DDP.
        weight_decay: of the weights.
        learning_rate: peak rate of everything except the encoder.
        apart: the encoder has separate groups.
        rates: factor on the rate of each layer of the encoder (``layer_rates``); each layer then has separate groups.
            Empty: the same rate for all.

    Returns:
        groups for a torch optimizer, each with a ``name`` and a ``part`` ("encoder" or "decoder"; always "decoder" if
        the encoder has no separate groups). Empty groups are left out.
    """
    layers = encoder_layers(network) if rates else {}
    n_layers = 1 + max(layers.values(), default=-1)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        is_encoder = (apart or bool(rates)) and name.startswith("encoder.")
        # distance from the decoder: 0 for the decoder, 1 for the last layer of the encoder
        distance = n_layers - layers[layer_of(name)] if is_encoder and layers else int(is_encoder)
        is_exempt = parameter.ndim <= 1 or "mask_tokens" in name
        kind = EXEMPT if is_exempt else WEIGHTS
        part = layer_of(name) if layers else ENCODER
        title = f"{part}: {kind}" if is_encoder else f"{REST}: {kind}" if apart or layers else kind
        empty: dict[str, Any] = {
            "name": title,
            "part": ENCODER if is_encoder else REST,
            "params": [],
            "weight_decay": 0.0 if is_exempt else weight_decay,
            "lr": learning_rate * (rates[part] if is_encoder and layers else 1.0),
        }
        groups.setdefault((distance, is_exempt), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_rates(network: nn.Module, decay: float | None, new_layers: Collection[str] = ()) -> dict[str, float]:
    """Factors on the learning rates of the encoder's layers, as in BEiT (arXiv 2106.08254).

    The last layer has the factor ``decay``, the layer before it ``decay ** 2``, and so on.

    Args:
        network: with an ``encoder``.
        decay: factor from each layer to the layer before it, in (0, 1]; None: the first layer has
            ``FIRST_LAYER_RATE``, for any number of layers.
        new_layers: layers with the full rate of the decoder.

    Returns:
        factor of each of ``encoder_layers``; empty if all have the same rate.
    """
    layers = encoder_layers(network)
    n_layers = 1 + max(layers.values())
    if decay is None:
        decay = FIRST_LAYER_RATE ** (1 / n_layers)
    if decay == 1:
        return {}
    new = {layers[name] for name in new_layers}
    return {name: 1.0 if number in new else decay ** (n_layers - number) for name, number in layers.items()}


def rates_of_groups(network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The ``layer_rates`` from which an optimizer's groups were built."""
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    found = {
        group.get("name", "").partition(":")[0]: rate / rates[0] for group, rate in zip(groups, rates, strict=True)
    }
    layers = encoder_layers(network)
    first_names = {number: name for name, number in reversed(layers.items())}
    return {name: found[first_names[number]] for name, number in layers.items() if first_names[number] in found}


def layer_of(name: str) -> str:
    """Name of the encoder layer that a parameter belongs to; the final norm counts with the last block."""
    if match := re.match(r"encoder\.stages\.(\d+)\.", name):
        return f"stage {match[1]}"
    if match := re.match(r"encoder\.vit\.blocks\.(\d+)\.", name):
        return f"transformer block {match[1]}"
    return "final norm" if name.startswith("encoder.vit.") else "stem"


def encoder_layers(network: nn.Module) -> dict[str, int]:
    """Numbers of the encoder's layers, counted from the input: stem, stages, transformer blocks.

    PlainConvUNet has no stem, and only HySparK's encoder has transformer blocks.
    """
    found = dict.fromkeys(layer_of(name) for name, _ in network.named_parameters() if name.startswith("encoder."))
    names = [name for name in found if name != "final norm"]
    layers = {name: number for number, name in enumerate(names)}
    return layers | {"final norm": len(names) - 1} if "final norm" in found else layers


def describe_groups(optimizer: Optimizer, notes: Mapping[str, str]) -> str:
    """A table of the parameter groups, for the log.

    Args:
        optimizer: its groups from ``parameter_groups``.
        notes: remarks on the groups of a part.
    """
    width = max(len(group["name"]) for group in optimizer.param_groups)
    lines = [f"{'parameter group':<{width}}{'tensors':>9}{'parameters':>12}{'peak rate':>11}{'decay':>7}"]
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        rate, decay = group.get("initial_lr", group["lr"]), group["weight_decay"]
        lines.append(
            f"{group['name']:<{width}}{len(group['params']):>9}{count:>12,}{rate:>11.3g}{decay:>7.3g}  "
            f"{notes.get(group['part'], '')}".rstrip()
        )
    return "\n".join(lines)


def drop_frozen(optimizer: Optimizer) -> None:
    """``skip_frozen`` before clipping, so that unused gradients do not scale down the others.

    Does nothing if every rate is zero, as in the first step of a warm-up: a gradient scaler needs some gradients.
    """
    if any(group["lr"] != 0 for group in optimizer.param_groups):
        skip_frozen(optimizer)


def skip_frozen(optimizer: Optimizer, *_: Any) -> None:
    """A hook before the optimizer's step: groups with a learning rate of zero keep their weights and moments.

    Their gradients are computed and dropped. Removing requires_grad instead would break DDP, whose reducer waits for
    the gradients of all parameters that had one when the network was wrapped. Without this hook AdamW's moments would
    collect gradients of steps that were not taken.
    """
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None
