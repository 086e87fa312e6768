"""What somebody wants changed in a store, and what that comes to.

A `Change` is a wish, checked only for what can be seen without a store. `planning.make_plan` works
it out against one version into a `Plan`, which says everything that would happen and has written
nothing: a dry run, and what a commit then carries out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from memory_server.store.manifest import Manifest, SegmentRef
from memory_server.store.names import check_domain
from memory_server.store.segments import Int64Array, entry_ids

SAMPLE = 10


def _no_ids() -> Int64Array:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A segment file to add to a domain."""

    path: Path | str
    domain: str = "default"


@dataclass(frozen=True, kw_only=True)
class Plug:
    """A domain to bring back as an earlier version had it: by default the newest that did."""

    domain: str
    from_version: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What to change, all in one commit. Build it with `Change.of`.

    Attributes:
        add: segment files.
        remove_ids, remove_doc_ids: int64, ascending, of live entries.
        remove_domains: unplugged, whole; their files stay until `gc`.
        plug: domains to bring back.
        swap: (domain that goes, domain that comes); what comes is added in the same change, or
            brought back from history.
        replace: added ids that are live take the place of the live ones.
    """

    add: tuple[Addition, ...] = ()
    remove_ids: Int64Array = field(default_factory=_no_ids)
    remove_doc_ids: Int64Array = field(default_factory=_no_ids)
    remove_domains: tuple[str, ...] = ()
    plug: tuple[Plug, ...] = ()
    swap: tuple[tuple[str, str], ...] = ()
    replace: bool = False

    @classmethod
    def of(
        cls,
        *,
        add: Iterable[Addition | Path | str] = (),
        domain: str = "default",
        remove_ids: Iterable[int] | npt.NDArray[np.int64] = (),
        remove_doc_ids: Iterable[int] | npt.NDArray[np.int64] = (),
        remove_domains: Iterable[str] = (),
        plug: Iterable[Plug | str] = (),
        swap: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> Self:
        """A change; `domain` is that of additions that name none.

        Raises:
            ValueError: it changes nothing, a name or number cannot be one, or a domain is named
                twice.
        """
        additions = tuple(
            a if isinstance(a, Addition) else Addition(path=a, domain=domain) for a in add
        )
        plugs = tuple(p if isinstance(p, Plug) else Plug(domain=p) for p in plug)
        change = cls(
            add=additions,
            remove_ids=np.unique(entry_ids(_listed(remove_ids), "remove_ids")),
            remove_doc_ids=np.unique(entry_ids(_listed(remove_doc_ids), "remove_doc_ids")),
            remove_domains=_names(remove_domains, "remove_domains"),
            plug=plugs,
            swap=tuple((swap or {}).items()),
            replace=replace,
        )
        change._check()
        return change

    @property
    def dropped_domains(self) -> tuple[str, ...]:
        """The domains that go."""
        return (*self.remove_domains, *(old for old, _ in self.swap))

    def plugs(self) -> tuple[Plug, ...]:
        """The domains that come from history: those asked for, and those of a swap that no
        addition brings."""
        given = {addition.domain for addition in self.add} | {plug.domain for plug in self.plug}
        news = dict.fromkeys(new for _, new in self.swap)
        return (*self.plug, *(Plug(domain=new) for new in news if new not in given))

    def _check(self) -> None:
        if not (
            self.add
            or len(self.remove_ids)
            or len(self.remove_doc_ids)
            or self.remove_domains
            or self.plug
            or self.swap
        ):
            raise ValueError(
                "nothing to commit: give add_segments, remove_ids, remove_doc_ids, remove_domains, "
                "plug or swap"
            )
        for addition in self.add:
            check_domain(addition.domain)
        for name in (
            *(plug.domain for plug in self.plug),
            *(n for pair in self.swap for n in pair),
        ):
            check_domain(name)
        _names([plug.domain for plug in self.plug], "plug")
        _names(self.dropped_domains, "remove_domains and swap")
        added = {addition.domain for addition in self.add}
        for plug in self.plug:
            if plug.domain in added:
                raise ValueError(
                    f"domain {plug.domain!r} is both added and plugged; do one after the other"
                )
        for old, new in self.swap:
            if old == new and new not in added | {plug.domain for plug in self.plug}:
                raise ValueError(
                    f"swapping domain {old!r} for itself changes nothing: add its new segments in "
                    "the same change, or plug it from a version"
                )


@dataclass(frozen=True, kw_only=True)
class DomainChange:
    """Live entries of one domain before and after, and how many came and went."""

    before: int
    after: int
    added: int
    removed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A change worked out against a version. Nothing is written yet.

    Attributes:
        base: the version that it was made against.
        segments: what the new version plugs; new files under the names of the plan.
        next_id: above every id that the store ever held.
        additions: local files, and their names of the plan below `segments/`.
        deletions: names of the plan below `deletions/`, and the removed rows that they will hold.
        domains: what happens to each domain that is touched.
        replaced: how many of the removed ids are added again.
        added_sample, removed_sample: some of the ids, int64; none are read for whole domains.
        bytes_to_write: of new files.
    """

    base: Manifest
    segments: tuple[SegmentRef, ...]
    next_id: int
    additions: tuple[tuple[Path, str], ...] = ()
    deletions: Mapping[str, Int64Array] = field(default_factory=dict)
    domains: Mapping[str, DomainChange] = field(default_factory=dict)
    replaced: int = 0
    added_sample: Int64Array = field(default_factory=_no_ids)
    removed_sample: Int64Array = field(default_factory=_no_ids)
    bytes_to_write: int = 0

    @property
    def parent(self) -> str:
        return self.base.version

    @property
    def added(self) -> int:
        """Entries that come, those that replace others included."""
        return sum(change.added for change in self.domains.values())

    @property
    def removed(self) -> int:
        """Entries that go, those that are replaced included."""
        return sum(change.removed for change in self.domains.values())

    @property
    def entries_before(self) -> int:
        return self.base.entries

    @property
    def entries_after(self) -> int:
        return sum(ref.live for ref in self.segments)


def _names(names: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"{what} is a list of names, not the one text {names!r}")
    listed = tuple(names)
    for name in listed:
        check_domain(name)
    if len(set(listed)) < len(listed):
        raise ValueError(f"{what} names a domain twice: {', '.join(listed)}")
    return listed


def _listed(values: Iterable[int] | npt.NDArray[np.int64]) -> Sequence[int] | npt.NDArray[np.int64]:
    return values if isinstance(values, np.ndarray) else list(values)
