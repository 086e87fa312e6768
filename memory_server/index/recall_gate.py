"""When an approximate index may answer: only while its measured recall is high enough."""

import threading
from dataclasses import dataclass

MIN_QUERIES = 64  # 64 queries of 5 entries know a recall of 0.95 to about 0.01


@dataclass(frozen=True, kw_only=True)
class GateState:
    """What the gate last decided.

    Attributes:
        open: whether approximate answers are given.
        recall: what was measured last; None before the first measurement.
        queries: on how many queries.
        reason: why it is open or closed, for people.
    """

    open: bool
    recall: float | None
    queries: int
    reason: str


class RecallGate:
    """Closed until a measurement opens it. Thread-safe; reading it costs nothing."""

    def __init__(self, min_recall: float) -> None:
        self._min_recall = min_recall
        self._lock = threading.Lock()
        self._changes = 0
        self._state = GateState(
            open=False, recall=None, queries=0, reason="exact: its recall is not measured yet"
        )

    @property
    def min_recall(self) -> float:
        return self._min_recall

    @property
    def state(self) -> GateState:
        return self._state

    @property
    def changes(self) -> int:
        """How often it has opened or closed."""
        return self._changes

    def judge(self, recall: float | None, queries: int, *, by: str = "") -> GateState:
        """Decide by a recall that was measured on this many queries; None: could not be measured.

        With fewer than MIN_QUERIES nothing is known, and the gate is closed.

        Args:
            by: what the search looked at, for people.
        """
        enough = recall is not None and queries >= MIN_QUERIES
        if not enough:
            opened = False
            reason = f"exact: only {queries} of {MIN_QUERIES} recent queries are known"
        else:
            assert recall is not None
            opened = recall >= self._min_recall
            reason = (
                f"{'approximate' if opened else 'exact'}: recall {recall:.3f} on {queries} recent "
                f"queries is {'at least' if opened else 'below'} {self._min_recall:g}"
                f"{f' ({by})' if by else ''}"
            )
        return self._decide(GateState(open=opened, recall=recall, queries=queries, reason=reason))

    def take_over(self, state: GateState) -> GateState:
        """Go on with what was measured on an index whose approximate part is the same."""
        return self._decide(state)

    def shut(self, reason: str) -> GateState:
        """Close it for a reason that is not a measurement."""
        before = self._state
        return self._decide(
            GateState(
                open=False, recall=before.recall, queries=before.queries, reason=f"exact: {reason}"
            )
        )

    def _decide(self, state: GateState) -> GateState:
        with self._lock:
            self._changes += state.open != self._state.open
            self._state = state
        return state
