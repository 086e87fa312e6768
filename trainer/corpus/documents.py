"""A document, and how one is made from a row that some file held."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.corpus.errors import CorpusError

MAX_DOCUMENT_CHARACTERS = 16_000_000
"""A document is tokenised in one piece (some 100 bytes per character), so its size is bounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text to read. `source` names its file for people, `place` its row for error messages.

    `others` holds the fields of its row that `Fields.others` asked for, where they are not null.
    """

    text: str
    title: str
    source: str
    place: str
    others: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Which fields of a row hold the text (required) and the title (optional).

    Attributes:
        others: more fields to read where a row has them.
        instead_of_text: one of `others`; a row that has it needs no text.
    """

    text: str = "text"
    title: str = "title"
    others: tuple[str, ...] = ()
    instead_of_text: str = ""

    def __post_init__(self) -> None:
        if not self.text or not self.title:
            raise CorpusError("text_field and title_field must not be empty; name the rows' fields")


def document_from_row(
    row: Mapping[str, object], fields: Fields, *, source: str, place: str, title: str = ""
) -> Document:
    """Make a document from a row of named values.

    Args:
        row: a missing or null title counts as `title`; a null text as an empty one.
        title: the title when the row has none (the key of a JSON object).

    Raises:
        CorpusError: the text field is missing or not text.
    """
    others = {name: row[name] for name in fields.others if row.get(name) is not None}
    if fields.text not in row and fields.instead_of_text not in others:
        found = ", ".join(sorted(map(str, row))) or "none"
        raise CorpusError(
            f"{place}: there is no field {fields.text!r}; the fields are {found}. "
            "Give the one that holds the text as text_field (--text-field)."
        )
    text = row.get(fields.text)
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"{place}: field {fields.text!r} holds {type(text).__name__}, not text. "
            "Give a field of strings as text_field (--text-field)."
        )
    value = row.get(fields.title)
    if value is not None and not isinstance(value, str | int | float):
        raise CorpusError(
            f"{place}: field {fields.title!r} holds {type(value).__name__}, not a title. "
            "Give a field of strings as title_field (--title-field)."
        )
    return checked_document(
        text=text or "",
        title=title if value is None else str(value),
        source=source,
        place=place,
        others=others,
    )


def checked_document(
    *, text: str, title: str, source: str, place: str, others: Mapping[str, object] | None = None
) -> Document:
    """Make a document of text that can be tokenised and stored.

    Raises:
        CorpusError: it is too long, or holds half of a surrogate pair (a broken JSON escape).
    """
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        raise too_long(place)
    for name, value in (("text", text), ("title", title)):
        try:
            value.isascii() or value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{place}: the {name} has half of a surrogate pair at character {error.start}, "
                "which is no valid Unicode. Repair the file that was read."
            ) from error
    return Document(text=text, title=title.strip(), source=source, place=place, others=others or {})


def too_long(place: str) -> CorpusError:
    """The error for a document beyond MAX_DOCUMENT_CHARACTERS."""
    return CorpusError(
        f"{place}: a document has more than {MAX_DOCUMENT_CHARACTERS:,} characters. "
        "Split it into several documents (in plain text, with blank lines)."
    )
