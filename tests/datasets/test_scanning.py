"""Scans are found whatever they are called; names are unique and stay."""

from pathlib import Path
from typing import NamedTuple

import pytest

from hyspark_nnunet.datasets.case_names import unique_names, usable_name
from hyspark_nnunet.datasets.excluded_masks import masks_of_cases
from hyspark_nnunet.datasets.grouping import cases_by_folder, cases_by_suffix
from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.datasets.scanning import Scan, find_scans, skipped_text, spread_text
from tests.datasets.dicom_files import header as pydicom_header
from tests.datasets.scans import ct, write, write_dicom_series


def scan(relative: str, ending: str = ".nii.gz") -> Scan:
    return Scan(relative, (f"/scans/{relative}{ending}",), ending)


def test_every_format_nested_and_dicom(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "deep/er/b.nrrd", "deep/c.mha", "d.nii"):
        write(ct(), tmp_path / name)
    write_dicom_series(ct(), tmp_path / "patient/one", [f"{k}" for k in range(6)])
    write_dicom_series(ct(), tmp_path / "patient/two", [f"{k}.dcm" for k in range(6)])
    write_dicom_series(ct(), tmp_path / "patient/two", [f"x{k}.dcm" for k in range(6)], uid="1.2.3.4")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / ".hidden.nii.gz").write_text("")
    found = find_scans(tmp_path)
    files = [s.relative + s.ending for s in found.scans if not s.is_series]
    assert files == ["a.nii.gz", "d.nii", "deep/c.mha", "deep/er/b.nrrd"]
    series = [s for s in found.scans if s.is_series]
    assert [len(s.files) for s in series] == [6, 6, 6] and {s.modality for s in series} == {"CT"}
    assert series[0].relative == "patient/one"
    assert all(s.relative.startswith("patient/two/series-") for s in series[1:])
    assert found.spread == [("patient/one", "patient/two")]  # the same series in both
    assert "several folders: 1 (patient/one, patient/two). Each folder becomes a scan" in spread_text(found.spread)
    assert found.skipped == {".txt": (1, ("notes.txt",)), "hidden": (1, (".hidden.nii.gz",))}


def test_what_is_passed_over_is_named_with_the_reason(tmp_path: Path) -> None:
    write(ct(), tmp_path / "a.nii.gz")
    for name in ("s/b.hdr", "s/b.img", "c.dcm", "d", "._a.nii.gz", "e.zip", *(f"{i}.json" for i in range(5))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no scan")
    (tmp_path / "link.dcm").symlink_to(tmp_path / "gone")
    segmentation = pydicom_header("1.2.840.10008.5.1.4.1.1.66.4", "SEG")
    segmentation.Rows = 4
    segmentation.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    pydicom_header("1.2.840.10008.5.1.4.1.1.88.11", "SR").save_as(tmp_path / "report", enforce_file_format=True)
    text = skipped_text(find_scans(tmp_path).skipped)
    for part in (
        "5 .json (0.json, 1.json, 2.json, ...)",
        "1 .hdr (s/b.hdr: half of a pair",
        "1 .dcm (c.dcm: not DICOM: lacks the mark DICM",
        "1 without ending (d: not DICOM",
        "1 hidden (._a.nii.gz)",
        "1 .zip (e.zip: packed: unpack it)",
        "1 missing (a broken link) or not a file (link.dcm)",
        "1 DICOM SEG, not a scan (seg.dcm)",
        "1 DICOM SR, not a scan (report)",
    ):
        assert part in text


def test_names_that_nnunet_reserves_or_cannot_write_are_not_given() -> None:
    names = unique_names(
        [("liver_0", ".nii.gz"), ("liver_0_seg", ".nii.gz"), ("x" * 300, ".nii.gz"), ("b\udcff", ""), ("c.nii", "")]
    )
    assert names[0] == "liver_0" and names[1].startswith("liver_0_seg-") and len(names[2]) < 180
    assert names[4].startswith("c.nii-")  # ITK would write c.nii.nii.gz as c.nii.gz
    assert names[3].startswith("b--") and usable_name("Dataset004_a_seg").startswith("Dataset004_a_seg-")


def test_patterns_and_layout(tmp_path: Path) -> None:
    for name in ("s1/ct.nii.gz", "s1/segmentations/liver.nii.gz", "s2/ct.nii.gz"):
        write(ct(), tmp_path / name)
    assert [s.relative for s in find_scans(tmp_path, include=["*/ct.nii.gz"]).scans] == ["s1/ct", "s2/ct"]
    assert len(find_scans(tmp_path, exclude=["*/segmentations/*"]).scans) == 2
    write(ct(), tmp_path / "imagesTr/x_0000.nii.gz")
    assert [s.relative for s in find_scans(tmp_path).scans] == ["x_0000"]


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_scans(tmp_path / "none")
    (tmp_path / "a.png").write_text("")
    with pytest.raises(FileNotFoundError, match="no scans in .*skipped: 1 .png"):
        find_scans(tmp_path)


def test_names_are_unique_and_do_not_depend_on_the_neighbours() -> None:
    paths = ["a/b__c", "a__b/c", "a/b/c", "a b", "a-b", "ä", "x/y", "x__y", "Scan 1", "q"]
    names = unique_names([(path, ".nii.gz") for path in paths])
    assert len({name.lower() for name in names}) == len(paths)
    assert names[-1] == "q" and names[6].startswith("x__y")
    alone = [unique_names([(path, ".nii.gz")])[0] for path in ("a b", "Scan 1", "ä", "a/b__c", "q")]
    assert alone == [names[3], names[8], names[5], names[0], "q"]
    twins = unique_names([("a", ".nii.gz"), ("a", ".nrrd")])
    assert twins[0] != twins[1] and all(name.startswith("a-") for name in twins)
    altered = unique_names([("p 1/ct", ".nii.gz"), ("p 1/ct", ".nii")])
    assert altered[0] != altered[1] and all(name.startswith("p-1__ct-") for name in altered)


def test_two_scans_of_one_name_are_refused() -> None:
    """Without a suffix, and with that of the first channel."""
    with pytest.raises(ValueError, match=r"two scans would be one case: a\.nii\.gz: --exclude one"):
        cases_by_suffix([scan("a"), scan("a_0000")], None)


def test_suffixes_are_channels() -> None:
    scans = [scan(f"{case}_{c:04d}") for case in ("p1", "p2", "p3") for c in (0, 1)]
    del scans[3]
    grouped = cases_by_suffix(scans, 2)
    assert [case.name for case in grouped.cases] == ["p1", "p3"]
    assert [s.relative for s in grouped.cases[1].scans] == ["p3_0000", "p3_0001"]
    assert grouped.incomplete == {"p2": "channel _0001 is missing"}


def test_suffixes_that_may_number_the_scans_are_refused() -> None:
    scans = [scan(f"scan_{k:04d}") for k in range(5)]
    with pytest.raises(ValueError, match=r"_0001.*one channel is expected.*from 0 to 4.*--no-suffix"):
        cases_by_suffix(scans, None)
    with pytest.raises(ValueError, match="--channels names 2"):
        cases_by_suffix(scans, 2)
    names = [case.name for case in cases_by_suffix(scans, None, numbers_in_names=True).cases]
    assert names == [f"scan_{k:04d}" for k in range(5)]


def test_folders_are_channels() -> None:
    t1 = [scan("p1_0000"), scan("sub/p2")]
    t2 = [scan("p1", ".mha"), scan("p3_0001")]
    grouped = cases_by_folder({"T1": t1, "T2": t2})
    assert [(case.name, [s.ending for s in case.scans]) for case in grouped.cases] == [("p1", [".nii.gz", ".mha"])]
    assert grouped.incomplete == {"p3": "channel T1 is missing", "sub__p2": "channel T2 is missing"}
    with pytest.raises(ValueError, match="channel T1 has two scans for one case"):
        cases_by_folder({"T1": [scan("p"), scan("p", ".mha")], "T2": []})


def test_a_scan_never_takes_the_mask_of_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("p2/ct", "elsewhere/whole", "p4/mr"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    cases = cases_by_suffix([scan("p1/ct"), scan("p2/ct_0000"), scan("p3/whole")], None).cases
    masks = masks_of_cases(tmp_path, cases, 1)
    assert masks == {"p2__ct": str(tmp_path / "p2/ct.nii.gz"), "p3__whole": str(tmp_path / "elsewhere/whole.nii.gz")}
    assert "masks for 2 of 3 cases; 1 masks fit no scan, such as p4/mr" in capsys.readouterr().out
    (tmp_path / "p2/ct.nrrd").touch()
    with pytest.raises(ValueError, match=r"2 masks in .* fit the scan p2/ct_0000: .*ct.nii.gz, .*ct.nrrd. Remove all"):
        masks_of_cases(tmp_path, cases, 1)


class Job(NamedTuple):
    name: str


def divide(job: Job) -> float:
    return 1 / len(job.name)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_fails_unexpectedly_names_its_case(processes: int) -> None:
    with pytest.raises(RuntimeError, match="case : ZeroDivisionError: division by zero"):
        list(for_each(divide, [Job("a"), Job("")], processes, ""))
