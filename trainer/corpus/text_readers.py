"""Readers of line-oriented files: plain text, JSON Lines, CSV and TSV, each gzip too."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from trainer.corpus.documents import (
    MAX_DOCUMENT_CHARACTERS,
    Document,
    Fields,
    checked_document,
    document_from_row,
    too_long,
)
from trainer.corpus.errors import CorpusError
from trainer.corpus.line_reader import read_lines


def read_text(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield one document per block of lines; blank lines part the blocks. Titles are empty."""
    block: list[str] = []
    size = start = 0
    for number, line in read_lines(path):
        if line.strip():
            start = start if block else number
            block.append(line)
            size += len(line)
            if size > MAX_DOCUMENT_CHARACTERS:
                raise too_long(f"{path}, line {start}")
        elif block:
            yield _block(block, path, source, start)
            block, size = [], 0
    if block:
        yield _block(block, path, source, start)


def _block(block: list[str], path: Path, source: str, start: int) -> Document:
    text = "".join(block).rstrip("\r\n")
    return checked_document(text=text, title="", source=source, place=f"{path}, line {start}")


def read_json_lines(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield one document per line, each line a JSON object; blank lines are passed over."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorpusError(
                f"{place}: not JSON ({error}); JSON Lines has one whole object per line"
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(
                f"{place}: holds {type(row).__name__}, not an object; "
                f'write lines like {{"{fields.text}": "..."}}'
            )
        yield document_from_row(row, fields, source=source, place=place)


def read_csv(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield one document per row under a header row; tabs part the columns of a .tsv file."""
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    # The limit is global to the process, so it is put back.
    usual_limit = csv.field_size_limit(MAX_DOCUMENT_CHARACTERS)
    try:
        lines = (line for _, line in read_lines(path))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = next(rows, None)
        if header is None:
            return
        if header.count(fields.text) > 1:
            raise CorpusError(f"{path}: several columns are named {fields.text!r}; rename one")
        while True:
            place = f"{path}, line {rows.line_num + 1}"
            try:
                values = next(rows, None)
            except csv.Error as error:
                raise CorpusError(
                    f"{place}: not a row of this CSV ({error}); check its quotes and separators"
                ) from error
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(header):
                raise CorpusError(
                    f"{place}: {len(values)} columns under a header of {len(header)}; "
                    "quote fields that hold separators or line ends"
                )
            row = dict(zip(header, values, strict=True))
            yield document_from_row(row, fields, source=source, place=place)
    finally:
        csv.field_size_limit(usual_limit)
