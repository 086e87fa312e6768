"""The durable memory: segments, manifests and one line of versions, in plain files.

    STORE/store.json             what all entries have in common (tokenizer, entry length)
    STORE/segments/*.arrow       immutable entries, named by their checksum and their commit
    STORE/deletions/*.npy        removed rows of one segment, named likewise
    STORE/manifests/<version>.json
    STORE/next/<version>         the version that was committed on this one: the commit itself
    STORE/HEAD                   a recent version, from which to look for the newest
    STORE/tags/<name>            a version
    STORE/collected/*.json       what versions were that `gc` gave up
    STORE/incoming/              where segments are written before a commit adopts them

A commit writes everything that it needs, and then creates `next/<parent>`, which only one writer
can: a crash at any byte leaves the old version or the new one, and nothing is locked. Removal is
of *rows*, so one commit may remove an id and add it again with another text.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from memory_server.errors import StoreError
from memory_server.store.changes import Addition, Change, Plan, Plug
from memory_server.store.compact import TARGET_ROWS, Compaction, compact_store
from memory_server.store.creation import create_store, read_meta
from memory_server.store.differences import Diff, diff
from memory_server.store.files import Files
from memory_server.store.filesystems import open_storage
from memory_server.store.garbage import GarbageReport, collect_garbage
from memory_server.store.history import (
    LogEntry,
    domain_source,
    next_id,
    read_log,
    read_tags,
    remove_tag,
    resolve,
    write_tag,
)
from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.names import check_message, is_version
from memory_server.store.planning import make_plan
from memory_server.store.publishing import publish_plan
from memory_server.store.reader import StoreReader
from memory_server.store.remote_storage import ExclusiveCreate
from memory_server.store.segments import Int64Array, Segment, SegmentMeta
from memory_server.store.storage import Storage, made_incoming
from memory_server.store.verification import Damage, find_all_damage, find_damage, refuse_damage

_DAY_S = 86_400.0


class Store:
    """A store opened for reading and committing. Make one with `Store.create` or `Store.open`.

    It holds no state but where the store is, so threads may share it, and any number of processes
    on any machines may open the same store.
    """

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self.meta: SegmentMeta = reader.meta

    @classmethod
    def create(
        cls,
        path: Path | str | Storage,
        *,
        tokenizer_fingerprint: str,
        entry_tokens: int,
        vocab_size: int,
        pad_token_id: int,
        filesystem: Any | None = None,
        cache: Path | str | None = None,
        files: Files | None = None,
        exclusive_create: ExclusiveCreate | None = None,
    ) -> Self:
        """Make an empty store with one empty version.

        Args:
            path: local, or a URL, or with `filesystem` a path in it (see `filesystems`).

        Raises:
            StoreError: there is a store already. StoreReadOnly: the filesystem cannot create a file
            exclusively. StoreFull: no room.
        """
        storage = open_storage(
            path,
            filesystem=filesystem,
            cache=cache,
            files=files,
            exclusive_create=exclusive_create,
        )
        meta = SegmentMeta(
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            entry_tokens=entry_tokens,
            pad_token_id=pad_token_id,
        )
        return cls(create_store(storage, meta))

    @classmethod
    def open(
        cls,
        path: Path | str | Storage,
        *,
        filesystem: Any | None = None,
        cache: Path | str | None = None,
        files: Files | None = None,
        exclusive_create: ExclusiveCreate | None = None,
        check: bool = True,
    ) -> Self:
        """Open a store and check its head: every file there, of its size; local ones with a
        readable footer.

        Args:
            check: False looks at nothing below the manifest, to examine a damaged store.

        Raises:
            StoreNotFound: no store at `path`. StoreDamaged: names the damaged file.
        """
        storage = open_storage(
            path,
            filesystem=filesystem,
            cache=cache,
            files=files,
            exclusive_create=exclusive_create,
        )
        reader = StoreReader(storage, read_meta(storage))
        reader.line.head()
        if check:
            reader.check_files(reader.head_manifest())
        return cls(reader)

    @property
    def location(self) -> str:
        """The path or URL to open the store by."""
        return self._reader.storage.location

    @property
    def path(self) -> Path:
        """The directory of a store on this machine's filesystem.

        Raises:
            StoreError: it is elsewhere; use `location`.
        """
        root = self._reader.storage.local_root
        if root is None:
            raise StoreError(f"the store {self.location} has no local path; use its location")
        return root

    @property
    def incoming(self) -> Path:
        """Where to write new segments, always local: `commit` adopts them from there, in a local
        store without copying. Made where it is missing, as in a copy that left it out."""
        return made_incoming(self._reader.storage)

    # Reading

    def head(self) -> str:
        """The newest content version."""
        return self._reader.line.head()

    def resolve(self, name: str) -> str:
        """The version that a name means: a version, the unique beginning of one, a tag, HEAD, and
        any of these followed by ~n, for n versions before.

        Raises:
            UnknownVersion: none, or several; the message names them.
        """
        return resolve(self._reader, name)

    def manifest(self, version: str | None = None) -> Manifest:
        """The manifest of `version` (any name that `resolve` takes), by default the head's.

        Raises:
            UnknownVersion: there is none. StoreDamaged: it was altered.
        """
        version = self.head() if version is None else version
        return self._reader.manifest(version if is_version(version) else self.resolve(version))

    def next_id(self) -> int:
        """Above every id that this store ever held, in domains that are unplugged too."""
        return next_id(self._reader, self._reader.head_manifest())

    def segment_path(self, ref: SegmentRef) -> Path:
        """Where a local store keeps a segment."""
        return self.path / self._reader.segment_name(ref)

    def segment(self, ref: SegmentRef) -> Segment:
        """Map a segment after the checks that cost nothing: size, footer, row count, tokenizer.
        A remote one is fetched, and checked whole, unless this machine has a copy.

        Raises:
            StoreDamaged: names the file.
        """
        return self._reader.segment(ref)

    def deleted_rows(self, ref: SegmentRef) -> Int64Array:
        """The removed rows of a segment, int64, ascending. Raises StoreDamaged."""
        return self._reader.deleted_rows(ref)

    def live_rows(self, ref: SegmentRef) -> Int64Array:
        """The other rows, int64, ascending. Raises StoreDamaged."""
        return self._reader.live_rows(ref)

    # Changing

    def plan(self, change: Change, *, parent: str | None = None) -> Plan:
        """What a change would come to, checked like a commit: a dry run that writes nothing.

        Args:
            parent: the version to change, by default the head.

        Raises:
            TokenizerMismatch, DuplicateEntry, UnknownEntry, UnknownDomain, DomainPlugged,
            UnknownVersion, StoreDamaged, ValueError: refused.
        """
        base = self.manifest(parent)
        sources = {
            plug.domain: domain_source(self._reader, base, plug.domain, plug.from_version)
            for plug in change.plugs()
        }
        return make_plan(
            self._reader,
            base,
            change,
            sources=sources,
            next_id=next_id(self._reader, base),
        )

    def publish(self, plan: Plan, *, message: str) -> str:
        """Carry a plan out. Returns the new version, which is now the head.

        Raises:
            StoreConflict: another writer committed since the version that the plan was made
            against. StoreFull: no room. Nothing changed.
        """
        return publish_plan(self._reader, plan, message=message)

    def commit(
        self,
        *,
        add_segments: Sequence[Path | str | Addition] = (),
        remove_ids: Iterable[int] | npt.NDArray[np.int64] = (),
        message: str,
        domain: str = "default",
        parent: str | None = None,
        remove_doc_ids: Iterable[int] | npt.NDArray[np.int64] = (),
        remove_domains: Iterable[str] = (),
        plug: Iterable[Plug | str] = (),
        swap: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> str:
        """Make a new content version: the parent's with a change (see `Change`), in one step.

        Args:
            add_segments: segment files, each into its own domain (`Addition`) or into `domain`.
                Those in `incoming` are moved into the store; others are copied.
            remove_ids, remove_doc_ids: of live entries; an id may be removed and added in one
                commit.
            parent: the version that the change was made against; by default the head as the commit
                begins.

        Returns:
            The new version, which is now the head.

        Raises:
            StoreConflict: another writer committed since `parent`. StoreFull: no room; as for
            `plan`: refused. Nothing changed.
        """
        change = Change.of(
            add=add_segments,
            domain=domain,
            remove_ids=remove_ids,
            remove_doc_ids=remove_doc_ids,
            remove_domains=remove_domains,
            plug=plug,
            swap=swap,
            replace=replace,
        )
        check_message(message)
        return self.publish(self.plan(change, parent=parent), message=message)

    def unplug(self, domain: str, *, message: str | None = None) -> str:
        """Commit without a domain. Its files stay until `gc`, so that it can be plugged again."""
        return self.commit(remove_domains=[domain], message=message or f"unplugged {domain}")

    def plug(
        self, domain: str, *, from_version: str | None = None, message: str | None = None
    ) -> str:
        """Commit with a domain as an earlier version had it: by default the newest that did."""
        wanted = Plug(domain=domain, from_version=from_version)
        return self.commit(plug=[wanted], message=message or f"plugged {domain}")

    def swap(self, old: str, new: str, *, message: str | None = None) -> str:
        """Commit with one domain in another's place; the new one comes from history."""
        return self.commit(swap={old: new}, message=message or f"swapped {old} for {new}")

    def rollback(
        self, version: str, *, message: str | None = None, parent: str | None = None
    ) -> str:
        """Commit the content of an earlier version as a new one, on top of the head.

        Args:
            parent: the head that the caller has seen, if another one's commits must not be undone.

        Raises:
            ValueError: the head has this content already. UnknownVersion, StoreConflict.
        """
        base = self._reader.head_manifest() if parent is None else self.manifest(parent)
        wanted = self._reader.manifest(self.resolve(version))
        if wanted.segments == base.segments:
            raise ValueError(
                f"the head {base.version} of {self.location} holds what version {wanted.version} "
                "held; there is nothing to roll back"
            )
        self._reader.check_files(wanted)
        plan = Plan(base=base, segments=wanted.segments, next_id=next_id(self._reader, base))
        text = message or f"rolled back to {wanted.version}: {wanted.message}"
        return self.publish(plan, message=text)

    # History

    def log(self, limit: int | None = None, *, start: str | None = None) -> Iterator[LogEntry]:
        """Versions from `start`, by default the head, back to the first, read as they are asked
        for."""
        first = self.head() if start is None else self.resolve(start)
        return islice(read_log(self._reader, first), limit)

    def diff(self, a: str, b: str) -> Diff:
        """The entries that were added, removed and replaced from one version to another, without
        reading what both share."""
        return diff(self._reader, self.manifest(a), self.manifest(b))

    def tag(self, name: str, version: str | None = None, *, move: bool = False) -> None:
        """Name a version, by default the head; `gc` keeps what is tagged.

        Raises:
            ValueError: the tag is there already and not to `move`, or cannot have this name.
        """
        wanted = self.head() if version is None else self.resolve(version)
        write_tag(self._reader, name, wanted, move=move)

    def untag(self, name: str) -> None:
        """Forget a tag. Raises UnknownVersion when there is none."""
        remove_tag(self._reader, name)

    def tags(self) -> dict[str, str]:
        """Tags and their versions, in the order of their names."""
        return read_tags(self._reader.storage)

    # Upkeep

    def compact(
        self,
        *,
        domains: Collection[str] | None = None,
        target_rows: int = TARGET_ROWS,
        message: str | None = None,
        dry_run: bool = False,
    ) -> Compaction:
        """Commit the same entries in fewer, larger segments, without removed rows.

        A memory that stages the new version encodes rewritten entries again, so do it seldom. The
        old segments take room until `gc`.

        Raises:
            StoreConflict: another writer committed meanwhile; nothing changed.
        """
        return compact_store(
            self._reader, domains=domains, target_rows=target_rows, message=message, dry_run=dry_run
        )

    def verify_segment(self, ref: SegmentRef) -> None:
        """Check a segment's whole content against its checksum: as slow as reading it.

        Raises:
            StoreDamaged: names the file.
        """
        self._reader.verify_segment(ref)

    def damages(self, version: str | None = None, *, all_versions: bool = True) -> list[Damage]:
        """Every damaged file that a version, or any that is kept, depends on. Reads every byte."""
        if version is None and all_versions:
            return find_all_damage(self._reader)
        return find_damage(self._reader, [self.head() if version is None else version])

    def verify(self, version: str | None = None, *, all_versions: bool = False) -> None:
        """Check every byte that a version, by default the head, depends on, or all of them.

        Raises:
            StoreDamaged: names every damaged file.
        """
        if version is not None:
            version = self.manifest(version).version
        refuse_damage(self._reader, self.damages(version, all_versions=all_versions))

    def gc(
        self,
        *,
        keep_versions: int = 10,
        min_age_s: float = _DAY_S,
        protect: Iterable[str] = (),
        incoming_age_s: float = _DAY_S,
        dry_run: bool = False,
    ) -> GarbageReport:
        """Give up old versions and remove the files that no kept one needs (see `garbage`).

        Args:
            keep_versions: the newest so many stay.
            min_age_s: so do those younger than this.
            protect: and these: versions that a server answers from. Tagged ones always stay.
            incoming_age_s: temporary files, and segments in `incoming`, older than this go.
            dry_run: say what would go.

        Raises:
            StoreConflict: another writer committed meanwhile. StoreFull: no room for the version
            that a collection is; says which files a person may remove. Of both, nothing changed but
            that what `incoming_age_s` says is gone. UnknownVersion.
        """
        return collect_garbage(
            self._reader,
            keep_versions=keep_versions,
            min_age_s=min_age_s,
            protect=[self.resolve(version) for version in protect],
            incoming_age_s=incoming_age_s,
            dry_run=dry_run,
        )
