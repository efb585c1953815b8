"""Which of a training's processes this is."""

import pytest
import torch.distributed as dist

from hyspark_nnunet.training.runtime.ranks import number_on_machine


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (None, 3),  # torchrun's process, before it joins the group
        ((11, 16), 3),  # and after
        ((0, 4), 0),  # nnUNetv2_train -num_gpus 4, in a shell that has torchrun's variables of something else
        ((2, 4), 2),
        ((11, 12), 11),
    ],
)
def test_the_number_on_the_machine(
    group: tuple[int, int] | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "11"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: group is not None)
    if group is not None:
        monkeypatch.setattr(dist, "get_rank", lambda: group[0])
        monkeypatch.setattr(dist, "get_world_size", lambda: group[1])
    assert number_on_machine() == expected
