"""From the paths that a user gives to an ordered stream of documents.

A document's id is its source's base plus its ordinal in the source, so that corpora built apart
can be plugged into one memory. The base comes from the source's name, not from where it lies.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.corpus.arrow_readers import dataset_files, read_arrow, read_parquet
from trainer.corpus.documents import Document, Fields
from trainer.corpus.errors import CorpusError
from trainer.corpus.json_reader import read_json
from trainer.corpus.text_readers import read_csv, read_json_lines, read_text

logger = logging.getLogger(__name__)

ORDINAL_BITS = 39
BASE_BYTES = 3

Reader = Callable[[Path, str, Fields], Iterator[Document]]
READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".ipc": read_arrow,
}
PACKED = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FORMATS_HELP = (
    "text (.txt: blank lines part documents), JSON Lines (.jsonl, .ndjson), JSON (.json: an "
    "array of rows, or an object of title to text or row), CSV and TSV with a header, each of "
    "these also as .gz; Parquet; Arrow IPC and Feather; a Hugging Face save_to_disk directory; or "
    "a directory of these"
)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file; `label` is the source that its entries show."""

    path: Path
    label: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One path that the user gave, with its files in reading order.

    Attributes:
        name: unique within a corpus; decides `base`.
        base: the first document id and entry id, a multiple of 2**39 below 2**63.
    """

    name: str
    base: int
    files: tuple[SourceFile, ...]

    def documents(self, fields: Fields) -> Iterator[Document]:
        """Yield the documents that hold more than space, in an order that never changes.

        Raises:
            CorpusError: a file is unreadable or damaged, or a row lacks the text; names both.
        """
        for file in self.files:
            read = reader_of(file.path)
            assert read is not None, "find_sources admits only files with a reader"
            for document in read(file.path, file.label, fields):
                if document.text.strip():
                    yield document


def find_sources(paths: Sequence[str | Path]) -> tuple[Source, ...]:
    """Find the files behind the given paths.

    Returns:
        Sources by ascending base, so that document ids never fall along the corpus.

    Raises:
        CorpusError: none given, one given twice, missing, of an unknown kind, or without files.
    """
    if not paths:
        raise CorpusError(f"no source given; give one or more of: {FORMATS_HELP}")
    resolved = [Path(path).expanduser().resolve() for path in paths]
    for path, given in zip(resolved, paths, strict=True):
        if resolved.count(path) > 1:
            raise CorpusError(f"the source {given} is given more than once; give it once")
    sources = [
        Source(name=name, base=source_base(name), files=_files(path, name))
        for path, name in zip(resolved, _names(resolved), strict=True)
    ]
    sources.sort(key=lambda source: source.base)
    for first, second in pairwise(sources):
        if first.base == second.base:
            raise CorpusError(
                f"the sources {first.name!r} and {second.name!r} get the same range of ids; "
                "rename one of them"
            )
    return tuple(sources)


def source_base(name: str) -> int:
    """The first id of a source: a 24-bit hash of its name, then 39 bits for ordinals."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=BASE_BYTES)
    return int.from_bytes(digest.digest(), "big") << ORDINAL_BITS


def reader_of(path: Path) -> Reader | None:
    """The reader for a file's name, or None when there is none."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        return READERS[inner] if inner in PACKED else None
    return READERS.get(suffix)


def _names(paths: Sequence[Path]) -> list[str]:
    """Each path's last part, or as many as it takes to tell it from the others."""
    names = []
    for path in paths:
        parts = 1
        while any(
            other != path and other.parts[-parts:] == path.parts[-parts:] for other in paths
        ) and parts < len(path.parts):
            parts += 1
        names.append("/".join(path.parts[-parts:]))
    return names


def _files(path: Path, name: str) -> tuple[SourceFile, ...]:
    if not path.exists():
        raise CorpusError(f"there is no file or directory {path}; correct the path")
    if not path.is_dir():
        if reader_of(path) is None:
            raise CorpusError(f"{path} is of no known kind; allowed: {FORMATS_HELP}")
        return (SourceFile(path=path, label=name),)
    found = [
        SourceFile(path=file, label=f"{name}/{file.relative_to(path).as_posix()}")
        for file in _walk(path)
    ]
    if not found:
        raise CorpusError(f"the directory {path} holds no file of a known kind: {FORMATS_HELP}")
    return tuple(found)


def _walk(directory: Path) -> Iterator[Path]:
    """Files with a reader, by name; a saved dataset's in its own order. None that is hidden."""
    saved = dataset_files(directory)
    if saved is not None:
        yield from saved
        return
    try:
        children = sorted(directory.iterdir(), key=lambda child: child.name)
    except OSError as error:
        raise CorpusError(f"the directory {directory} cannot be read ({error.strerror})") from error
    for child in children:
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _walk(child)
        elif reader_of(child) is not None:
            yield child
        else:
            logger.info("passed over %s: no corpus file by its name", child)
