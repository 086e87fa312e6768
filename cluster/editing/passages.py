"""Rows of files as the passages of an edit: text to cut, or the ready tokens of one entry.

The files are read by the corpus's own readers, so what builds a corpus can also be added to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.corpus.documents import Document, Fields, checked_document
from trainer.corpus.errors import CorpusError
from trainer.corpus.sources import SourceFile, find_sources, reader_of

# Below what may be stored, so that no given id can use up the numbers of those that give none.
LARGEST_GIVEN_ID = 2**63 - 2**38
_DIGITS = 40  # of an id: Python refuses to read thousands
TOKENS = "tokens"
OTHERS = ("source", "doc_id", "id", TOKENS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """One row of knowledge, as far as it can be checked without a store.

    Attributes:
        text: what becomes entries; beside `tokens`, what is shown of the entry.
        source: where it comes from, for people, if the row says it.
        file: the name of its file, which is the source of a row that does not say one.
        place: file and row, for error messages.
        tokens: one entry's token ids, or None.
        doc_id, id: given by the row, or None.
    """

    text: str
    title: str
    place: str
    file: str = ""
    source: str = ""
    tokens: tuple[int, ...] | None = None
    doc_id: int | None = None
    id: int | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it to remember."""
        return self.tokens is None and not self.text.strip()


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Where new knowledge comes from: files and directories, or one text given as it is.

    Attributes:
        files: of the kinds that `trainer.corpus.sources.FORMATS_HELP` lists. Rows may have the
            fields source, doc_id, id, and tokens (an entry's token ids) instead of a text.
        text: instead of files.
        title, source: of `text`.
        text_field, title_field: the rows' fields for both.
    """

    files: tuple[Path, ...] = ()
    text: str | None = None
    title: str = ""
    source: str = ""
    text_field: str = "text"
    title_field: str = "title"

    def __post_init__(self) -> None:
        if bool(self.files) == (self.text is not None):
            raise CorpusError("give new knowledge either as files or as one text")
        if (self.title or self.source) and self.text is None:
            raise CorpusError("a title or a source goes with one text; in files, rows have theirs")
        if self.text is not None and not self.text.strip():
            raise CorpusError("the text is empty; give some")
        for file in self.files:
            _check_path(file)

    @property
    def name(self) -> str:
        """A few words for a commit's message."""
        if self.text is not None:
            return "a text"
        names = [path.name for path in self.files]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def passages(self) -> Iterator[Passage]:
        """Yield all passages in order, those that are empty too; a few are in memory at a time.

        Raises:
            CorpusError: a file is missing, damaged or of no known kind, or a row is bad; names it.
        """
        if self.text is not None:
            check_unicode(self.source, "the source")
            given = checked_document(
                text=self.text, title=self.title, source=self.source, place="the text"
            )
            yield Passage(
                text=given.text, title=given.title, source=given.source, place=given.place
            )
            return
        fields = Fields(
            text=self.text_field, title=self.title_field, others=OTHERS, instead_of_text=TOKENS
        )
        for file in _files(self.files):
            read = reader_of(file.path)
            assert read is not None, "find_sources admits only files with a reader"
            for document in read(file.path, file.label, fields):
                yield _passage(document)


def check_unicode(text: str, what: str) -> str:
    """The text, if it can be stored.

    Raises:
        CorpusError: it is no Unicode, such as a command's argument in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{what} is no valid UTF-8 at character {error.start}: {text[:80]!a}; convert it"
        ) from error
    return text


def _check_path(file: Path) -> None:
    if "\0" in str(file):
        raise CorpusError(f"{str(file)!a} is no file's name: it holds a NUL character")
    check_unicode(file.name, "the name of a file, which becomes the source of its entries,")


def _files(paths: Sequence[Path]) -> list[SourceFile]:
    """All files in the order given; find_sources alone would sort them by hash."""
    names = {source.files[0].path: source for source in find_sources(paths)}
    ordered = [find_sources([path])[0].files[0].path for path in paths]
    return [file for first in ordered for file in names[first].files]


def _passage(document: Document) -> Passage:
    others, place = document.others, document.place
    source = others.get("source", "")
    if not isinstance(source, str):
        raise CorpusError(
            f"{place}: field 'source' holds {type(source).__name__}, not text; give text"
        )
    return Passage(
        text=document.text,
        title=document.title,
        source=check_unicode(source, f"{place}: the source"),
        file=check_unicode(document.source, f"{place}: the name of the file"),
        place=place,
        tokens=_tokens(others.get(TOKENS), place),
        doc_id=_identity(others.get("doc_id"), "doc_id", place),
        id=_identity(others.get("id"), "id", place),
    )


def _identity(value: object, name: str, place: str) -> int | None:
    """A row's id: a whole number, also as digits, which is all that CSV can hold."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _DIGITS:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_GIVEN_ID:
        raise CorpusError(
            f"{place}: {name} is {value!r}; it must be a whole number from 0 to 2**63-2**38, or be "
            "left out, and one is given"
        )
    return value


def _tokens(value: object, place: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise CorpusError(
            f"{place}: field {TOKENS!r} must be a list of token ids; give whole numbers, or text "
            "in its place"
        )
    if not value:
        raise CorpusError(f"{place}: field {TOKENS!r} is an empty list; an entry needs tokens")
    return tuple(value)
