"""The bodies of messages other than searches: entries, errors, what a relay is told."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_server import errors
from memory_server.api import Entry
from memory_server.errors import BadMessage, MemoryServerError
from memory_server.wire.frames import pack_body, unpack_body

MAX_ERROR_CHARACTERS = 4000
ERROR_TYPES: Mapping[str, type[Exception]] = {
    "ValueError": ValueError,
    "TimeoutError": TimeoutError,
    **{
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, MemoryServerError)
    },
}
"""The errors that are rebuilt from their names. All others arrive as MemoryServerError."""

Arrays = Mapping[str, npt.NDArray[Any]]


def pack_ids(ids: Sequence[int], domains: Sequence[str] = ()) -> bytes:
    fields = {"domains": list(domains)} if domains else {}
    return pack_body(fields, {"ids": np.asarray(ids, dtype=np.int64)})


def unpack_ids(body: bytes) -> tuple[list[int], tuple[str, ...]]:
    """The ids of the entries that are asked for, and the domains that they must be of (none: any).

    Raises:
        BadMessage: it is something else.
    """
    fields, arrays = unpack_body(body)
    ids: list[int] = _array(arrays, "ids", ("<i8",), 1).tolist()
    domains = fields.get("domains", [])
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        raise BadMessage("domains are a list of names")
    return ids, tuple(domains)


def pack_entries(entries: Sequence[Entry]) -> bytes:
    """Texts as JSON in an array of bytes: they may exceed what a header holds."""
    texts = json.dumps([[entry.text, entry.title, entry.source] for entry in entries])
    return pack_body(
        {},
        {
            "ids": np.array([entry.id for entry in entries], dtype=np.int64),
            "doc_ids": np.array([entry.doc_id for entry in entries], dtype=np.int64),
            "tokens": np.array([entry.tokens for entry in entries], dtype=np.int64).reshape(
                len(entries), -1 if entries else 0
            ),
            "texts": np.frombuffer(texts.encode(), dtype=np.uint8),
        },
    )


def unpack_entries(body: bytes) -> list[Entry]:
    """Raises BadMessage."""
    _, arrays = unpack_body(body)
    ids = _array(arrays, "ids", ("<i8",), 1)
    doc_ids = _array(arrays, "doc_ids", ("<i8",), 1, len(ids))
    tokens = _array(arrays, "tokens", ("<i8",), 2, len(ids))
    try:
        texts = json.loads(_array(arrays, "texts", ("|u1",), 1).tobytes())
    except (ValueError, RecursionError) as error:
        raise BadMessage("the entries' texts are not JSON") from error
    if not isinstance(texts, list) or len(texts) != len(ids):
        raise BadMessage("each entry needs its texts")
    found = []
    for entry_id, doc_id, row, words in zip(
        ids.tolist(), doc_ids.tolist(), tokens.tolist(), texts, strict=True
    ):
        if not isinstance(words, list) or [type(word) for word in words] != [str] * 3:
            raise BadMessage("an entry has a text, a title and a source")
        text, title, source = words
        found.append(
            Entry(
                id=entry_id, doc_id=doc_id, tokens=tuple(row), text=text, title=title, source=source
            )
        )
    return found


def pack_error(error: Exception) -> bytes:
    message = str(error)
    name = type(error).__name__
    if ERROR_TYPES.get(name) is not type(error):
        message = f"{name}: {message}"
        name = "ValueError" if isinstance(error, ValueError) else "MemoryServerError"
    return pack_body({"type": name, "message": message[:MAX_ERROR_CHARACTERS]}, {})


def unpack_error(body: bytes) -> Exception:
    """The error to raise, of a type of `ERROR_TYPES`. Raises BadMessage."""
    fields, _ = unpack_body(body)
    name, message = fields.get("type"), fields.get("message")
    if not isinstance(name, str) or not isinstance(message, str):
        raise BadMessage("an error has a type and a message")
    return ERROR_TYPES.get(name, MemoryServerError)(message)


def pack_group(members: Sequence[tuple[int, str]]) -> bytes:
    """The shards that a relay asks, with their endpoints."""
    return pack_body({"members": [list(member) for member in members]}, {})


def unpack_group(frame: bytes) -> list[tuple[int, str]]:
    """Raises BadMessage."""
    fields, _ = unpack_body(frame)
    members = fields.get("members")
    if not isinstance(members, list) or not members:
        raise BadMessage("a relay is told which shards to ask")
    for member in members:
        if (
            not isinstance(member, list)
            or len(member) != 2
            or type(member[0]) is not int
            or not isinstance(member[1], str)
            or not member[1].startswith("tcp://")
        ):
            raise BadMessage("a relay is told each shard's number and endpoint")
    return [(shard, endpoint) for shard, endpoint in members]


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int:
        raise BadMessage(f"{name}={value!r} must be an integer")
    return value


def _array(
    arrays: Arrays, name: str, dtypes: Sequence[str], dimensions: int, *leading: int
) -> npt.NDArray[Any]:
    """The array of this name. Raises BadMessage: it is missing, or of another type or shape."""
    array = arrays.get(name)
    if array is None:
        raise BadMessage(f"array {name!r} is missing")
    if (
        array.dtype.str not in dtypes
        or array.ndim != dimensions
        or array.shape[: len(leading)] != leading
    ):
        raise BadMessage(
            f"array {name!r} is {array.dtype.str} of shape {array.shape}; {' or '.join(dtypes)} "
            f"with {dimensions} dimensions, the first {leading}, is needed"
        )
    return array
