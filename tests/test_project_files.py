"""Files that other programs read: the citation and the changelog."""

import re
from pathlib import Path

import yaml

from hyspark_nnunet import __version__

ROOT = Path(__file__).resolve().parents[1]


def loaded(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_has_what_the_format_requires() -> None:
    """Citation File Format 1.2.0, schema.json: the required keys of the file, of a reference and of a person."""
    citation = loaded("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    cited = [citation["preferred-citation"], *citation["references"]]
    assert {reference["type"] for reference in cited} == {"conference-paper", "article"}
    for part in (citation, *cited):
        assert part["title"] and part["authors"]
        for author in part["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    assert citation["message"] and str(cited[0]["year"]) == "2024"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_citation_and_the_readme_name_the_same_authors() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for reference in (loaded("CITATION.cff")["preferred-citation"], *loaded("CITATION.cff")["references"]):
        names = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in reference["authors"])
        assert names in readme and reference["title"] in readme


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == __version__
