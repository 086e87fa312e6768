"""The edits of a memory: each is one commit, or in a dry run only its plan."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.editing.cutting import Cutter
from cluster.editing.live import check_same_memory, show_version
from cluster.editing.outcome import Edit, counts_of_diff, counts_of_manifests, counts_of_plan
from cluster.editing.passages import Knowledge
from cluster.editing.reading import Read, Reader
from cluster.editing.segment_writer import SegmentWriter
from cluster.editing.tokenizer import find_tokenizer, store_neighbours, titles_in_entries
from cluster.editing.transfer import transferred
from memory_server.api import Memory
from memory_server.errors import DomainPlugged, StoreConflict, StoreDamaged
from memory_server.store.changes import Addition, Change, Plug
from memory_server.store.manifest import Manifest
from memory_server.store.names import check_domain, check_message
from memory_server.store.store import Store

_ROLLED_BACK = re.compile(r"^(roll back to [0-9a-f]+: )+")
ATTEMPTS = 12
PAUSE_S = (
    0.02  # grows with the attempts, and differs between the tools that are in each other's way
)


@dataclass(frozen=True, kw_only=True)
class TokenizerPlace:
    """Where a store's tokenizer is: given, or somewhere near these directories.

    `title_in_entry` None means: as the store's corpus has it.
    """

    given: Path | None = None
    near: tuple[Path, ...] = ()
    title_in_entry: bool | None = None


@dataclass(frozen=True, kw_only=True)
class NewDomain:
    """Where a domain's content comes from; nothing given: from the store's own history.

    Attributes:
        knowledge: files.
        store, domain: another store's domain; None: the only one that it has.
        version: of this store, that had it; None: the newest that had.
    """

    knowledge: Knowledge | None = None
    store: Store | None = None
    domain: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.knowledge, self.store, self.version)) > 1:
            raise ValueError(
                "a domain comes from files, from another store or from an earlier version; give one"
            )
        if self.domain is not None and self.store is None:
            raise ValueError("the name of a domain elsewhere needs the store that it is in")


Prepared = tuple[Change, Read | None]
Inspect = Callable[[Sequence[Addition]], None]


@dataclass(frozen=True, kw_only=True)
class Editor:
    """A store to edit. Nothing is committed unless all of an edit is good.

    If another writer commits meanwhile, the edit is worked out again on what that left. With a
    `memory`, each call returns when every later reply of it reflects the edit.

    All edits raise:
        CorpusError: bad files or rows; named. ConfigError, TokenizerMismatch: no tokenizer, or
        another one. UnknownEntry, UnknownDomain, DomainPlugged, DuplicateEntry: it does not fit
        what is there. StoreFull, StoreConflict: not committed.
        NotYetLive: committed, but the server does not show it; says how to go on.

    Attributes:
        memory: the running memory that serves the store and is to show every edit, or None.
        message: of the commit; None: a few words that say what was done.
        dry_run: only work out what an edit comes to.
        inspect: is shown the new segments of an edit before it is committed, and may raise.
    """

    store: Store
    memory: Memory | None = None
    message: str | None = None
    dry_run: bool = False
    tokenizer: TokenizerPlace = TokenizerPlace()
    inspect: Inspect | None = None

    def __post_init__(self) -> None:
        if self.message is not None:
            check_message(self.message)

    def add(self, knowledge: Knowledge, *, domain: str = "default", replace: bool = False) -> Edit:
        """Add entries to a domain, which begins if there is none of this name.

        Args:
            replace: given ids that live are replaced; otherwise that is refused.
        """
        check_domain(domain)

        def prepare(base: Manifest, writer: SegmentWriter) -> Prepared:
            read = self._reader(base, writer).add(knowledge, domain, replacing=replace)
            return Change.of(add=writer.additions, replace=replace), read

        return self._commit(f"add {knowledge.name}", prepare)

    def remove(
        self,
        *,
        ids: Iterable[int] = (),
        doc_ids: Iterable[int] = (),
        domains: Sequence[str] = (),
    ) -> Edit:
        """Remove entries, all entries of documents, and whole domains."""
        change = Change.of(remove_ids=ids, remove_doc_ids=doc_ids, remove_domains=domains)
        told = (
            _named("entry", "entries", change.remove_ids.tolist()),
            _named("document", "documents", change.remove_doc_ids.tolist()),
            _named("domain", "domains", change.remove_domains),
        )
        return self._commit(f"remove {', '.join(t for t in told if t)}", _always(change))

    def update(
        self, knowledge: Knowledge, *, entry_id: int | None = None, doc_id: int | None = None
    ) -> Edit:
        """Put new texts in the place of old ones, in the old ones' domains.

        A row with an id replaces that entry, which keeps its id and document; the text must fit
        into one entry. Rows with only a doc_id replace all entries of that document: the new
        ones take the old ones' ids in order, and new ids where there are more. Title and source
        stay unless they are given.

        Args:
            entry_id, doc_id: what is replaced, for rows that do not say it.
        """
        if entry_id is not None and doc_id is not None:
            raise ValueError("give either the id of an entry or that of a document, not both")

        def prepare(base: Manifest, writer: SegmentWriter) -> Prepared:
            reader = self._reader(base, writer)
            gone = reader.update(knowledge, entry_id=entry_id, doc_id=doc_id)
            change = Change.of(
                add=writer.additions, remove_ids=gone.ids, remove_doc_ids=gone.doc_ids
            )
            return change, reader.read

        what = _named("entry", "", [] if entry_id is None else [entry_id])
        what = what or _named("document", "", [] if doc_id is None else [doc_id])
        return self._commit(f"update {what or f'from {knowledge.name}'}", prepare)

    def plug(self, domain: str, source: NewDomain) -> Edit:
        """Plug a domain that is not plugged."""
        return self._bring(domain, source, swap={}, message=f"plug {domain}")

    def unplug(self, domain: str) -> Edit:
        """Take a domain out; `plug` brings it back until `gc` gives up the last version with it."""
        return self._commit(f"unplug {domain}", _always(Change.of(remove_domains=[domain])))

    def swap(self, old: str, new: str, source: NewDomain) -> Edit:
        """One domain for another in one commit, so that no reply sees both or neither.

        The new one may have the old one's name, which replaces a domain's whole content.
        """
        return self._bring(new, source, swap={old: new}, message=f"swap {old} for {new}")

    def rollback(self, version: str) -> Edit:
        """Commit an earlier version's content once more; what came after stays in the log.

        What of the head is damaged is left behind: then entries are counted by whole segments.
        It is not tried again when another writer commits meanwhile, as that would be undone too.
        """
        self._check_memory()
        target, base = self.store.manifest(self.store.resolve(version)), self.store.manifest()
        # The content is told, not the rollbacks that it went through.
        content = _ROLLED_BACK.sub("", target.message)
        message = self.message or f"roll back to {target.version}: {content}"
        try:
            diff = self.store.diff(base.version, target.version)
            counts = counts_of_diff(diff, base, target)
        except StoreDamaged as error:  # which may be what is to be left behind
            counts = replace(counts_of_manifests(base, target), uncertain=str(error))
        edit = Edit(message=message, counts=counts, parent=base.version)
        if self.dry_run:
            return edit
        return self._shown(
            replace(
                edit,
                version=self.store.rollback(target.version, message=message, parent=base.version),
            )
        )

    def _bring(self, domain: str, source: NewDomain, *, swap: dict[str, str], message: str) -> Edit:
        check_domain(domain)

        def prepare(base: Manifest, writer: SegmentWriter) -> Prepared:
            if domain in base.domains() and domain not in swap:
                raise DomainPlugged(
                    f"the memory {self.store.location} has the domain {domain!r} already; add to "
                    "it, swap it, or choose another name"
                )
            read, additions, plugs = None, list[Addition](), list[Plug]()
            if source.knowledge is not None:
                read = self._reader(base, writer).add(source.knowledge, domain)
                additions = writer.additions
            elif source.store is not None:
                additions = transferred(writer, self.store, source.store, source.domain, domain)
            elif not swap or source.version is not None:
                plugs = [Plug(domain=domain, from_version=source.version)]
            return Change.of(add=additions, plug=plugs, swap=swap), read

        if source.knowledge is not None:
            message += f" from {source.knowledge.name}"
        elif source.store is not None:
            message += f" from {source.store.location}"
        elif source.version is not None:
            message += f" from version {source.version}"
        return self._commit(message, prepare)

    def _commit(self, message: str, prepare: Callable[[Manifest, SegmentWriter], Prepared]) -> Edit:
        self._check_memory()
        message = self.message or message
        for attempt in range(1, ATTEMPTS + 1):
            base = self.store.manifest()
            with SegmentWriter(self.store) as writer:
                change, read = prepare(base, writer)
                plan = self.store.plan(change, parent=base.version)
                if self.inspect is not None:
                    self.inspect(change.add)
                edit = Edit(
                    message=message, counts=counts_of_plan(plan), parent=base.version, read=read
                )
                if self.dry_run:
                    return edit
                try:
                    version = self.store.publish(plan, message=message)
                except StoreConflict:
                    if attempt == ATTEMPTS:
                        raise
                    time.sleep(random.uniform(0, PAUSE_S * attempt))
                    continue
            return self._shown(replace(edit, version=version))
        raise AssertionError("the last attempt returns or raises")

    def _shown(self, edit: Edit) -> Edit:
        if self.memory is None:
            return edit
        assert edit.version is not None
        return replace(edit, epoch=show_version(self.store, self.memory, edit.version))

    def _check_memory(self) -> None:
        """Before anything is read or written: what is committed could not be taken back."""
        if self.memory is not None:
            check_same_memory(self.store, self.memory)

    def _reader(self, base: Manifest, writer: SegmentWriter) -> Reader:
        place = self.tokenizer
        near = [*place.near, *store_neighbours(self.store)]
        titled = place.title_in_entry
        cutter = Cutter(
            self.store.meta,
            lambda: find_tokenizer(self.store, given=place.given, near=near),
            title_in_entry=titles_in_entries(near) if titled is None else titled,
        )
        return Reader(self.store, base, writer, cutter)


def _always(change: Change) -> Callable[[Manifest, SegmentWriter], Prepared]:
    return lambda base, writer: (change, None)


def _named(one: str, many: str, items: Sequence[object]) -> str:
    if not items:
        return ""
    return f"{one} {items[0]}" if len(items) == 1 else f"{len(items)} {many}"
