"""Dividing cases among machines that know nothing of each other."""

import heapq
from collections.abc import Mapping


def parse_part(text: str) -> tuple[int, int]:
    """Part 3 of 16 from "3/16".

    Raises:
        ValueError: it is not that.
    """
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or not 1 <= int(number) <= int(count):
        raise ValueError(f"--part {text} is not a part: give its number and how many there are, from 1/16 to 16/16")
    return int(number), int(count)


def cases_of_part(sizes: Mapping[str, int], part: tuple[int, int]) -> list[str]:
    """The cases of a part, the largest first.

    Every machine computes the same division: from the largest to the smallest, each case goes to the part with the
    least so far.

    Args:
        sizes: bytes of every case of the dataset.
        part: number, from 1, and how many parts there are.
    """
    number, count = part
    loads = [(0, index) for index in range(1, count + 1)]
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, index = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], index))
        if index == number:
            mine.append(name)
    return mine
