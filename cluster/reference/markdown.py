"""What the references' pages share."""

from __future__ import annotations

GENERATED = "<!-- Written by `make docs` out of the program: change the program, not this. -->"


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
