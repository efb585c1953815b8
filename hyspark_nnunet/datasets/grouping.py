"""From scans to cases: which scans are the channels of one case."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hyspark_nnunet.datasets.case_names import unique_names
from hyspark_nnunet.datasets.scanning import Scan

SUFFIX = re.compile(r"(.*)_(\d{4})", re.DOTALL)


class Case(NamedTuple):
    """A name and one scan per channel, in order."""

    name: str
    scans: tuple[Scan, ...]


class Grouped(NamedTuple):
    """Complete cases, and by name what the incomplete ones lack."""

    cases: list[Case]
    incomplete: dict[str, str]


def cases_by_suffix(scans: Sequence[Scan], n_channels: int | None, numbers_in_names: bool = False) -> Grouped:
    """Groups by nnU-Net's suffixes _0000, _0001; a scan without one is a case of one channel.

    Args:
        scans: of one folder.
        n_channels: of a case; None: one, and anything else is refused.
        numbers_in_names: a trailing _0000 is part of the name: every scan is a case.

    Raises:
        ValueError: suffixes that are not channel numbers, or more channels than were named.
    """
    split = [(None if numbers_in_names else SUFFIX.fullmatch(scan.relative), scan) for scan in scans]
    numbers = {int(match[2]) for match, _ in split if match}
    expected = n_channels or 1
    beyond = sorted(number for number in numbers if number >= expected)
    if beyond:
        said = "one channel is expected" if n_channels is None else f"--channels names {expected}"
        example = next(scan.relative for match, scan in split if match and int(match[2]) == beyond[0])
        raise ValueError(
            f"{example} ends in _{beyond[0]:04d}, the suffix of channel {beyond[0]}, but {said} "
            f"(the suffixes run from {min(numbers)} to {max(numbers)}): name all channels (--channels T1 T2), or use "
            "--no-suffix if these numbers count cases"
        )
    groups: dict[str, dict[int, Scan]] = {}
    twice = []
    for match, scan in split:
        key, channel = (match[1], int(match[2])) if match else (scan.relative, 0)
        if channel in groups.setdefault(key, {}):
            twice.append(scan)
        groups[key][channel] = scan
    if twice and expected > 1:
        raise ValueError(
            f"{twice[0].relative}{twice[0].ending} exists with two endings: --exclude the one that is not the channel"
        )
    if expected == 1:  # two formats of one name are two cases; check tells if they hold the same
        keyed = [(match[1] if match else scan.relative, scan) for match, scan in split]
        names = unique_names([(key, scan.ending) for key, scan in keyed])
        return Grouped([Case(name, (scan,)) for name, (_, scan) in zip(names, keyed, strict=True)], {})
    return _complete(groups, [f"_{channel:04d}" for channel in range(expected)])


def cases_by_folder(scans: Mapping[str, Sequence[Scan]]) -> Grouped:
    """Groups scans that have the same path in a folder per channel.

    Args:
        scans: by channel name, in the channels' order; a suffix such as _0000 does not count.

    Raises:
        ValueError: a path occurs twice in one folder.
    """
    groups: dict[str, dict[int, Scan]] = {}
    for channel, name in enumerate(scans):
        for scan in scans[name]:
            match = SUFFIX.fullmatch(scan.relative)
            group = groups.setdefault(match[1] if match else scan.relative, {})
            if channel in group:
                raise ValueError(
                    f"channel {name} has two scans for one case: {group[channel].files[0]} and {scan.files[0]}; "
                    "--exclude one"
                )
            group[channel] = scan
    return _complete(groups, list(scans))


def _complete(groups: Mapping[str, Mapping[int, Scan]], channel_names: Sequence[str]) -> Grouped:
    keys = sorted(groups)
    names = unique_names([(key, "") for key in keys])
    cases, incomplete = [], {}
    for key, name in zip(keys, names, strict=True):
        missing = [channel for i, channel in enumerate(channel_names) if i not in groups[key]]
        if missing:
            incomplete[name] = f"channel {', '.join(missing)} is missing"
        else:
            cases.append(Case(name, tuple(groups[key][i] for i in range(len(channel_names)))))
    return Grouped(cases, incomplete)
