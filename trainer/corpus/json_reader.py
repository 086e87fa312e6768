"""A reader of JSON files: an array of rows or an object of title to text, parsed piece by piece.

Only one value is in memory at a time, so a file may be larger than memory. A .json file whose
lines are each an object is read as JSON Lines, as many data sets name them so.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from trainer.corpus.documents import (
    MAX_DOCUMENT_CHARACTERS,
    Document,
    Fields,
    checked_document,
    document_from_row,
)
from trainer.corpus.errors import CorpusError
from trainer.corpus.line_reader import UTF8_MARK, open_bytes
from trainer.corpus.text_readers import read_json_lines

READ_BYTES = 1 << 20
LONGEST_VALUE = 2 * MAX_DOCUMENT_CHARACTERS
SPACE = " \t\r\n"


def read_json(path: Path, source: str, fields: Fields) -> Iterator[Document]:
    """Yield the documents of an array of objects or strings, or of an object of title to either."""
    if _is_json_lines(path):
        yield from read_json_lines(path, source, fields)
        return
    cursor = _Cursor(path)
    opening = cursor.next_character()
    if opening == "":
        return
    if opening not in "[{":
        raise CorpusError(
            f"{path}: begins with {opening!r}; a JSON file must be an array of rows or an object "
            "of title to text (JSON Lines: name it .jsonl)"
        )
    closing = "]" if opening == "[" else "}"
    row = 0
    following = cursor.next_character()
    while following != closing:
        row += 1
        cursor.put_back(following)
        place = f"{path}, row {row}"
        title = ""
        if opening == "{":
            key = cursor.value(place)
            if not isinstance(key, str) or cursor.next_character() != ":":
                raise CorpusError(f"{place}: not JSON (a title and a colon were expected)")
            title = key
        value = cursor.value(place)
        if opening == "{" and title == fields.text and isinstance(value, str):
            raise CorpusError(
                f"{path}: a single object with a field {fields.text!r} could be one row or titles; "
                "put rows into an array, or name the file .jsonl"
            )
        yield _document(value, title, fields, source, place)
        following = cursor.next_character()
        if following == ",":
            following = cursor.next_character()
            if following == closing:
                raise CorpusError(f"{place}: not JSON (a comma before {closing!r})")
        elif following != closing:
            raise CorpusError(
                f"{place}: not JSON ({following or 'the end of the file'!r} where ',' or "
                f"{closing!r} was expected); the file is damaged or cut short"
            )
    if (rest := cursor.next_character()) != "":
        raise CorpusError(
            f"{path}: {rest!r} follows the end of the JSON; JSON Lines: name it .jsonl"
        )


def _document(value: object, title: str, fields: Fields, source: str, place: str) -> Document:
    if value is None or isinstance(value, str):
        return checked_document(text=value or "", title=title, source=source, place=place)
    if isinstance(value, dict):
        return document_from_row(value, fields, source=source, place=place, title=title)
    raise CorpusError(
        f"{place}: holds {type(value).__name__}; a text or an object with a field {fields.text!r} "
        "is needed"
    )


def _is_json_lines(path: Path) -> bool:
    """True when the first line is a whole object and another object follows it."""
    with open_bytes(path) as handle:
        head = handle.read(READ_BYTES)
    first, end, rest = head.removeprefix(UTF8_MARK).lstrip().partition(b"\n")
    if not end or not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return False


class _Cursor:
    """Walks over the values of a JSON text, reading on when a value is not whole yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces = self._read()
        self._buffer = ""
        self._at = 0
        self._json = json.JSONDecoder()

    def _read(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
        with open_bytes(self._path) as handle:
            offset = 0
            while True:
                data = handle.read(READ_BYTES)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{self._path}: not UTF-8 near byte {offset + error.start}. "
                        "Convert the file, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW"
                    ) from error
                if text:
                    yield text
                if not data:
                    return
                offset += len(data)

    def _more(self, wanted: int) -> bool:
        """Read at least `wanted` characters on, if there are any; drop what was consumed."""
        pieces = [self._buffer[self._at :]]
        got = 0
        while got < wanted and (piece := next(self._pieces, "")):
            pieces.append(piece)
            got += len(piece)
        self._buffer, self._at = "".join(pieces), 0
        return got > 0

    def next_character(self) -> str:
        """The next character that is not space, consumed; empty at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                character = self._buffer[self._at]
                self._at += 1
                if character not in SPACE:
                    return character
            if not self._more(1):
                return ""

    def put_back(self, character: str) -> None:
        self._at -= len(character)

    def value(self, place: str) -> object:
        """The next JSON value, consumed. Doubles what it holds until the value is whole."""
        self.put_back(self.next_character())
        while True:
            try:
                value, self._at = self._json.raw_decode(self._buffer, self._at)
                return value
            except (json.JSONDecodeError, RecursionError) as error:
                held = len(self._buffer) - self._at
                if held > LONGEST_VALUE or not self._more(max(held, 1)):
                    raise CorpusError(
                        f"{place}: not JSON ({error}); the file is damaged or cut short"
                    ) from error
