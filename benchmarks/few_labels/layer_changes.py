"""How far a training with labels moves each layer of the encoder from its pre-trained weights."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from hyspark_nnunet.training.optimization import layer_of


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Per layer of the encoder, the norm of the change of its weights in parts of the norm they had.

    Args:
        before: weights of a network of ours; norms and biases, of one dimension, are left out.
        after: of the same names and shapes where they are in both.
    """
    moved: dict[str, float] = defaultdict(float)
    had: dict[str, float] = defaultdict(float)
    for name, weights in after.items():
        if name.startswith("encoder.") and weights.ndim > 1 and name in before:
            moved[layer_of(name)] += float((weights - before[name]).double().square().sum())
            had[layer_of(name)] += float(before[name].double().square().sum())
    return {layer: (moved[layer] / had[layer]) ** 0.5 for layer in moved}
