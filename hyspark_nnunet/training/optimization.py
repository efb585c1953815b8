"""Parameter groups of both trainers' AdamW."""

from typing import Any

from torch import nn


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, which decay, and norms, biases and mask tokens, which do not.

    Args:
        network: its parameters that require a gradient.
        weight_decay: of the first group.

    Returns:
        groups for torch.optim.AdamW, each with a ``name``.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (exempt if parameter.ndim <= 1 or "mask_tokens" in name else decayed).append(parameter)
    return [
        {"name": "weights", "params": decayed, "weight_decay": weight_decay},
        {"name": "norms, biases, mask tokens", "params": exempt, "weight_decay": 0.0},
    ]
