"""A file of entries' ids, one a line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from memory_server.store.names import INT64_MAX
from trainer.corpus.errors import CorpusError
from trainer.corpus.line_reader import read_lines

STDIN = Path("-")


def ids_in(path: Path) -> list[int]:
    """The ids of a file; blank lines are passed over. "-" is the standard input.

    Raises:
        CorpusError: the file cannot be read, a line is no id (named), or there is none.
    """
    lines: Iterable[tuple[int, str]] = (
        enumerate(sys.stdin, start=1) if path == STDIN else read_lines(path)
    )
    ids = []
    for number, line in lines:
        word = line.strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit() and len(word) <= 40) or int(word) > INT64_MAX:
            raise CorpusError(
                f"{path}, line {number}: {word[:40]!r} is no entry's id; give one whole number a "
                "line"
            )
        ids.append(int(word))
    if not ids:
        raise CorpusError(f"{path}: there is no id in it; give one a line")
    return ids
