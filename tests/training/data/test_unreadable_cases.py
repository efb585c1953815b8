"""Cases that cannot be read are named and replaced by other draws; other errors stay errors."""

from pathlib import Path

import numpy as np
import pytest

from hyspark_nnunet.training.data.unreadable_cases import RedrawingLoader, UnreadableCase, check_first_stage, fault_of


class Array(np.ndarray):
    """Voxels that are read when they are asked for, and cannot be."""

    def __getitem__(self, item):
        raise RuntimeError("Error while getting the slice")


class Dataset:
    source_folder = "preprocessed"

    def __init__(self, damaged: set[str], missing: set[str] = frozenset()) -> None:
        self.identifiers = ["a", "b", "c"]
        self.damaged, self.missing = damaged, missing

    def load_case(self, identifier: str):
        if identifier in self.missing:
            raise FileNotFoundError(f"{identifier}.b2nd")
        voxels = np.full((1, 8, 8, 8), ord(identifier), dtype=np.float32)
        damaged = voxels.view(Array) if identifier in self.damaged else voxels
        return damaged, np.zeros((1, 8, 8, 8), np.int16), None, {"class_locations": {}}


class Labels:
    all_labels, has_ignore_label = [1], False


def loader(dataset: Dataset, transforms=None) -> RedrawingLoader:
    return RedrawingLoader(dataset, 2, (8, 8, 8), (8, 8, 8), Labels(), transforms=transforms)


def test_others_are_drawn() -> None:
    made = loader(Dataset({"b"}))
    batches = [next(made) for _ in range(20)]
    assert {str(key) for batch in batches for key in batch["keys"]} == {"a", "c"}
    for batch in batches:
        assert [chr(int(image.mean())) for image in batch["data"]] == list(batch["keys"])
    assert batches[-1]["unreadable"] == {
        "b": "case b: its image in preprocessed cannot be read (RuntimeError: Error while getting the slice)"
    }


def test_a_case_that_can_be_read_again_is_no_longer_one_that_cannot() -> None:
    dataset = Dataset({"a", "b"})
    made = loader(dataset)
    assert set(next(made)["unreadable"]) <= {"a", "b"}
    dataset.damaged = set()
    for _ in range(20):
        last = next(made)
    assert last["unreadable"] == {}
    # one fault at a time, of every case in the end, is not a folder that was emptied
    for case in "abcabc":
        dataset.damaged = {case}
        for _ in range(10):
            next(made)


@pytest.mark.parametrize("ending", [".b2nd", ".npz"])
def test_the_first_stage_has_segmented_every_case(tmp_path: Path, ending: str) -> None:
    dataset = Dataset(set())
    dataset.folder_with_segs_from_previous_stage = None
    check_first_stage(dataset)
    dataset.folder_with_segs_from_previous_stage = str(tmp_path / "predicted_next_stage")
    with pytest.raises(FileNotFoundError, match="of 3 of 3 cases, such as a: train"):
        check_first_stage(dataset)
    (tmp_path / "predicted_next_stage").mkdir()
    for case in "ac":
        (tmp_path / "predicted_next_stage" / f"{case}{ending}").touch()
    with pytest.raises(FileNotFoundError, match="of 1 of 3 cases, such as b: .* every fold that holds one out"):
        check_first_stage(dataset)
    (tmp_path / "predicted_next_stage" / f"b{ending}").touch()
    check_first_stage(dataset)


def test_what_is_drawn_does_not_depend_on_what_failed_before() -> None:
    """A continued training knows nothing of failures before it."""
    made = loader(Dataset({"b"}))
    for _ in range(10):
        next(made)
    np.random.seed(1)
    later = [list(next(made)["keys"]) for _ in range(10)]
    np.random.seed(1)
    fresh = loader(Dataset({"b"}))
    assert later == [list(next(fresh)["keys"]) for _ in range(10)]


def test_no_case_is_left() -> None:
    with pytest.raises(UnreadableCase, match="none of the 3 cases can be read; preprocess again. First: case "):
        next(loader(Dataset({"a", "b"}, missing={"c"})))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_error_that_is_not_of_the_files(error: type[Exception]) -> None:
    """Of one case alone: it is not drawn over."""

    def broken(image, **_):
        if image.mean() == ord("b"):
            raise error("of a transform")
        return {"image": image, "segmentation": image}

    made = loader(Dataset(set()), broken)
    with pytest.raises(error, match="of a transform"):
        for _ in range(100):
            next(made)


class Hiccups(Dataset):
    """Cannot be read a number of times, and then can."""

    def __init__(self, count: int) -> None:
        super().__init__(set())
        self.count, self.failed = count, False

    def load_case(self, identifier: str):
        self.failed = not self.failed and self.count > 0  # the second reading, of fault_of, succeeds
        if self.failed:
            self.count -= 1
            raise OSError("Input/output error")
        return super().load_case(identifier)


def test_a_passing_error_is_drawn_over() -> None:
    dataset, keys = Hiccups(3), []
    for data in (dataset, Dataset(set())):
        np.random.seed(1)
        made = loader(data)
        batches = [next(made) for _ in range(5)]
        keys.append([list(batch["keys"]) for batch in batches])
        assert batches[-1]["unreadable"] == {}
    assert dataset.count == 0 and keys[0] == keys[1]  # and the same is drawn as without
    with pytest.raises(OSError, match="Input/output error"):
        next(loader(Hiccups(1000)))


def test_what_is_wrong_with_a_case() -> None:
    assert fault_of(Dataset(set()), "a") is None
    assert "its files in preprocessed cannot be read (FileNotFoundError: a.b2nd)" in fault_of(
        Dataset(set(), {"a"}), "a"
    )
