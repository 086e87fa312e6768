"""Which pages there are, writing them, and finding those that are not what the code says."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from cluster.reference.api import api_page
from cluster.reference.commands import commands_page
from cluster.reference.configuration import configuration_page

FOLDER = Path("docs") / "reference"


def pages(root: Path) -> dict[Path, str]:
    """Every page's path, relative to the checkout, and its text as the code is now."""
    return {
        FOLDER / "configuration.md": configuration_page(root / "configs"),
        FOLDER / "commands.md": commands_page(),
        FOLDER / "api.md": api_page(root),
    }


def write_pages(root: Path) -> list[Path]:
    """Write those pages that have changed, and name them."""
    changed = []
    for path, text in pages(root).items():
        target = root / path
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def outdated(root: Path) -> Iterator[tuple[Path, str]]:
    """Pages that are missing or old, each with its first lines that differ."""
    for path, text in pages(root).items():
        target = root / path
        there = target.read_text(encoding="utf-8") if target.is_file() else ""
        if there != text:
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), n=0, lineterm="")
            yield path, "\n".join(list(lines)[2:12])
