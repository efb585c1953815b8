"""Adapting one tensor to another kernel or to other input channels, without changing what it answers.

Both changes are exact where it counts: a summed kernel answers an image that is constant along the axis as before, a
centred one answers every image as before, and a stem answers equal channels as before.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def adapt_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor | None:
    """A convolution's weight for another kernel size: n -> 1 summed over the axis, 1 -> n centred, zeros around.

    Args:
        weight: (out, in, *kernel of the file).
        kernel: wanted, per axis.

    Returns:
        (out, in, *kernel), or None where an axis would go from one size above 1 to another: that would truncate.
    """
    result = weight
    for axis, wanted in enumerate(kernel, start=2):
        size = result.shape[axis]
        if size == wanted:
            continue
        if wanted == 1:
            # float64: float32 sums of pre-trained kernels lose digits to cancellation
            result = result.double().sum(axis, keepdim=True)
        elif size == 1:
            wider = result.new_zeros(*result.shape[:axis], wanted, *result.shape[axis + 1 :])
            wider.narrow(axis, wanted // 2, 1).copy_(result)
            result = wider
        else:
            return None
    return result.to(weight.dtype)


def adapt_upsampling(weight: Tensor, kernel: Sequence[int]) -> Tensor | None:
    """The weight of a transposed convolution whose kernel is its stride, for another stride.

    n -> 1 averaged, 1 -> n repeated: each voxel of the result comes from one tap, so what is constant along the axis is
    answered as before.

    Args:
        weight: (in, out, *stride of the file).
        kernel: wanted, per axis.

    Returns:
        (in, out, *kernel), or None where an axis would go from one size above 1 to another.
    """
    result = weight.double()
    for axis, wanted in enumerate(kernel, start=2):
        size = result.shape[axis]
        if size != wanted and 1 not in (size, wanted):
            return None
        if size != wanted:
            result = result.mean(axis, keepdim=True).repeat_interleave(wanted, axis)
    return result.to(weight.dtype)


def channel_names(description: Mapping[str, object], count: int) -> list[str]:
    """Names of the input channels in order; their numbers where a description does not name them all.

    Args:
        description: of a network: ``channel_names`` as in nnU-Net's dataset.json, number to name.
        count: of the channels.
    """
    named = description.get("channel_names")
    by_number = {str(key): str(value) for key, value in named.items()} if isinstance(named, Mapping) else {}
    return [by_number.get(str(number), str(number)) for number in range(count)]


def number_of_image_channels(description: Mapping[str, object], count: int) -> int:
    """How many of a network's input channels are images.

    The second stage of a cascade has the first stage's segmentation behind them, a channel per label, without names.

    Args:
        description: of a network; where it has no ``channel_names``, all channels are images.
        count: of all input channels.
    """
    named = description.get("channel_names")
    return len(named) if isinstance(named, Mapping) and 0 < len(named) <= count else count


def adapt_stem(
    weight: Tensor,
    count: int,
    source_description: Mapping[str, object],
    target_description: Mapping[str, object],
    mapping: str | None = None,
) -> tuple[Tensor, str]:
    """A stem's weight for the input channels of another network.

    Images are assigned by ``channel_assignment``. Channels of a previous stage's segmentation are taken where the file
    has as many, and start at zero where it has not: the network then answers as it did without them, and learns them.

    Args:
        weight: (out, channels of the file, *kernel).
        count: channels of the network.
        source_description: what the file says of its network.
        target_description: the same of this network.
        mapping: of the recipe.

    Returns:
        (out, count, *kernel); and how, in words, "" where nothing changes.

    Raises:
        ValueError: see ``channel_assignment``.
    """
    theirs = number_of_image_channels(source_description, weight.shape[1])
    ours = number_of_image_channels(target_description, count)
    assignment, how = channel_assignment(
        channel_names(source_description, theirs), channel_names(target_description, ours), mapping
    )
    images, segmentation = weight[:, :theirs], weight[:, theirs:]
    if how:
        images = adapt_input_channels(images, assignment, ours)
    if segmentation.shape[1] != count - ours:
        change = f"{count - ours} start at zero" if count > ours else f"{segmentation.shape[1]} left out"
        how = "; ".join(filter(None, [how, f"channels of the previous stage's segmentation: {change}"]))
        segmentation = weight.new_zeros(len(weight), count - ours, *weight.shape[2:])
    return torch.cat([images, segmentation], 1), how


def channel_assignment(
    source: Sequence[str], target: Sequence[str], mapping: str | None = None
) -> tuple[list[int] | None, str]:
    """Which channel of the file each channel of the network starts from.

    Args:
        source: names of the file's channels, "0", "1", ... where it does not name them.
        target: names of the network's channels.
        mapping: of the recipe (``input_channel_mapping``): ``T1=CT, T2=CT``, each channel of the network with a channel
            of the file, by name or number; None: by name where the file has all names, else averaged.

    Returns:
        a source channel per target channel, or None for the average of all; and how, in words, "" where nothing
        changes.

    Raises:
        ValueError: the mapping is not understood, leaves a channel out, or names one that is not there.
    """
    if mapping is not None:
        chosen = _parsed(mapping, source, target)
        taken = ", ".join(f"{name} from {source[index]}" for name, index in zip(target, chosen, strict=True))
        return chosen, "" if chosen == list(range(len(source))) else f"input channels: {taken}"
    if list(source) == list(target):
        return list(range(len(source))), ""
    # numbers are no names: they say nothing about what a channel shows
    if len(set(source)) == len(source) and set(target) <= set(source) and not any(n.isdecimal() for n in target):
        return [source.index(name) for name in target], f"input channels by name: {', '.join(target)}"
    if len(source) == len(target):
        return list(range(len(source))), ""
    return None, f"input channels averaged: {len(source)} -> {len(target)}"


def adapt_input_channels(weight: Tensor, assignment: Sequence[int] | None, count: int) -> Tensor:
    """A stem's weight for other input channels; its answer to equal channels stays the same.

    A channel of the file that several take is shared out among them; channels that none takes are averaged over all.
    Whatever the assignment, the sum over input channels stays the same.

    Args:
        weight: (out, channels of the file, *kernel).
        assignment: a channel of the file per channel of the network; None: all are averaged and rescaled.
        count: channels of the network.

    Returns:
        (out, count, *kernel).
    """
    exact, sources = weight.double(), weight.shape[1]
    shares = torch.full((count, sources), 1 / count, dtype=torch.float64, device=weight.device)
    for index in set(assignment or ()):
        takers = [channel for channel, taken in enumerate(assignment or ()) if taken == index]
        shares[:, index] = 0
        shares[takers, index] = 1 / len(takers)
    return torch.einsum("oi...,ti->ot...", exact, shares).to(weight.dtype)


def _parsed(mapping: str, source: Sequence[str], target: Sequence[str]) -> list[int]:
    chosen: dict[int, int] = {}
    for pair in mapping.split(","):
        ours, equals, theirs = (word.strip() for word in pair.partition("="))
        if not equals:
            raise ValueError(
                f"input_channel_mapping is {mapping!r}: '{pair.strip()}' is no pair; write CHANNEL=CHANNEL OF THE "
                f"FILE, separated by commas, for example {target[0]}={source[0]}"
            )
        chosen[_find(ours, target, "this data set")] = _find(theirs, source, "the file")
    left_out = [name for number, name in enumerate(target) if number not in chosen]
    if left_out:
        raise ValueError(f"input_channel_mapping is {mapping!r} and leaves out channel {', '.join(left_out)}")
    return [chosen[number] for number in range(len(target))]


def _find(word: str, names: Sequence[str], owner: str) -> int:
    if list(names).count(word) == 1:
        return list(names).index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise ValueError(
        f"input_channel_mapping names channel {word}, but {owner} has {', '.join(names)}; give a name or a number "
        f"from 0 to {len(names) - 1}"
    )
