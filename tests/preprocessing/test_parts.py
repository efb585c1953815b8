"""Parts of a dataset are disjoint, complete and balanced."""

import numpy as np
import pytest

from hyspark_nnunet.preprocessing.parts import cases_of_part, parse_part


@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_parts_are_disjoint_complete_and_balanced(count: int) -> None:
    sizes = {f"case{i}": int(size) for i, size in enumerate(np.random.default_rng(0).lognormal(10, 1, 300))}
    parts = [cases_of_part(sizes, (number, count)) for number in range(1, count + 1)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    # greedy division: at most 4/3 of the best one, which is no less than mean and largest case
    assert max(loads) <= 4 / 3 * max(np.mean(loads), max(sizes.values()))
    for part in parts:
        assert part == sorted(part, key=lambda name: (-sizes[name], name))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3"])
def test_what_is_not_a_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--part {text} is not a part"):
        parse_part(text)
    assert parse_part("3/16") == (3, 16)
