"""What a shard's server does beside searching: it reads entries, and relays searches of groups.

Each has threads of its own, so that neither delays a search, and as many requests may wait as
searches may.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from memory_server.api import Entry
from memory_server.errors import Overloaded, ShardRestoring
from memory_server.wire.frames import Kind, Preamble
from memory_server.wire.messages import pack_entries, unpack_group, unpack_ids
from memory_server.wire.search_messages import pack_hits
from memory_server.wire.search_queue import RESTORING_PAUSE_S, Searchable
from memory_server.wire.search_relay import Relay
from memory_server.wire.search_stats import Counters

RELAYS_AT_ONCE = 4


class ShardLike(Searchable, Protocol):
    """What a server serves; `Shard` is one."""

    def entries(
        self,
        ids: Sequence[int],
        *,
        epoch: int | None = None,
        wait_s: float = 0.0,
        domains: Collection[str] = (),
    ) -> list[Entry]: ...


class SideRequests:
    """Takes requests from the thread that receives, and answers them from its own threads."""

    def __init__(
        self,
        shard: ShardLike,
        *,
        secret: bytes,
        limit: int,
        counters: Counters,
        reply: Callable[[bytes, Preamble, Kind, bytes], None],
        fail: Callable[[bytes, Preamble, Exception], None],
    ) -> None:
        """
        Args:
            limit: requests of a kind that may wait.
            reply, fail: send an answer, or an error, to whoever asked. From any thread.
        """
        self._shard = shard
        self._limit = limit
        self._counters = counters
        self._reply, self._fail = reply, fail
        self._readers = ThreadPoolExecutor(1, thread_name_prefix=f"entries-{shard.shard}")
        self._relay = Relay(secret)
        self._relays = ThreadPoolExecutor(RELAYS_AT_ONCE, f"relay-{shard.shard}")
        self._lock = threading.Lock()
        self._waiting = {Kind.ENTRIES: 0, Kind.RELAY: 0}
        self._closed = False

    def read(self, sender: bytes, preamble: Preamble, body: bytes, arrived: float) -> None:
        """Answer a request for entries, after those that came before.

        Raises:
            BadMessage: it is none. Overloaded.
        """
        wanted = unpack_ids(body)
        self._begin(Kind.ENTRIES)
        self._counters.add(entries=1)
        self._readers.submit(self._read, sender, preamble, wanted, arrived)

    def relay(
        self, sender: bytes, preamble: Preamble, body: bytes, group: bytes, arrived: float
    ) -> None:
        """Ask the shards of a group what the body asks, and answer with the best of all.

        Raises:
            BadMessage: the group is none. Overloaded.
        """
        members = unpack_group(group)
        self._begin(Kind.RELAY)
        self._relays.submit(self._relayed, sender, preamble, body, members, arrived)

    def close(self) -> None:
        """What waits is not answered."""
        self._closed = True
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._relays.shutdown(wait=True, cancel_futures=True)
        self._relay.close()

    def _read(
        self,
        sender: bytes,
        preamble: Preamble,
        wanted: tuple[list[int], tuple[str, ...]],
        arrived: float,
    ) -> None:
        """Runs on the readers' thread."""
        ids, domains = wanted
        now = time.monotonic()
        try:
            if now >= arrived + preamble.timeout_s:
                raise TimeoutError(f"a request for entries waited {now - arrived:.3f} s")
            patient = now < arrived + min(preamble.wait_s, preamble.timeout_s)
            try:
                found = self._shard.entries(
                    ids,
                    epoch=preamble.epoch,
                    wait_s=RESTORING_PAUSE_S if patient else 0.0,
                    domains=domains,
                )
            except ShardRestoring:
                if not patient or self._closed:
                    raise
                # To the end of the queue: others may want an epoch that is there.
                self._readers.submit(self._read, sender, preamble, wanted, arrived)
                return
            self._reply(sender, preamble, Kind.FOUND, pack_entries(found))
        except Exception as error:  # it travels to whoever asked
            self._fail(sender, preamble, error)
        self._end(Kind.ENTRIES)

    def _relayed(
        self,
        sender: bytes,
        preamble: Preamble,
        body: bytes,
        members: list[tuple[int, str]],
        arrived: float,
    ) -> None:
        """Runs on a relay's thread."""
        try:
            waited_s = time.monotonic() - arrived
            if waited_s >= preamble.timeout_s:
                raise TimeoutError(f"a search to be relayed waited {waited_s:.3f} s")
            left = preamble._replace(timeout_s=preamble.timeout_s - waited_s)
            reply = self._relay.ask(left, body, tuple(members))
            self._counters.add(relayed=1)
            self._reply(sender, preamble, Kind.HITS, pack_hits(reply))
        except Exception as error:  # it travels to whoever asked
            self._fail(sender, preamble, error)
        self._end(Kind.RELAY)

    def _begin(self, kind: Kind) -> None:
        with self._lock:
            if self._waiting[kind] >= self._limit:
                raise Overloaded(
                    f"shard {self._shard.shard} is overloaded: {self._waiting[kind]} requests "
                    f"({kind.name.lower()}) wait, {self._limit} may; ask again later"
                )
            self._waiting[kind] += 1

    def _end(self, kind: Kind) -> None:
        with self._lock:
            self._waiting[kind] -= 1
