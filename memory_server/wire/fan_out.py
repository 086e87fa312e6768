"""Ask all shards of a memory at once over sockets, and make their replies one answer."""

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from memory_server.api import Entry, LostShardPolicy, Retrieved
from memory_server.errors import MemoryClosed, ShardLost, UnknownEntry, UnknownEpoch
from memory_server.replies import ShardReply, as_retrieved, combine_replies
from memory_server.waiting import in_order
from memory_server.wire.endpoints import Endpoints, ResolveEndpoint
from memory_server.wire.fan_out_call import Call
from memory_server.wire.fan_out_tasks import ActorCall, Links, Question, Task
from memory_server.wire.frames import Kind, proof_of_reply, proof_of_request
from memory_server.wire.hedging import HedgeAfter, HedgeDelay, ReplicaBook
from memory_server.wire.messages import pack_ids, unpack_entries
from memory_server.wire.queries import QUERY_TYPES, QueryType, as_it_arrives
from memory_server.wire.search_client import Lane, Lanes
from memory_server.wire.search_messages import SearchRequest, pack_search, unpack_hits
from memory_server.wire.search_stats import Counters, FanoutStats, fanout_stats

MAX_REQUEST_BYTES = 64 << 20  # what a search server accepts
ACTOR_CALLS_AT_ONCE = 32
ENTRIES_TRIES = 2


class SearchFanout:
    """Searches every shard of one memory. Any number of threads may use it at once.

    Each shard has one or more replicas, any of which may answer. A lost connection, a restarted
    actor and a full queue are met by finding the replica again, asking another, and asking later,
    until the deadline. No answer is ever partial without naming what is missing.
    """

    def __init__(
        self,
        replicas: Sequence[int],
        *,
        resolve_endpoint: ResolveEndpoint,
        secret: bytes,
        name: str = "memory",
        actor_call: ActorCall | None = None,
        policy: LostShardPolicy = "wait",
        deadline_s: float = 60.0,
        hedge_after: HedgeAfter = "p95",
        fan_in: int = 16,
        queries: QueryType = "float16",
        shard_numbers: Sequence[int] | None = None,
    ) -> None:
        """Connect to nothing yet: servers are found when they are first asked.

        Args:
            replicas: how many each shard has, at least 1; shard s is `replicas[s]`.
            resolve_endpoint: (shard, replica) to the address of its `SearchServer` now; may block,
                as it is called from a thread beside the search. None: the actor answers, but has
                no socket to reach. It raises ShardLost if the actor is gone for good, and anything
                else if it should be asked again.
            secret: the servers' own.
            name: the memory's, for messages.
            actor_call: (shard, replica, method, arguments, timeout_s) to the reply of "search" or
                "entries", for replicas whose socket cannot be reached. Without it these are lost.
                At most ACTOR_CALLS_AT_ONCE run at a time; more are as if a queue was full.
            policy: "wait" for lost shards until the deadline, or "degrade": answer without them.
            hedge_after: seconds until a second replica is asked the same; "p95": as long as 95 of
                100 recent answers took.
            fan_in: with more shards than this, servers ask groups of shards for the client.
            queries: how they travel; as "float16" they lose digits beyond the third.
            shard_numbers: if only some of a memory's shards are asked, which these are.

        Raises:
            ValueError: an argument is out of range.
        """
        if not replicas or min(replicas) < 1:
            raise ValueError(f"replicas={list(replicas)!r}: each shard has at least 1")
        if policy not in ("wait", "degrade"):
            raise ValueError(f"policy={policy!r}; allowed: 'wait', 'degrade'")
        if deadline_s <= 0:
            raise ValueError(f"deadline_s={deadline_s} must be greater than 0")
        if fan_in < 2:
            raise ValueError(f"fan_in={fan_in} must be at least 2")
        if queries not in QUERY_TYPES:
            raise ValueError(f"queries={queries!r}; allowed: {', '.join(QUERY_TYPES)}")
        self._name = name
        self._policy: LostShardPolicy = policy
        self._deadline_s = deadline_s
        self._fan_in = fan_in
        self._travelling: QueryType = queries
        self._lanes = Lanes()
        self._counters = Counters()
        self._closed = False
        self._links = Links(
            shards=range(len(replicas)) if shard_numbers is None else list(shard_numbers),
            replicas=list(replicas),
            endpoints=Endpoints(replicas, resolve_endpoint, can_call_actors=actor_call is not None),
            book=ReplicaBook(replicas),
            delay=HedgeDelay(hedge_after),
            relay_delay=HedgeDelay("p95"),
            counters=self._counters,
            actors=ThreadPoolExecutor(ACTOR_CALLS_AT_ONCE, thread_name_prefix="ask-actor"),
            actor_slots=threading.Semaphore(ACTOR_CALLS_AT_ONCE),
            actor_call=actor_call,
            proof=proof_of_request(secret),
            server_proof=proof_of_reply(secret),
        )

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        exclude_doc_ids: Tensor | None = None,
        *,
        epoch: int | None = None,
        exact: bool = False,
        domains: tuple[str, ...] = (),
    ) -> Retrieved:
        """The k best of all shards, from one epoch. Blocks until the deadline at most.

        Args:
            queries_BQ: float32, finite, of the keys' width: `requests.checked_request` sees to it.
            epoch: None: the live one. If it is switched while shards are asked, the newer one.
            domains: only their entries; none named: all.

        Returns:
            Tensors on the queries' device.

        Raises:
            ValueError: the request is bad or too large. MemoryClosed: by this process.
            UnknownEpoch, EpochNotSealed, RefreshFailed, UnknownDomain: as the shards say.
            ShardLost: a shard did not answer ("wait"), or none did.
            Overloaded: a queue was full until the deadline.
            AccessRefused: the servers know another secret.
        """
        request = SearchRequest(
            queries=queries_BQ.detach().cpu().numpy(),
            k=k,
            exclude_doc_ids=None
            if exclude_doc_ids is None
            else exclude_doc_ids.detach().cpu().numpy().astype(np.int64),
            exact=exact,
            domains=domains,
        )
        rows = len(request.queries)
        # Who asks for exact answers wants them to the queries as they are.
        travelling: QueryType = "float32" if exact else self._travelling

        def arguments(epoch: int | None, wait_s: float) -> dict[str, Any]:
            return {
                "queries_BQ": as_it_arrives(request.queries, travelling),
                "k": k,
                "exclude_doc_ids": request.exclude_doc_ids,
                "epoch": epoch,
                "wait_s": wait_s,
                "exact": exact,
                "domains": domains,
            }

        question = Question(
            kind=Kind.SEARCH,
            body=_small_enough(pack_search(request, travelling), rows),
            decode=lambda body, shard: unpack_hits(body, shard, rows, k),
            method="search",
            arguments=arguments,
        )
        replies, missing = self.replies(question, epoch, self._deadline_s)
        best = combine_replies(replies, k)
        return as_retrieved(best, device=queries_BQ.device, missing_shards=missing)

    def replies(
        self, question: Question, epoch: int | None, timeout_s: float
    ) -> tuple[list[ShardReply], tuple[int, ...]]:
        """The replies of shards and of groups of them, all of one epoch, and the missing shards.

        Raises:
            See `search`.
        """
        self._counters.add(searches=1)
        deadline = time.monotonic() + timeout_s

        def start_over() -> list[Task]:
            return [
                Task(group, epoch, relay=len(group) > 1)
                for group in groups_of(len(self._links.shards), self._fan_in)
            ]

        tasks = start_over()
        with self._borrowed() as lane:
            call = Call(self._links, lane, question, policy=self._policy, deadline=deadline)
            while True:
                try:
                    tasks = call.ask(tasks)
                except UnknownEpoch:
                    # The epoch that some answered from was released while the others were asked.
                    if all(task.epoch == epoch for task in tasks):
                        raise
                    tasks = start_over()
                    continue
                replies = [task.reply for task in tasks if task.reply is not None]
                epochs = {reply.epoch for reply in replies}
                if len(epochs) <= 1:
                    break
                # The live epoch was switched between two shards: all of them hold the newer one.
                self._counters.add(epoch_switches=1)
                for task in tasks:
                    if task.reply is not None and task.reply.epoch != max(epochs):
                        task.reply, task.epoch = None, max(epochs)
        missing = self._checked(tasks, bool(replies))
        if missing:
            self._counters.add(degraded=1)
        return replies, missing

    def entries(
        self, ids: Sequence[int], *, epoch: int | None = None, domains: tuple[str, ...] = ()
    ) -> list[Entry]:
        """The live entries with these ids, in the order asked. A lost shard is always waited for.

        Args:
            domains: only of these; none named: of all.

        Raises:
            UnknownEntry: names the ids that are not there. Otherwise see `search`.
        """
        wanted = [int(entry_id) for entry_id in ids]
        question = Question(
            kind=Kind.ENTRIES,
            body=_small_enough(pack_ids(wanted, domains), len(wanted)),
            decode=lambda body, shard: unpack_entries(body),
            method="entries",
            arguments=lambda e, wait_s: {
                "ids": wanted,
                "epoch": e,
                "wait_s": wait_s,
                "domains": domains,
            },
        )
        deadline = time.monotonic() + self._deadline_s
        for tries_left in reversed(range(ENTRIES_TRIES)):
            with self._borrowed() as lane:
                call = Call(self._links, lane, question, policy="wait", deadline=deadline)
                tasks = call.ask(Task((shard,), epoch) for shard in range(len(self._links.shards)))
            self._checked(tasks, False)
            try:
                return in_order(wanted, [entry for task in tasks for entry in task.reply])
            except UnknownEntry:
                # If the live epoch was switched between two shards, an entry that the switch moved
                # from one to the other may have been on neither.
                if not tries_left or epoch is not None:
                    raise
        raise AssertionError("the last try returns or raises")

    def stats(self) -> FanoutStats:
        """What was counted so far, in this process."""
        return fanout_stats(self._counters)

    def close(self) -> None:
        """Close the connections; a running search may finish. A second call does nothing."""
        self._closed = True
        self._links.endpoints.close()
        self._links.actors.shutdown(wait=False, cancel_futures=True)
        self._lanes.close()

    def _borrowed(self) -> AbstractContextManager[Lane]:
        if self._closed:
            raise MemoryClosed("this memory was closed; start or attach to another one")
        return self._lanes.borrow(self._links.endpoints.addresses)

    def _checked(self, tasks: Sequence[Task], answered: bool) -> tuple[int, ...]:
        """The missing shards, if going on without them is allowed. Raises ShardLost."""
        lost = {shard: task.reason for task in tasks if task.missing for shard in task.shards}
        if not lost or (self._policy == "degrade" and answered):
            return tuple(sorted(lost))
        reasons = "; ".join(f"shard {shard}: {reason}" for shard, reason in sorted(lost.items()))
        hint = (
            f"raise deadline_s ({self._deadline_s:g} s) if it needs longer to come back, or use "
            "on_lost_shard='degrade' to go on without it"
            if self._policy == "wait"
            else "no shard answered"
        )
        raise ShardLost(f"memory {self._name!r} cannot answer: {reasons}; {hint}")


def default_fan_in(replicas: int) -> int:
    """How many shards a client asks by itself.

    With one replica relays are as good at every size, and better with many clients. With more, a
    relay is given one replica of each shard and cannot ask a second one when it is slow: asked
    directly, 256 shards answered 99 % of searches in an eighth of the time (docs/simulation.md).
    """
    return 16 if replicas == 1 else 256


def groups_of(shards: int, fan_in: int) -> list[tuple[int, ...]]:
    """Who is asked together: every shard alone, or about sqrt(shards) groups of as many."""
    if shards <= fan_in:
        return [(shard,) for shard in range(shards)]
    groups = math.ceil(math.sqrt(shards))
    bounds = [shards * group // groups for group in range(groups + 1)]
    return [tuple(range(a, b)) for a, b in pairwise(bounds)]


def _small_enough(body: bytes, rows: int) -> bytes:
    if len(body) > MAX_REQUEST_BYTES:
        raise ValueError(
            f"a request of {rows} rows has {len(body)} bytes, {MAX_REQUEST_BYTES} are allowed; "
            "ask for fewer at a time"
        )
    return body
