"""Adapting one tensor to another kernel size, stride or number of input channels.

A kernel that is padded with zeros gives the same output for every image. A summed kernel gives the same output for
images that are constant along the axis, an adapted stem for images whose channels are equal.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def adapt_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor | None:
    """A convolution's weight for another kernel size: n -> 1 is summed over the axis, 1 -> n is padded with zeros.

    Args:
        weight: (out, in, *kernel of the file).
        kernel: size in the network, per axis.

    Returns:
        (out, in, *kernel), or None if an axis has two different sizes above 1: weights would be cut off.
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

    n -> 1 is averaged, 1 -> n is repeated. Each voxel of the output comes from one weight, so the output is unchanged
    for images that are constant along the axis.

    Args:
        weight: (in, out, *stride of the file).
        kernel: stride in the network, per axis.

    Returns:
        (in, out, *kernel), or None if an axis has two different strides above 1.
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
    """Names of the input channels in order; a channel without a name has its number.

    Args:
        description: of a network: ``channel_names`` as in nnU-Net's dataset.json, number to name.
        count: number of channels.
    """
    named = description.get("channel_names")
    by_number = {str(key): str(value) for key, value in named.items()} if isinstance(named, Mapping) else {}
    return [by_number.get(str(number), str(number)) for number in range(count)]


def number_of_image_channels(description: Mapping[str, object], count: int) -> int:
    """Number of a network's input channels that are images.

    In the second stage of a cascade, the first stage's segmentation follows them: a channel per label, without names.

    Args:
        description: of a network; without ``channel_names``, all channels are images.
        count: number of input channels.
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

    Images are assigned by ``channel_assignment``. Channels of a previous stage's segmentation are loaded if the file
    has the same number of them. Otherwise they start at zero, so the output is the same as without them.

    Args:
        weight: (out, channels of the file, *kernel).
        count: input channels of the network.
        source_description: of the file's network.
        target_description: of this network.
        mapping: ``input_channel_mapping`` of the recipe.

    Returns:
        (out, count, *kernel), and a text on what was adapted, "" if nothing was.

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
    """Assigns a channel of the file to each channel of the network.

    Args:
        source: names of the file's channels, "0", "1", ... where it does not name them.
        target: names of the network's channels.
        mapping: ``input_channel_mapping`` of the recipe, such as ``T1=CT, T2=CT``: each channel of the network with a
            channel of the file, by name or number. None: by name if the file has all names, else by
            position if there are equally many, else averaged.

    Returns:
        a source channel per target channel, or None for the average of all; and a text on the assignment, "" if the
        channels stay as they are.

    Raises:
        ValueError: the mapping has a syntax error, leaves a channel out, or names a channel that does not exist.
    """
    if mapping is not None:
        chosen = _parsed(mapping, source, target)
        taken = ", ".join(f"{name} from {source[index]}" for name, index in zip(target, chosen, strict=True))
        return chosen, "" if chosen == list(range(len(source))) else f"input channels: {taken}"
    if list(source) == list(target):
        return list(range(len(source))), ""
    # a number says nothing about the modality of a channel
    if len(set(source)) == len(source) and set(target) <= set(source) and not any(n.isdecimal() for n in target):
        return [source.index(name) for name in target], f"input channels by name: {', '.join(target)}"
    if len(source) == len(target):
        return list(range(len(source))), ""
    return None, f"input channels averaged: {len(source)} -> {len(target)}"


def adapt_input_channels(weight: Tensor, assignment: Sequence[int] | None, count: int) -> Tensor:
    """A stem's weight for other input channels; for equal channels, the output is unchanged.

    A channel of the file that several channels use is divided among them in equal parts. A channel that no channel uses
    is averaged over all. The sum over input channels stays the same.

    Args:
        weight: (out, channels of the file, *kernel).
        assignment: a channel of the file per channel of the network; None: all are averaged and rescaled.
        count: input channels of the network.

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
                f"input_channel_mapping is {mapping!r}: '{pair.strip()}' is not a pair. Write "
                f"CHANNEL=CHANNEL_OF_THE_FILE, separated by commas, for example {target[0]}={source[0]}"
            )
        chosen[_find(ours, target, "this dataset")] = _find(theirs, source, "the file")
    left_out = [name for number, name in enumerate(target) if number not in chosen]
    if left_out:
        raise ValueError(f"input_channel_mapping is {mapping!r}, but it leaves out channel {', '.join(left_out)}")
    return [chosen[number] for number in range(len(target))]


def _find(word: str, names: Sequence[str], owner: str) -> int:
    if list(names).count(word) == 1:
        return list(names).index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise ValueError(
        f"input_channel_mapping names channel {word}, but {owner} has {', '.join(names)}: give a name or a number "
        f"from 0 to {len(names) - 1}"
    )
