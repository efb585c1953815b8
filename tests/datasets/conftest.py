"""An empty nnUNet_raw, a folder of scans, and what the tests of dataset prepare share."""

import json
from pathlib import Path

import pytest

from hyspark_nnunet.datasets.prepare import PrepareOptions
from tests.datasets.scans import ct, write

TARGET = "Dataset060_Scans"


def options(folder: Path | str | None, **more: object) -> PrepareOptions:
    given = {"dataset_id": 60, "name": "Scans", **more}
    return PrepareOptions(str(folder) if folder else None, **given)  # type: ignore[arg-type]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Formats mixed, nested."""
    folder = tmp_path / "scans"
    for i, name in enumerate(("one.nii.gz", "site A/two.nrrd", "site A/three.mha", "four.nii")):
        write(ct(i), folder / name)
    return folder


def content(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def remains(raw: Path) -> list[str]:
    return sorted(path.name for path in raw.iterdir())
