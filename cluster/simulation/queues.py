"""The replicas' queues of one step, all at once: who is answered when, as arrays.

The same discipline as `parts.Replica` plays one by one: an idle replica takes the first search
alone, a busy one all that wait, up to `max_batch_rows`; more than `queue_limit` may not wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.simulation.draws import factors
from cluster.simulation.scenario import Scenario
from cluster.simulation.service import Floats, ServiceTimes
from memory_server.wire.fan_out_call import LONGEST_BACKOFF_S
from memory_server.wire.fan_out_tasks import FIRST_BACKOFF_S

Ints = npt.NDArray[np.int64]
APART_S = 1e5  # between the queues' times in one sorted array; far more than any step takes


@dataclass
class Queues:
    """All replicas, by number; times are seconds since the step began.

    Attributes:
        free: when each has answered what it took so far; encoded: when its new keys are there.
    """

    scenario: Scenario
    service: ServiceTimes
    free: Floats
    encoded: Floats

    @classmethod
    def idle(cls, scenario: Scenario, service: ServiceTimes) -> Queues:
        """Replicas that have nothing to do."""
        count = scenario.shards * scenario.replicas
        return cls(scenario, service, np.zeros(count), np.full(count, -np.inf))

    def copy(self) -> Queues:
        """The same, to try something."""
        return Queues(self.scenario, self.service, self.free.copy(), self.encoded.copy())

    def pass_time(self, seconds: float) -> None:
        """A step is over: times count from the next one's beginning."""
        self.free -= seconds
        self.encoded -= seconds

    def encode(self, at: float) -> None:
        """All begin to make new keys."""
        self.encoded[:] = at + self.scenario.entries_per_shard / self.service.encode_entries_per_s

    def serve(self, queue: Ints, arrival: Floats, seed: int) -> Floats:
        """When each search is answered.

        Args:
            queue: which replica is asked, arrival: and when.
            seed: the nth search of a replica gets the same luck whenever the seed is the same, so
                that a trial without hedges can be made again with them.
        """
        if not len(queue):
            return arrival.copy()
        order = np.lexsort((arrival, queue))
        queues, first, counts = np.unique(queue[order], return_index=True, return_counts=True)
        line = _Line(
            at=arrival[order].copy(),
            order=order,
            place=np.repeat(np.arange(len(queues)), counts),
            tries=np.zeros(len(order), np.int64),
        )
        end = first + counts
        luck, random = (np.random.default_rng([seed, number]) for number in range(2))
        joined = max(1, self.scenario.max_batch_rows // self.scenario.batch)
        mean_s = self._means(min(joined, int(counts.max())))
        head, answered = first.copy(), np.full(len(order), -np.inf)
        active = np.arange(len(queues))
        while len(active):
            at, names = head[active], queues[active]
            drawn = factors(self.scenario, self.service, luck, len(self.free))[names]
            start = np.maximum(self.free[names], line.at[at])
            waiting = line.arrived_by(active, start, end)
            waiting = np.where(self.free[names] > line.at[at], np.maximum(waiting, at + 1), at + 1)
            after = np.minimum(waiting, at + joined)
            encoding = start < self.encoded[names]
            took = mean_s[after - at] * drawn
            took *= np.where(encoding, self.service.refresh_slowdown, 1.0)
            self.encoded[names] += np.where(encoding, took * (1 - self.service.encode_share), 0.0)
            self.free[names] = start + took
            answered[at] = start + took
            head[active] = after
            self._refuse(line, active, after, end, start + took, random)
            active = active[after < end[active]]
        # Only the first of each joined search was noted; answers of a replica come in its order.
        noted = np.maximum.accumulate(np.where(answered > -np.inf, np.arange(len(order)), 0))
        result = np.empty(len(order))
        result[line.order] = answered[noted]
        return result

    def _means(self, most: int) -> Floats:
        """Seconds of so many joined searches; [0] is not used."""
        rows = np.arange(most + 1, dtype=float) * self.scenario.batch
        return self.service.search_s(self.scenario.entries_per_shard, rows)

    def _refuse(
        self, line: _Line, active: Ints, after: Ints, end: Ints, until: Floats, random: Any
    ) -> None:
        """Those who found the queue full while a search ran come again later."""
        limit = self.scenario.queue_limit
        if not (end[active] - after > limit).any():
            return
        arrived = line.arrived_by(active, until, end)
        full = arrived - after > limit
        if not full.any():
            return
        refused = _ranges(after[full] + limit, arrived[full])
        backoff = np.minimum(FIRST_BACKOFF_S * 2.0 ** line.tries[refused], LONGEST_BACKOFF_S)
        back_s = 2 * self.scenario.latency_s
        line.at[refused] += back_s + backoff * random.uniform(0.5, 1.0, len(refused))
        line.tries[refused] += 1
        line.sort(_ranges(after[full] + limit, end[active][full]))


@dataclass
class _Line:
    """Searches in the order of their replicas' places, and of arrival at each."""

    at: Floats
    order: Ints
    place: Ints
    tries: Ints

    def __post_init__(self) -> None:
        self._keys = self.place * APART_S + self.at

    def arrived_by(self, places: Ints, when: Floats, end: Ints) -> Ints:
        """Index behind the last that has come to each place by then."""
        found = np.searchsorted(self._keys, places * APART_S + when, side="right")
        behind: Ints = np.minimum(found, end[places])
        return behind

    def sort(self, span: Ints) -> None:
        """Bring these indices, whole ends of places, into order again."""
        by = span[np.lexsort((self.at[span], self.place[span]))]
        for values in (self.at, self.order, self.tries):
            values[span] = values[by]
        self._keys[span] = self.place[span] * APART_S + self.at[span]


def _ranges(first: Ints, end: Ints) -> Ints:
    """All numbers of several ranges, one after the other."""
    counts = end - first
    starts = np.cumsum(counts) - counts
    numbers: Ints = np.arange(counts.sum()) + np.repeat(first - starts, counts)
    return numbers


def one_after_the_other(who: Ints, ready: Floats, each_s: float, free: Floats) -> Floats:
    """When each message is handled by its receiver, who takes them one after the other.

    Args:
        who: the receiver of each message; ready: when it is there.
        each_s: what one takes. free: when each receiver begins; afterwards, when it is free again.
    """
    order = np.lexsort((ready, who))
    receivers, first, counts = np.unique(who[order], return_index=True, return_counts=True)
    place = np.repeat(np.arange(len(receivers)), counts)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    # The kth is done at the latest of (the jth is ready) + (k - j + 1) times each_s, j <= k.
    earliest = np.maximum(ready[order], free[who[order]]) - rank * each_s
    latest = np.maximum.accumulate(earliest + place * APART_S) - place * APART_S
    done = latest + (rank + 1) * each_s
    free[receivers] = done[first + counts - 1]
    result = np.empty(len(order))
    result[order] = done
    return result
