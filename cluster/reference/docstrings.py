"""Google-style docstrings as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from textwrap import dedent

from cluster.reference.markdown import escaped, prose

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_HEADER = re.compile(rf"({'|'.join(_SECTIONS)}):(?: (.+))?")
_LISTED = {
    # Several names may share a text: `encoder, weights: what makes the keys`.
    "Args": re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): "),
    "Attributes": re.compile(r"(\w+(?:, \w+)*): "),
    "Raises": re.compile(r"([A-Z]\w+(?:, [A-Z]\w+)*): "),
}


def docstring_markdown(docstring: str) -> str:
    """A docstring's text, its sections as lists or paragraphs under their names."""
    parts = []
    for section, lines in _split(cleandoc(docstring).splitlines()):
        if section is None:
            parts.append(prose("\n".join(lines)))
        elif section in _LISTED:
            items = "\n".join(_item(item, section) for item in _items(lines, section))
            parts.append(f"{section}:\n\n{items}")
        else:
            parts.append(f"{section}: {prose(chr(10).join(lines))}")
    return "\n\n".join(part for part in parts if part)


def _split(lines: Sequence[str]) -> Iterator[tuple[str | None, list[str]]]:
    """A docstring's sections, the text before them first, without their indentation.

    A section ends where a line is not indented any more.
    """
    name: str | None = None
    held: list[str] = []
    for line in lines:
        header = _HEADER.fullmatch(line)
        ends = name is not None and bool(line) and not line.startswith(" ")
        if header or ends:
            yield name, dedent("\n".join(held)).strip("\n").splitlines()
            name, held = None, []
        if header:
            name = header[1]
            # `Attributes: as of Thing, but ...`, on the header's own line.
            held = [f"    {header[2]}"] if header[2] else []
        else:
            held.append(line)
    yield name, dedent("\n".join(held)).strip("\n").splitlines()


def _items(lines: Sequence[str], section: str) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if held and _LISTED[section].match(line):
            yield " ".join(held)
            held = []
        if line.strip():
            held.append(line.strip())
    if held:
        yield " ".join(held)


def _item(text: str, section: str) -> str:
    named = _LISTED[section].match(text)
    if named is None:
        return f"- {escaped(text)}"
    names = ", ".join(f"`{name}`" for name in named[1].split(", "))
    return f"- {names}: {escaped(text[named.end() :])}"
