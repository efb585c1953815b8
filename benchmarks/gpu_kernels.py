"""The operations that a pre-training step is made of, one at a time."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import now
from hyspark_nnunet.building_blocks.merged_upsampling import MergedUpsampling

REPEATS = 10


def time_operation(function: Callable[..., Tensor], inputs: Sequence[Tensor], n_bytes: int = 0) -> dict[str, Any]:
    """A row with the times of an operation and of its backward pass.

    Args:
        function: of the inputs.
        inputs: those of a floating-point type get gradients.
        n_bytes: that the forward pass must read and write at least; 0: not known.
    """
    device = inputs[0].device
    inputs = [i.detach().requires_grad_(i.is_floating_point()) for i in inputs]
    wanted = [i for i in inputs if i.requires_grad]
    result = function(*inputs)
    gradient = torch.ones_like(result)
    torch.autograd.grad(result, wanted, gradient)
    del result

    def seconds(operation: Callable[[], object]) -> float:
        begin = now(device)
        for _ in range(REPEATS):
            operation()
        return (now(device) - begin) / REPEATS

    forward = statistics.median(seconds(lambda: function(*inputs)) for _ in range(3))
    both = statistics.median(
        seconds(lambda: torch.autograd.grad(function(*inputs), wanted, gradient)) for _ in range(3)
    )
    row = {"total ms": f"{1e3 * both:.3f}", "forward ms": f"{1e3 * forward:.3f}"}
    row["backward ms"] = f"{1e3 * (both - forward):.3f}"
    if n_bytes:
        row["GB/s"] = f"{n_bytes / forward / 1e9:.3g}"
    return row


def shifted_sums(image: Tensor, weight: Tensor) -> Tensor:
    """A depth-wise convolution of (N, *spatial + 2, C) by (C, 1, 3, 3, 3) as 27 products, which a compiler can fuse."""
    size = [n - 2 for n in image.shape[1:-1]]
    total = None
    for x, y, z in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        part = image[:, x : x + size[0], y : y + size[1], z : z + size[2]] * weight[:, 0, x, y, z]
        total = part if total is None else total + part
    return total


def depthwise_ways(compiled: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Depth-wise convolutions of a field (N, *spatial + 2, C), each giving (N, *spatial, C)."""

    def channels_last(image: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(image.movedim(-1, 1), weight, groups=len(weight)).movedim(1, -1).contiguous()

    def channels_first(image: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(image.movedim(-1, 1).contiguous(), weight, groups=len(weight)).movedim(1, -1).contiguous()

    sums = torch.compile(shifted_sums) if compiled else shifted_sums
    return {"channels-last": channels_last, "channels-first": channels_first, "shifted sums": sums}


def operations(
    device: torch.device, dtype: torch.dtype, blocks: int, unit: int, channels: Sequence[int], compiled: bool
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Name, shape and measurement of every operation.

    Args:
        device: where.
        dtype: of activations.
        blocks: visible mask units of the batch.
        unit: voxels of a mask unit along an axis.
        channels: of the stages.
        compiled: by torch.compile where it matters.
    """

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    size = dtype.itemsize
    for stage, width in enumerate(channels):
        block = unit // 2**stage
        shape = (blocks, *[block + 2] * 3, width)
        for name, way in depthwise_ways(compiled).items():
            moved = size * blocks * width * ((block + 2) ** 3 + block**3)

            def depthwise(way: Any = way, shape: Any = shape, width: int = width, moved: int = moved) -> dict[str, Any]:
                return time_operation(way, [made(*shape), made(width, 1, 3, 3, 3)], moved)

            yield f"depth-wise, {name}", "x".join(map(str, shape)), depthwise

    width, voxels = channels[0], blocks * unit**3
    rows = "x".join(map(str, (voxels, width)))
    halo = blocks * (unit + 2) ** 3
    for zero_rows in (1, 64, 4096):

        def gather(zero_rows: int = zero_rows) -> dict[str, Any]:
            # as many rows as a halo has; a quarter of them is read as zero
            index = torch.randint(0, voxels, (halo,), device=device)
            hidden = torch.rand(halo, device=device) < 0.25
            spread = voxels + torch.arange(halo, device=device) % zero_rows
            index = torch.where(hidden, spread, index).int()
            return time_operation(
                lambda field, index: field.index_select(0, index),
                [made(voxels + zero_rows, width), index],
                2 * size * halo * width,
            )

        yield f"gather, {zero_rows} rows of zeros", rows, gather

    def layer_norm() -> dict[str, Any]:
        field = made(voxels, width)
        return time_operation(lambda field: F.layer_norm(field, [width]), [field], 2 * size * voxels * width)

    yield "LayerNorm", rows, layer_norm

    def pooling() -> dict[str, Any]:
        field = made(blocks, *[unit] * 3, width).movedim(-1, 1)
        return time_operation(lambda image: F.max_pool3d(image, 2), [field], size * voxels * width * 9 // 8)

    yield "max pooling", rows, pooling

    edge = 2 * unit
    for layout, memory_format in {"-last": torch.channels_last_3d, "-first": torch.contiguous_format}.items():
        image_shape = (max(1, blocks // 8), width, *[edge] * 3)

        def norm(memory_format: Any = memory_format, shape: Any = image_shape) -> dict[str, Any]:
            image = made(*shape).contiguous(memory_format=memory_format)
            ones = torch.ones(width, device=device)

            def both(image: Tensor) -> Tensor:
                return F.relu(F.batch_norm(image, None, None, ones, ones, True))

            return time_operation(both, [image], 2 * size * image.numel())

        yield f"BatchNorm and ReLU, channels{layout}", "x".join(map(str, image_shape)), norm

        def instance_norm(memory_format: Any = memory_format, shape: Any = image_shape) -> dict[str, Any]:
            image = made(*shape).contiguous(memory_format=memory_format)
            return time_operation(F.instance_norm, [image], 2 * size * image.numel())

        yield f"InstanceNorm, channels{layout}", "x".join(map(str, image_shape)), instance_norm

    coarse = (max(1, blocks // 8), 2 * width, *[unit] * 3)

    def merged() -> dict[str, Any]:
        function = MergedUpsampling((2, 2, 2), (3, 3, 3)).to(device)
        inputs = [made(2 * width, 2 * width, 2, 2, 2), made(2 * width), made(width, 2 * width, 3, 3, 3), made(width)]
        image = made(*coarse).contiguous(memory_format=torch.channels_last_3d)
        run = torch.compile(function) if compiled else function
        return time_operation(lambda image, *w: run(image, *w), [image, *inputs])

    yield "merged upsampling", "x".join(map(str, coarse)), merged
