"""Marks of the files that a corpus is read from, so that a re-run notices one that changed."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trainer.corpus.errors import CorpusError
from trainer.corpus.sources import Source

Mark = dict[str, Any]


def mark_files(
    sources: Sequence[Source], known: Iterable[Mapping[str, Any]], seen: Callable[[int, int], None]
) -> list[Mark]:
    """Describe each file by label, size, time and content hash.

    Args:
        known: earlier marks; the hash of a file with the same size and time is taken from them.
        seen: told files done and their total.

    Raises:
        CorpusError: a file cannot be read.
    """
    earlier = {(mark["label"], mark["bytes"], mark["modified_ns"]): mark["hash"] for mark in known}
    files = [file for source in sources for file in source.files]
    marks = []
    for number, file in enumerate(files, start=1):
        try:
            status = file.path.stat()
            key = (file.label, status.st_size, status.st_mtime_ns)
            digest = earlier.get(key)
            if digest is None:
                with file.path.open("rb") as handle:
                    digest = hashlib.file_digest(
                        handle, lambda: hashlib.blake2b(digest_size=16)
                    ).hexdigest()
        except OSError as error:
            raise CorpusError(
                f"{file.path} cannot be read ({error.strerror or error}); check its permissions"
            ) from error
        marks.append(
            dict(zip(("label", "bytes", "modified_ns", "hash"), (*key, digest), strict=True))
        )
        seen(number, len(files))
    return marks


def difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in one clause what two requests disagree on; None when they ask for the same corpus."""
    for name in sorted({*earlier["arguments"], *now["arguments"]}):
        before, after = earlier["arguments"].get(name), now["arguments"].get(name)
        if before != after:
            return f"{name} was {before!r} and is now {after!r}"
    before, after = _by_label(earlier["files"]), _by_label(now["files"])
    for label in sorted({*before, *after}):
        if label not in after:
            return f"the file {label} was read and is not there now"
        if label not in before:
            return f"the file {label} was not there before"
        if before[label] != after[label]:
            return f"the file {label} has changed"
    return None


def _by_label(marks: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    return {mark["label"]: (mark["bytes"], mark["hash"]) for mark in marks}
