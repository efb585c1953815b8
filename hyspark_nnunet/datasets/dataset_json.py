"""nnU-Net's raw layout: dataset.json, with or without the ``dataset`` entry that lists files where they lie.

Mirrors ``get_filenames_of_train_images_and_targets`` of nnunetv2/utilities/utils.py.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

DATASET_JSON = "dataset.json"
OUR_KEY = "hyspark_nnunet"  # in dataset.json; nnU-Net passes over keys it does not know
LABELS = {"background": 0, "body": 1}
IGNORE = 2  # value of nnU-Net's "ignore" label where masks exclude voxels
FOLDER_NAME = re.compile(r"Dataset(\d{3})_(\w[\w.-]*)")


class CaseFiles(NamedTuple):
    """Files of one case as dataset.json lists them: absolute, or relative to its folder, with or without $VARIABLES."""

    images: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class RawDataset:
    """A dataset of nnUNet_raw.

    Attributes:
        folder: where dataset.json is.
        content: of dataset.json, without its ``dataset``.
        cases: files by case name, sorted.
        listed: whether dataset.json lists the files.
    """

    folder: Path
    content: dict[str, Any]
    cases: dict[str, CaseFiles] = field(repr=False)
    listed: bool

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def channel_names(self) -> tuple[str, ...]:
        names = self.content["channel_names"]
        return tuple(str(names[key]) for key in sorted(names, key=int))

    @property
    def body_labels(self) -> str | None:
        """ "foreground" or "none" if this package made the label files, None if they are somebody's labels."""
        return self.content.get(OUR_KEY, {}).get("labels")

    def path(self, listed: str) -> str:
        return resolved(listed, self.folder)


def resolved(listed: str, folder: Path) -> str:
    """The absolute path that nnU-Net makes of an entry."""
    return os.path.abspath(os.path.join(folder, os.path.expandvars(listed)))


def raw_folder(given: str | Path | None = None) -> Path:
    """The folder of raw datasets.

    Args:
        given: None: the environment variable nnUNet_raw.

    Raises:
        ValueError: neither is given.
    """
    found = given or os.environ.get("nnUNet_raw")
    if not found:
        raise ValueError("nnUNet_raw is not set: export nnUNet_raw=FOLDER, or give --raw FOLDER")
    return Path(os.path.abspath(os.path.expanduser(found)))


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """Dataset060_Name.

    Raises:
        ValueError: nnU-Net cannot read such a name.
    """
    folder = f"Dataset{dataset_id:03d}_{name}"
    if not 1 <= dataset_id <= 999 or not FOLDER_NAME.fullmatch(folder):
        raise ValueError(
            f"no dataset can be called {folder}: the number is 1 to 999, the name of letters, digits, _ - and ."
        )
    return folder


def refuse_taken_id(target: Path) -> None:
    """nnU-Net refuses a number that two names share, in any of its three folders.

    Raises:
        ValueError: another dataset has the number.
    """
    folders = {str(target.parent), *filter(None, (os.environ.get(f"nnUNet_{k}") for k in ("preprocessed", "results")))}
    number = target.name[:10]
    for folder in sorted(folders):
        for other in sorted(Path(folder).glob(f"{number}*")):
            if other.is_dir() and other.name != target.name:
                raise ValueError(
                    f"number {number[7:]} is used by {other}, and nnU-Net allows one dataset per number: choose "
                    "another -d"
                )


def find_dataset(which: str | int, raw: Path) -> Path:
    """The folder of a dataset by number, name or path.

    Raises:
        FileNotFoundError: there is none, or several have the number.
    """
    text = str(which)
    if text.isdigit():
        found = sorted(folder for folder in raw.glob(f"Dataset{int(text):03d}_*") if folder.is_dir())
        if len(found) > 1:
            raise FileNotFoundError(
                f"several datasets have number {int(text)}: {', '.join(f.name for f in found)}; nnU-Net allows one"
            )
        if found:
            return found[0]
    for folder in (raw / text, Path(text).expanduser()):
        if (folder / DATASET_JSON).is_file():
            return Path(os.path.abspath(folder))
    there = ", ".join(sorted(folder.name for folder in raw.glob("Dataset*_*"))) or "none"
    raise FileNotFoundError(f"no dataset {text} in {raw}: there are {there}")


def read_dataset(folder: Path) -> RawDataset:
    """Reads dataset.json, and the folders' content where it does not list the files.

    Raises:
        FileNotFoundError: dataset.json or imagesTr is missing.
        ValueError: dataset.json is not nnU-Net's.
    """
    path = folder / DATASET_JSON
    if not path.is_file():
        raise FileNotFoundError(
            f"no {DATASET_JSON} in {folder}: for scans without labels, hyspark_nnunet dataset prepare makes it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    content = _checked(path, content)
    listed = content.pop("dataset", None)
    if listed is None:
        cases = _cases_in_folders(folder, content["file_ending"])
    else:
        cases = {name: CaseFiles(tuple(files["images"]), files.get("label")) for name, files in sorted(listed.items())}
    return RawDataset(folder, content, cases, listed is not None)


def made_here(folder: Path) -> bool:
    """Whether this package made the dataset in a folder."""
    try:
        return OUR_KEY in json.loads((folder / DATASET_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def without_files(content: Mapping[str, Any]) -> dict[str, Any]:
    """dataset.json without what names scans and where they lie: for results, which may be given away."""
    return {key: value for key, value in content.items() if key not in ("dataset", OUR_KEY)}


def dataset_json_text(
    channel_names: Sequence[str],
    cases: Mapping[str, CaseFiles],
    labels: str,
    reader: str,
    more: Mapping[str, Any] | None = None,
    with_ignore: bool = False,
) -> str:
    """The text of dataset.json of a dataset whose only label is the body.

    Args:
        channel_names: in order; "CT" has nnU-Net normalise by the whole set's intensities, others scan by scan.
        cases: files by case name.
        labels: "foreground" or "none", how the label files were made.
        reader: class of nnU-Net that reads images and labels.
        more: further entries below this package's key.
        with_ignore: label files have voxels with the ignore label.
    """
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channel_names)},
        "labels": {**LABELS, **({"ignore": IGNORE} if with_ignore else {})},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": reader,
        OUR_KEY: {"labels": labels, **(more or {})},
        "dataset": listed_cases(cases),
    }
    return json.dumps(content, indent=1) + "\n"


def listed_cases(cases: Mapping[str, CaseFiles]) -> dict[str, Any]:
    """The ``dataset`` entry."""
    return {name: {"images": list(files.images), "label": files.label} for name, files in sorted(cases.items())}


def _checked(path: Path, content: Any) -> dict[str, Any]:
    """The content of a dataset.json, once it is known to have nnU-Net's form; an older ``modality`` counts as names.

    Raises:
        ValueError: it has another form; shows the right one.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, {{...}}, not a {type(content).__name__}")
    if "channel_names" not in content and "modality" in content:  # nnU-Net takes that, too
        content = content | {"channel_names": content["modality"]}
    missing = [key for key in ("channel_names", "labels", "file_ending") if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which nnU-Net needs")
    names, labels, listed = content["channel_names"], content["labels"], content.get("dataset", {})
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or not names:
        raise ValueError(
            f'channel_names in {path} must be an object from numbers to names, such as {{"0": "CT"}}, but is '
            f"{_short(names)}"
        )
    if not isinstance(labels, dict) or not all(isinstance(value, int | list) for value in labels.values()):
        raise ValueError(
            f'labels in {path} must be an object from names to numbers, such as {{"background": 0, "liver": 1}}, but '
            f"is {_short(labels)}"
        )
    if not isinstance(content["file_ending"], str):
        raise ValueError(f'file_ending in {path} must be a text such as ".nii.gz", but is {content["file_ending"]}')
    form = '{"CASE": {"images": ["CASE_0000.nii.gz"], "label": "CASE.nii.gz"}}'
    if not isinstance(listed, dict):
        raise ValueError(f"dataset in {path} must be an object, such as {form}, but is {_short(listed)}")
    odd = [name for name, files in listed.items() if not _are_files(files)]
    if odd:
        raise ValueError(
            f"dataset in {path} must be an object, such as {form}; {len(odd)} cases have another form: "
            + ", ".join(f"{name}: {_short(listed[name])}" for name in odd[:3])
        )
    return content


def _are_files(files: Any) -> bool:
    """Whether an entry of ``dataset`` has its form; a missing label is a fault of the case."""
    if not isinstance(files, dict) or not isinstance(files.get("images"), list):
        return False
    return all(isinstance(image, str) for image in files["images"]) and isinstance(files.get("label", ""), str)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else f"{text[:97]}..."


def _cases_in_folders(folder: Path, ending: str) -> dict[str, CaseFiles]:
    images = folder / "imagesTr"
    if not images.is_dir():
        raise FileNotFoundError(f"no imagesTr in {folder}, and its {DATASET_JSON} lists no files")
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(images)):
        if match := pattern.fullmatch(name):
            found.setdefault(match[1], []).append(f"imagesTr/{name}")
        elif name.endswith(ending) and not name.startswith("."):
            found.setdefault(name[: -len(ending)], [])  # nnU-Net removes five characters and finds no image
    labels = set(os.listdir(folder / "labelsTr")) if (folder / "labelsTr").is_dir() else set()
    return {
        case: CaseFiles(tuple(files), f"labelsTr/{case}{ending}" if f"{case}{ending}" in labels else None)
        for case, files in found.items()
    }
