"""What approximation and staleness cost, measured on the searches' own queries."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memory_server.index.base import GatedIndex, Hits, Index, IndexSettings, RecentQueries
from memory_server.index.recall_gate import MIN_QUERIES, GateState
from memory_server.priority import give_way

log = logging.getLogger(__name__)

LOGGED_PER_SEARCH = 8
AT_ONCE = 8  # queries of one measuring search: a short one, so that live searches wait little
AT_ONCE_WITHOUT_REST = 32  # of an audit that somebody waits for
DUTY = 0.2  # of the time while measuring; it rests for the remainder
LOOK_S = 0.1  # between two looks at whether somebody waits for it


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The newest measurements, for stats.

    Attributes:
        recall: share of the true top-k that the index finds; None: not measured yet.
        k, queries: of the measurement.
        exact: whether searches are answered exactly at present.
        stale_share: share of the last epoch's top-k that the next one's keys returned, too; None
            before the first refresh.
        when: seconds since 1970.
        reason: why searches are exact or approximate, for people.
        failures: audits that failed so far; the log has the reasons.
    """

    recall: float | None
    k: int
    queries: int
    exact: bool
    stale_share: float | None
    when: float
    reason: str
    failures: int


def recall_at_k(found_rows_BK: Tensor, true_rows_BK: Tensor) -> float:
    """The share of the true rows that were found; pads (-1) do not count, no row at all is 1.0."""
    return _share_found(true_rows_BK, found_rows_BK)


def stale_share(old_ids_BK: Tensor, new_ids_BK: Tensor) -> float:
    """The share of a stale top-k that fresh keys also return; pads do not count."""
    return _share_found(old_ids_BK, new_ids_BK)


def _share_found(wanted_BK: Tensor, given_BM: Tensor) -> float:
    real_BK = wanted_BK >= 0
    there_BK = (wanted_BK.unsqueeze(2) == given_BM.unsqueeze(1)).any(dim=2)
    return float((there_BK & real_BK).sum() / real_BK.sum()) if bool(real_BK.any()) else 1.0


class QueryLog:
    """The newest queries, a few of each search. Thread-safe; takes a search microseconds."""

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._queries_nQ: Tensor | None = None
        self._excluded_n = torch.full((capacity,), -1, dtype=torch.int64)
        self._seen = 0
        self._k = 0

    def add(self, queries_BQ: Tensor, k: int, exclude_doc_ids_B: Tensor | None) -> None:
        """Copy a few queries, float32, of this search; of another width than before: start anew."""
        batch = queries_BQ.shape[0]
        count = min(batch, LOGGED_PER_SEARCH, self._capacity)
        if not count:
            return
        chosen = torch.arange(count) * batch // count
        queries = queries_BQ[chosen.to(queries_BQ.device)].detach().to("cpu", torch.float32)
        excluded = torch.full((count,), -1, dtype=torch.int64)
        if exclude_doc_ids_B is not None:
            excluded = exclude_doc_ids_B[chosen.to(exclude_doc_ids_B.device)].cpu()
        with self._lock:
            if self._queries_nQ is None or self._queries_nQ.shape[1] != queries.shape[1]:
                self._queries_nQ = torch.empty(self._capacity, queries.shape[1])
                self._seen = 0
            at = (self._seen + torch.arange(count)) % self._capacity
            self._queries_nQ[at] = queries
            self._excluded_n[at] = excluded
            self._seen += count
            self._k = k

    def recent(self) -> RecentQueries | None:
        """Copies of what is kept, on the CPU, in no particular order; None if there is nothing."""
        with self._lock:
            if self._queries_nQ is None or not self._seen:
                return None
            known = min(self._seen, self._capacity)
            return RecentQueries(
                queries_nQ=self._queries_nQ[:known].clone(),
                exclude_doc_ids_n=self._excluded_n[:known].clone(),
                k=self._k,
            )


Search = Callable[[Tensor, int, Tensor | None], Hits]
Rest = Callable[[float], None]
"""Called with the seconds that the piece of work took."""


def found_rows(
    search: Search,
    recent: RecentQueries,
    *,
    device: torch.device,
    rest: Rest | None = None,
) -> Tensor:
    """The rows that a search returns for these queries, int64 [n, K], a few queries at a time."""
    rows = []
    step = AT_ONCE_WITHOUT_REST if rest is None else AT_ONCE
    for start in range(0, recent.count, step):
        began = time.monotonic()
        few = slice(start, start + step)
        hits = search(
            recent.queries_nQ[few].to(device), recent.k, recent.exclude_doc_ids_n[few].to(device)
        )
        rows.append(hits.rows.cpu())
        if rest is not None:
            rest(time.monotonic() - began)
    return torch.cat(rows) if rows else torch.empty(0, recent.k, dtype=torch.int64)


def measure_recall(
    index: Index, recent: RecentQueries, *, device: torch.device, rest: Rest | None = None
) -> float:
    """Recall@k of the index's fast answers against those of a look at every key; of an index that
    looks at every key, against exact ones."""

    def exactly(queries_BQ: Tensor, k: int, excluded_B: Tensor | None) -> Hits:
        return index.search(queries_BQ, k, excluded_B, exact=True)

    fast: Search = index.search
    slow: Search = exactly
    if isinstance(index, GatedIndex):
        fast, slow = index.search_approximately, index.search_every_key
    true_rows = found_rows(slow, recent, device=device, rest=rest)
    return recall_at_k(found_rows(fast, recent, device=device, rest=rest), true_rows)


def judge_recall(
    index: GatedIndex,
    recent: RecentQueries | None,
    *,
    device: torch.device,
    rest: Rest | None = None,
) -> tuple[GateState, float | None, int]:
    """Have the index choose what it looks at, measure its recall, and let its gate decide. Blocks.

    Returns:
        (what the gate decided, the recall or None, on how many queries)
    """
    if recent is None or recent.count < MIN_QUERIES:
        count = 0 if recent is None else recent.count
        return index.gate.judge(None, count), None, count
    judges = index.tune(recent, rest)
    recall = measure_recall(index, judges, device=device, rest=rest)
    return index.gate.judge(recall, judges.count, by=index.describe()), recall, judges.count


def measure_stale_share(
    old: tuple[Index, Tensor],
    new: tuple[Index, Tensor],
    recent: RecentQueries,
    *,
    device: torch.device,
) -> float:
    """Share of the old epoch's answers to these queries that the new epoch gives, too.

    Args:
        old, new: an epoch's index and the ids of its rows, int64 [N].
    """
    answers = []
    for index, ids_N in (old, new):
        rows = found_rows(index.search, recent, device=device)
        if not len(ids_N):
            answers.append(torch.full_like(rows, -1))
            continue
        answers.append(ids_N.cpu()[rows.clamp(min=0)].masked_fill(rows < 0, -1))
    return stale_share(answers[0], answers[1])


class Audit:
    """Measures the live index every so often, and lets its gate decide.

    A failure is logged and counted, and never reaches a search.
    """

    def __init__(
        self,
        live: Callable[[], Index | None],
        queries: QueryLog,
        settings: IndexSettings,
        *,
        device: torch.device,
    ) -> None:
        """Start the thread. `live`: gives the index that answers at present, if there is one."""
        self._live = live
        self._queries = queries
        self._settings = settings
        self._device = device
        self._closed, self._hurry = threading.Event(), threading.Event()
        self._lock, self._measuring = threading.Lock(), threading.Lock()
        self._report = AuditReport(
            recall=None,
            k=0,
            queries=0,
            exact=True,
            stale_share=None,
            when=time.time(),
            reason="not audited yet",
            failures=0,
        )
        self._thread = threading.Thread(target=self._run, name="recall-audit", daemon=True)
        self._thread.start()

    @property
    def report(self) -> AuditReport:
        return self._report

    @property
    def measures(self) -> bool:
        """Whether it measures now."""
        return self._measuring.locked()

    def run_once(self) -> AuditReport:
        """Measure now, at full speed: somebody waits for it. Blocks; raises what the index raises.

        An audit under way does not rest any more, and ends first.
        """
        self._hurry.set()
        try:
            with self._measuring:
                return self._measure(rest=None)
        finally:
            self._hurry.clear()

    def _measure(self, rest: Rest | None) -> AuditReport:
        index = self._live()
        recent = self._queries.recent()
        if index is None or recent is None:
            return self._note(exact=True, reason="no search has been answered yet")
        if isinstance(index, GatedIndex):
            state, recall, queries = judge_recall(index, recent, device=self._device, rest=rest)
            return self._note(
                recall=recall,
                k=recent.k,
                queries=queries,
                exact=not state.open,
                reason=state.reason,
            )
        if self._settings.key_dtype == "float32":
            return self._note(
                recall=1.0, k=recent.k, queries=0, exact=True, reason="exact: the index is flat"
            )
        recent, recall = recent.sample(MIN_QUERIES), None
        if recent.count == MIN_QUERIES:
            recall = measure_recall(index, recent, device=self._device, rest=rest)
        return self._note(
            recall=recall,
            k=recent.k,
            queries=recent.count,
            exact=True,
            reason="exact but for the rounding of keys",
        )

    def note_stale_share(self, share: float) -> None:
        """Keep what `measure_stale_share` found when an epoch was sealed."""
        with self._lock:
            self._report = replace(self._report, stale_share=share)

    def close(self) -> None:
        """End the thread; returns when it has ended. An audit under way is given up."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        give_way()
        while not self._closed.wait(self._settings.audit_every_s):
            try:
                with self._measuring:
                    self._measure(rest=self._rest)
            except _AuditClosed:
                return
            except Exception as error:  # searches go on, whatever is wrong with the audit
                log.warning("recall audit failed: %s: %s", type(error).__name__, error)
                with self._lock:
                    self._report = replace(self._report, failures=self._report.failures + 1)

    def _rest(self, worked_s: float) -> None:
        until = time.monotonic() + worked_s * (1 / DUTY - 1)
        while not self._hurry.is_set() and (left := until - time.monotonic()) > 0:
            if self._closed.wait(min(left, LOOK_S)):
                break
        if self._closed.is_set():
            raise _AuditClosed

    def _note(
        self,
        *,
        exact: bool,
        reason: str,
        recall: float | None = None,
        k: int = 0,
        queries: int = 0,
    ) -> AuditReport:
        with self._lock:
            self._report = replace(
                self._report,
                recall=recall,
                k=k,
                queries=queries,
                exact=exact,
                reason=reason,
                when=time.time(),
            )
            return self._report


class _AuditClosed(Exception):
    """The audit was closed while it measured."""
