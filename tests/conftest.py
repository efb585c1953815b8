"""Geometries that the tests of the networks share, and the order of the files."""

import locale
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

from tests.small_networks import cubic, small_arguments

# a busy machine is slow, not wrong
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@dataclass(frozen=True)
class Geometry:
    """A network's plan-shaped arguments with an image size that fits."""

    name: str
    image_size: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    input_channels: int = 1

    def arguments(self) -> dict:
        return small_arguments(
            len(self.strides),
            input_channels=self.input_channels,
            conv_op=torch.nn.Conv3d if len(self.image_size) == 3 else torch.nn.Conv2d,
            kernel_sizes=self.kernel_sizes,
            strides=self.strides,
        )


def _cubic(n_stages: int) -> dict:
    return {name: cubic(n_stages)[name] for name in ("kernel_sizes", "strides")}


GEOMETRIES = [
    Geometry("two stages, cube", (8, 8, 8), **_cubic(2)),
    Geometry("four stages, not a cube", (16, 24, 40), **_cubic(4)),
    Geometry("five stages", (32, 48, 16), **_cubic(5)),
    Geometry(
        "anisotropic, two channels",
        (4, 24, 16),
        kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)),
        input_channels=2,
    ),
    Geometry(
        "strides 3 and 4, kernel 5",
        (9, 24, 12),
        kernel_sizes=((5, 3, 3), (1, 5, 3), (3, 3, 3)),
        strides=((1, 1, 1), (3, 4, 2), (1, 2, 2)),
        input_channels=3,
    ),
    Geometry("plane", (24, 32), kernel_sizes=((3, 3),) * 3, strides=((1, 1), (2, 2), (2, 2)), input_channels=2),
]


# minutes each: begun first, so that none of them runs alone at the end while the other processes have nothing left
LONG = (
    "test_nnunet_features",
    "test_commands",
    "test_torchrun",
    "test_continuing",
    "test_faults",
    "test_real_scans",
    "test_few_labels_commands",
    "test_quick_start",
    "test_kills",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def kept_locale() -> Iterator[None]:
    """SimpleITK's DICOM writer, which tests use, leaves the process in the locale "C"."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(params=GEOMETRIES, ids=lambda geometry: geometry.name)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return request.param
