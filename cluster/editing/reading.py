"""Knowledge to the segments of a commit: what is added, and what takes the place of what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from cluster.editing.cutting import Cut, Cutter
from cluster.editing.lookup import Found, entries_by_document, entries_by_id
from cluster.editing.numbering import Numbering
from cluster.editing.passages import Knowledge, Passage
from cluster.editing.segment_writer import SegmentWriter
from memory_server.errors import DuplicateEntry, UnknownEntry
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.store import Store
from trainer.corpus.errors import CorpusError

CHUNK = 4096
SAMPLE = 5


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """An entry as it will be, for a person to look at."""

    id: int
    doc_id: int
    domain: str
    title: str
    text: str


@dataclass(kw_only=True)
class Read:
    """What was read: passages, those of them without anything to remember, entries made of them,
    and the first few of these."""

    passages: int = 0
    empty: int = 0
    entries: int = 0
    sample: list[NewEntry] = field(default_factory=list)


@dataclass(kw_only=True)
class Replaced:
    """What goes when its replacement comes."""

    ids: list[int] = field(default_factory=list)
    doc_ids: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class _Document:
    """A document that is replaced: what it was, and those of its entries' ids that are free."""

    first: Found
    free: list[int]


class Reader:
    """Reads for one edit of one version. Nothing stays if the writer's block is left by an error.

    Raises (all methods):
        CorpusError: a bad file or row; names it. DuplicateEntry, UnknownEntry: an id does not fit
        the version. ConfigError, TokenizerMismatch: no tokenizer, or another one. StoreDamaged: an
        update needs a segment that was altered; names it.
    """

    def __init__(
        self, store: Store, manifest: Manifest, writer: SegmentWriter, cutter: Cutter
    ) -> None:
        self.read = Read()
        self._store, self._manifest = store, manifest
        self._writer, self._cutter = writer, cutter
        self._numbering = Numbering(store, manifest)
        self._documents: dict[int, _Document] = {}
        self._verified: set[str] = set()

    def add(self, knowledge: Knowledge, domain: str, *, replacing: bool = False) -> Read:
        """Write all of it as entries of one domain.

        Args:
            replacing: given ids may be of entries that live.
        """
        for chunk in _chunks(knowledge.passages()):
            if not replacing:
                self._refuse_live(chunk)
            for cut in self._cut(chunk):
                passage = cut.passage
                self._write(
                    cut,
                    self._numbering.entries(passage, len(cut.tokens)),
                    domain=domain,
                    doc_id=self._numbering.document(passage),
                    title=passage.title,
                    source=passage.source or passage.file,
                )
        self._finish(knowledge)
        return self.read

    def update(self, knowledge: Knowledge, *, entry_id: int | None, doc_id: int | None) -> Replaced:
        """Write what takes the place of entries (rows with an id) and documents (with a doc_id).

        Args:
            entry_id, doc_id: of all rows, which then must not have their own.
        """
        gone = Replaced()
        addressed = (_addressed(p, entry_id, doc_id) for p in knowledge.passages())
        for chunk in _chunks(addressed):
            single = [p.id for p in chunk if p.id is not None]
            whole = [p.doc_id for p in chunk if p.id is None and p.doc_id is not None]
            found = entries_by_id(self._store, self._manifest, single, check=self._verify)
            self._meet_documents([d for d in whole if d not in self._documents], gone)
            for cut in self._cut(chunk, needed=True):
                if cut.passage.id is not None:
                    self._replace_entry(cut, found)
                else:
                    self._replace_document(cut)
            gone.ids += single
        self._finish(knowledge)
        return gone

    def _replace_entry(self, cut: Cut, found: dict[int, Found]) -> None:
        passage = cut.passage
        assert passage.id is not None
        old = found.get(passage.id)
        if old is None:
            raise UnknownEntry(
                f"{passage.place}: no entry with id {passage.id} lives in version "
                f"{self._manifest.version}; add it instead, or correct the id"
            )
        if passage.doc_id not in (None, old.doc_id):
            raise CorpusError(
                f"{passage.place}: entry {passage.id} is of document {old.doc_id}, not "
                f"{passage.doc_id}; correct one of the ids, or leave doc_id out"
            )
        if len(cut.tokens) > 1:
            raise CorpusError(
                f"{passage.place}: the new text makes {len(cut.tokens)} entries of at most "
                f"{self._store.meta.entry_tokens} tokens, but entry {passage.id} is one; shorten "
                f"it, or replace the whole document (doc_id {old.doc_id})"
            )
        self._write_over(cut, [passage.id], old)

    def _replace_document(self, cut: Cut) -> None:
        passage = cut.passage
        assert passage.doc_id is not None
        document = self._documents.get(passage.doc_id)
        if document is None:
            raise UnknownEntry(
                f"{passage.place}: no entry of document {passage.doc_id} lives in version "
                f"{self._manifest.version}; add it instead, or correct the doc_id"
            )
        count = len(cut.tokens)
        ids, document.free = document.free[:count], document.free[count:]
        ids += self._numbering.fresh(passage, count - len(ids))
        self._write_over(cut, ids, document.first)

    def _meet_documents(self, doc_ids: list[int], gone: Replaced) -> None:
        found = entries_by_document(self._store, self._manifest, doc_ids, check=self._verify)
        for doc_id, entries in found.items():
            domains = sorted({entry.domain for entry in entries})
            if len(domains) > 1:
                raise CorpusError(
                    f"document {doc_id} has entries in the domains {', '.join(domains)}, so the "
                    "place of new ones is not clear; remove it and add the new text to one of them"
                )
            self._documents[doc_id] = _Document(
                first=entries[0], free=[entry.id for entry in entries]
            )
            gone.doc_ids.append(doc_id)

    def _cut(self, chunk: list[Passage], *, needed: bool = False) -> Iterator[Cut]:
        """Cut a chunk, without what has no tokens, which is refused where text is needed."""
        self.read.passages += len(chunk)
        for cut in self._cutter.cut(chunk):
            if cut.tokens:
                yield cut
            elif needed:
                raise CorpusError(
                    f"{cut.passage.place}: the new text has no tokens; give some, or remove the old"
                )
            else:
                self.read.empty += 1

    def _write_over(self, cut: Cut, ids: list[int], old: Found) -> None:
        passage = cut.passage
        self._write(
            cut,
            ids,
            domain=old.domain,
            doc_id=old.doc_id,
            title=passage.title or old.title,
            source=passage.source or old.source,
        )

    def _write(
        self, cut: Cut, ids: list[int], *, domain: str, doc_id: int, title: str, source: str
    ) -> None:
        for entry_id, tokens, text in zip(ids, cut.tokens, cut.texts, strict=True):
            self._writer.add(
                domain,
                entry_id=entry_id,
                doc_id=doc_id,
                tokens=tokens,
                text=text,
                title=title,
                source=source,
            )
            self.read.entries += 1
            if len(self.read.sample) < SAMPLE:
                self.read.sample.append(
                    NewEntry(id=entry_id, doc_id=doc_id, domain=domain, title=title, text=text)
                )

    def _verify(self, ref: SegmentRef) -> None:
        """Refuse an altered segment, once: new entries take titles and sources from old ones."""
        if ref.file not in self._verified:
            self._store.verify_segment(ref)
            self._verified.add(ref.file)

    def _refuse_live(self, chunk: list[Passage]) -> None:
        given = {p.id: p.place for p in chunk if p.id is not None}
        live = entries_by_id(self._store, self._manifest, list(given)) if given else {}
        if live:
            entry_id = next(i for i in given if i in live)
            raise DuplicateEntry(
                f"{given[entry_id]}: an entry with id {entry_id} lives already; leave the ids out, "
                "give others, or replace what is there (--replace)"
            )

    def _finish(self, knowledge: Knowledge) -> None:
        twice = self._writer.repeated_id()
        if twice is not None:
            rows = (p.place for p in knowledge.passages() if p.id in (None, twice))
            raise DuplicateEntry(
                f"{' and '.join(islice(rows, 2))}: both are to be entry {twice}; every id must be "
                "unique"
            )
        if not self.read.entries:
            raise CorpusError(f"{knowledge.name}: there is no text in it; give some")
        self._writer.finish()


def _addressed(passage: Passage, entry_id: int | None, doc_id: int | None) -> Passage:
    """A row of an update with what it replaces."""
    own = passage.id if passage.id is not None else passage.doc_id
    if entry_id is None and doc_id is None:
        if own is None:
            raise CorpusError(
                f"{passage.place}: there is neither id nor doc_id, so it is not clear what this "
                "replaces; give one in every row, or one for all (--id, --doc-id)"
            )
        return passage
    if own is not None:
        raise CorpusError(
            f"{passage.place}: the row says itself what it replaces ({own}); leave --id and "
            "--doc-id out"
        )
    return replace(passage, id=entry_id, doc_id=None if entry_id is not None else doc_id)


def _chunks(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    iterator = iter(passages)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
