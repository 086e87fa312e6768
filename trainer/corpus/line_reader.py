"""Bytes of a text file, plain or gzip, to lines, with errors that name the file and the line."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from trainer.corpus.documents import MAX_DOCUMENT_CHARACTERS, too_long
from trainer.corpus.errors import CorpusError

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MAX_LINE_BYTES = 4 * MAX_DOCUMENT_CHARACTERS


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file, through gzip if its name ends in .gz; unreadable or damaged is a CorpusError."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast(BinaryIO, packed)
        else:
            with path.open("rb") as handle:
                yield handle
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(
            f"{path} is damaged or not gzip ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror or error}); check that it exists and its "
            "permissions"
        ) from error


def decode(data: bytes, path: Path, line: int) -> str:
    """Decode UTF-8 strictly.

    Raises:
        CorpusError: it is not UTF-8; names the line and the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = " It begins like UTF-16." if line == 1 and data[:2] in UTF16_MARKS else ""
        raise CorpusError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at "
            f"{error.start}).{wide} Convert the file, for example: "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) and hold one line at a time."""
    with open_bytes(path) as handle:
        number = 0
        while data := handle.readline(MAX_LINE_BYTES):
            number += 1
            if len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
                raise too_long(f"{path}, line {number}")
            if number == 1:
                data = data.removeprefix(UTF8_MARK)
            yield number, decode(data, path, number)
