"""Operations of a step, counted on tensors without storage: what a GPU would have to launch, without one.

    python -m benchmarks.operation_counts

An operation is one of torch's, views excepted, forward and backward, nothing compiled; on CUDA most are one kernel. A
change of layout is an operation that writes what it reads in another memory format. Nothing here is a time.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measuring import table
from benchmarks.step_cases import Case, HySparKCase, SparKCase, isotropic
from hyspark_nnunet.architectures import HySparKUNet
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.masking import mask_grid, num_visible_units
from hyspark_nnunet.training.memory.step_bytes import materialise

PATCH, BATCH = (128, 128, 128), 2
COPIES = ("clone", "copy_", "_to_copy")


class OperationCounts(TorchDispatchMode):
    """Counts operations under it, and of those that only copy, the bytes.

    Attributes:
        operations: all but views.
        layout_changes: copies into another memory format.
        changed_bytes: that these read and write.
        depthwise: memory formats of the inputs of depth-wise convolutions, forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.layout_changes = self.changed_bytes = 0
        self.depthwise: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (
            func.is_view
            or name in ("_unsafe_view", "_reshape_alias", "detach", "device")
            or name.startswith(("empty", "new_empty"))
        ):
            return result
        self.operations += 1
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            if isinstance(source, Tensor) and source.ndim == 5 and _order(source) != _order(result):
                self.layout_changes += 1
                self.changed_bytes += sum(t.numel() * t.element_size() for t in (source, result))
        if name == "convolution" and args[8] > 1:
            self.depthwise["channels-last" if _order(args[0])[-1] == 1 else "channels-first"] += 1
        return result


def _order(tensor: Tensor) -> list[int]:
    """Axes from the largest stride to the smallest; axes of size 1 say nothing and keep their place."""
    return sorted((axis for axis in range(tensor.ndim) if tensor.shape[axis] > 1), key=lambda a: -tensor.stride(a))


def count_segmentation(network: nn.Module) -> OperationCounts:
    """Of a forward and backward pass of fine-tuning's network; the loss is a sum."""
    with FakeTensorMode(), OperationCounts() as counts:
        materialise(network)
        image = torch.empty(BATCH, 1, *PATCH)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(image)
        sum(level.float().sum() for level in tree_leaves(logits)).backward()
    return counts


def count_pretraining(case: Case, encoder_only: bool) -> OperationCounts:
    """Of a forward and backward pass of pre-training with light checkpointing."""
    network = case.network_without_weights()
    set_recomputation(network, "light")
    grid = mask_grid(case.shape.patch, network.encoder.unit)
    with FakeTensorMode(), OperationCounts() as counts:
        materialise(network)
        image = torch.empty(case.batch_size, 1, *case.shape.patch)
        visible = torch.empty(case.batch_size, 1, *grid, dtype=torch.bool)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if encoder_only:
                features = network.encoder.features(image, visible, num_visible_units(grid, case.mask_ratio))
                found = [feature.field for feature in features]
            else:
                found = [network(image, visible, num_visible_units(grid, case.mask_ratio))]
        sum(part.float().sum() for part in found).backward()
    return counts


def segmentation_networks() -> dict[str, nn.Module]:
    """HySparKUNet of preset B, and nnU-Net's ResEnc-M, without weights."""
    hybrid, residual = HySparKCase(shape=isotropic(PATCH)), SparKCase(shape=isotropic(PATCH, n_stages=6))
    with torch.device("meta"):
        ours = HySparKUNet(**hybrid.encoder_arguments(), num_classes=2, deep_supervision=True)
        resenc = residual.segmentation_network(deep_supervision=True)
    return {"HySparKUNet, preset B": ours, "ResEnc-M": resenc}


def rows() -> list[dict[str, Any]]:
    """A row per network."""
    found = {name: count_segmentation(network) for name, network in segmentation_networks().items()}
    pretrained = {
        "HySparK, preset B": HySparKCase(shape=isotropic(PATCH), batch_size=BATCH),
        "SparK on ResEnc-M": SparKCase(shape=isotropic(PATCH, n_stages=6), batch_size=BATCH),
    }
    for name, case in pretrained.items():
        found[f"{name}, pre-training"] = count_pretraining(case, encoder_only=False)
        found[f"{name}, pre-training, encoder alone"] = count_pretraining(case, encoder_only=True)
    return [
        {
            "network": name,
            "operations": counts.operations,
            "changes of layout": counts.layout_changes,
            "GB of these": f"{counts.changed_bytes / 1e9:.1f}",
            "depth-wise convolutions": ", ".join(f"{n} {kind}" for kind, n in sorted(counts.depthwise.items()))
            or "none",
        }
        for name, counts in found.items()
    ]


if __name__ == "__main__":
    print(table(rows()))
