"""Google-style docstrings, taken apart and rendered as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import groupby

from cluster.reference.markdown import code, paragraphs, prose

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_NAMES = r"[*\w]+(?:, [*\w]+)*"
_ERRORS = r"[A-Z]\w+(?:(?:, | or )[A-Z]\w+)*"
# "Refused: names it." A new error begins behind a sentence or a semicolon.
_NEXT_ERROR = re.compile(rf"(?<=[.;]) (?={_ERRORS}(?:[:;]| \())")


def rendered(docstring: str) -> Iterator[str]:
    """The lines of Markdown of a docstring."""
    for title, text in sections(docstring):
        if not title:
            yield from paragraphs(text)
            continue
        yield from ["", f"*{title}*", ""]
        if title in ("Returns", "Yields"):
            yield from paragraphs(text)
        elif title == "Raises":
            yield from map(_error, _NEXT_ERROR.split(" ".join(text.split())))
        else:
            yield from (f"* {code(name)}: {prose(about)}" for name, about in items(text))


def sections(docstring: str) -> list[tuple[str, str]]:
    """Titles and texts, in order; the opening has no title.

    A section is a known title on a line of its own, and the indented lines below it.
    """
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(docstring).splitlines():
        if line.removesuffix(":") in _SECTIONS and line.endswith(":"):
            found.append((line.removesuffix(":"), []))
        elif found[-1][0] and line and not line.startswith(" "):
            found.append(("", [line]))  # text behind a section
        else:
            found[-1][1].append(line)
    texts = [(title, inspect.cleandoc("\n".join(["", *lines])).strip()) for title, lines in found]
    return [(title, text) for title, text in texts if text]


def items(text: str) -> list[tuple[str, str]]:
    """The names of a section and what is said of each; further lines of one are indented."""
    found: list[tuple[str, str]] = []
    for first, lines in groupby(text.splitlines(), key=lambda line: not line.startswith(" ")):
        for line in lines:
            named = re.match(rf"({_NAMES}):(?: (.*))?$", line) if first else None
            if named:
                found.append((named[1], named[2] or ""))
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}".lstrip())
            else:
                raise ValueError(f"{line!r} is no `name: what it is`, in a section of a docstring")
    return found


def _error(text: str) -> str:
    named = re.match(rf"({_ERRORS})(.*)", text, re.S)
    return f"* {code(named[1])}{prose(named[2])}" if named else f"* {prose(text)}"
