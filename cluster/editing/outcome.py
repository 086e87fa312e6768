"""What an edit did, or would do, in numbers and a few examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.editing.reading import Read
from memory_server.store.changes import DomainChange, Plan
from memory_server.store.differences import Diff
from memory_server.store.manifest import Manifest

SAMPLE = 10


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Entries that come and go; those that are replaced count in both.

    Attributes:
        added_ids, removed_ids: the first few.
        bytes_to_write: of new files.
        uncertain: why entries could only be counted by segments, so that one which is in both
            versions may count as gone and come; None: every entry was compared.
    """

    added: int
    removed: int
    replaced: int
    before: int
    after: int
    domains: Mapping[str, DomainChange]
    added_ids: tuple[int, ...]
    removed_ids: tuple[int, ...]
    bytes_to_write: int
    uncertain: str | None = None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit.

    Attributes:
        parent: the version that it was made against.
        version: the new version, or None after a dry run.
        epoch: the server's epoch that shows it, or None where no server was told.
        read: what was read, or None where nothing was.
    """

    message: str
    counts: Counts
    parent: str
    version: str | None = None
    epoch: int | None = None
    read: Read | None = None


def counts_of_plan(plan: Plan) -> Counts:
    """The numbers of a planned commit."""
    return Counts(
        added=plan.added,
        removed=plan.removed,
        replaced=plan.replaced,
        before=plan.entries_before,
        after=plan.entries_after,
        domains=dict(plan.domains),
        added_ids=tuple(plan.added_sample.tolist()),
        removed_ids=tuple(plan.removed_sample.tolist()),
        bytes_to_write=plan.bytes_to_write,
    )


def counts_of_diff(diff: Diff, before: Manifest, after: Manifest) -> Counts:
    """The numbers of going from one version to another."""
    olds, news = before.domains(), after.domains()
    return Counts(
        added=len(diff.added) + len(diff.replaced),
        removed=len(diff.removed) + len(diff.replaced),
        replaced=len(diff.replaced),
        before=before.entries,
        after=after.entries,
        domains={
            name: DomainChange(
                before=olds.get(name, 0),
                after=news.get(name, 0),
                added=change.added + change.replaced,
                removed=change.removed + change.replaced,
            )
            for name, change in diff.domains.items()
        },
        added_ids=tuple(diff.added[:SAMPLE].tolist()),
        removed_ids=tuple(diff.removed[:SAMPLE].tolist()),
        bytes_to_write=0,
    )


def counts_of_manifests(before: Manifest, after: Manifest) -> Counts:
    """The same without reading a segment: those that are not in both go and come whole."""
    olds, news = before.domains(), after.domains()
    gone, come = _live_rows_apart(before, after), _live_rows_apart(after, before)
    return Counts(
        added=sum(come.values()),
        removed=sum(gone.values()),
        replaced=0,
        before=before.entries,
        after=after.entries,
        domains={
            name: DomainChange(
                before=olds.get(name, 0),
                after=news.get(name, 0),
                added=come[name],
                removed=gone[name],
            )
            for name in sorted(gone.keys() | come.keys())
        },
        added_ids=(),
        removed_ids=(),
        bytes_to_write=0,
    )


def _live_rows_apart(here: Manifest, there: Manifest) -> Counter[str]:
    """Live rows by domain, of the segments that only one version has as they are."""
    theirs = set(there.segments)
    rows: Counter[str] = Counter()
    for ref in here.segments:
        if ref not in theirs:
            rows[ref.domain] += ref.live
    return rows
