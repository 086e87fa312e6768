"""What is shipped beside the code: type markers, presets, the citation, pictures and links."""

from __future__ import annotations

import re
import runpy
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "memory_server", "trainer", "cluster")
PAGES = ["README.md", "docs/comparison.md", "docs/operations.md", "docs/tutorial.md"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py tells setuptools; nothing is built."""
    heard: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", heard.update)
    monkeypatch.chdir(CHECKOUT)
    runpy.run_path(str(CHECKOUT / "setup.py"))
    return heard


def test_every_package_says_that_it_is_typed_in_the_wheel_too(told: dict[str, Any]) -> None:
    for name in PACKAGES:
        assert (CHECKOUT / name / "py.typed").is_file()
        assert name in told["packages"]
        assert "py.typed" in told["package_data"][name]


def test_files_that_are_not_python_are_in_the_wheel(told: dict[str, Any]) -> None:
    """Every data file of a package matches a pattern of its package_data."""
    folders = {name: CHECKOUT / name.replace(".", "/") for name in told["packages"]}
    folders.update({name: CHECKOUT / path for name, path in told["package_dir"].items()})
    left_out = []
    for name, folder in folders.items():
        patterns = told["package_data"].get(name, [])
        kept = {found for pattern in patterns for found in folder.glob(pattern)}
        files = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
        left_out += sorted(str(path.relative_to(CHECKOUT)) for path in files - kept)
    assert left_out == []
    assert any(folder.name == "configs" for folder in folders.values())


def test_the_citation_has_what_cff_asks_for(told: dict[str, Any]) -> None:
    """The keys that the Citation File Format 1.2.0 requires, and the forms of those that it has."""
    cited = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["type"] in {"software", "dataset"}
    assert str(cited["version"]) == told["version"]
    assert cited["license"] == told["license"]
    person, entity = {"family-names", "given-names", "orcid"}, {"name", "website"}
    paper = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    for author in cited["authors"] + paper["authors"]:
        assert set(author) <= person or set(author) <= entity
    assert re.fullmatch(r"10\.\d{4,9}/\S+", paper["doi"])
    assert isinstance(paper["year"], int)
    for identifier in paper["identifiers"]:
        assert identifier["type"] in {"doi", "url", "swh", "other"}
        assert identifier["value"]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    path = CHECKOUT / page
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    targets = [link.split("#")[0] for link in links if "://" not in link]
    assert targets
    assert [link for link in targets if link and not (path.parent / link).exists()] == []


def test_every_claim_of_the_comparison_has_its_source() -> None:
    """Each mark of the table is explained below it, and none is explained for nothing."""
    page = (CHECKOUT / "docs" / "comparison.md").read_text(encoding="utf-8")
    table, sources = page.split("## Where it stands")
    marks = {
        mark for marks in re.findall(r"\[([a-z]\d[^\]]*)\]", table) for mark in marks.split(", ")
    }
    explained = set(re.findall(r"\[([a-z]\d)\]", sources))
    assert len(marks) >= 20
    assert marks == explained


def test_the_picture_is_svg_that_needs_nothing_from_elsewhere() -> None:
    text = (CHECKOUT / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    picture = xml.dom.minidom.parseString(text).documentElement
    assert picture is not None
    assert picture.tagName == "svg"
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<script|<image|@import|href=|url\(\s*['\"]?https?:", text)
