"""What a call to all shards keeps: the question, who is asked it, and what came of that."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from memory_server.errors import Overloaded
from memory_server.wire.endpoints import Endpoints
from memory_server.wire.frames import Kind
from memory_server.wire.hedging import HedgeDelay, ReplicaBook
from memory_server.wire.search_stats import Counters

ActorCall = Callable[[int, int, str, dict[str, Any], float], Any]
"""(shard, replica, method, arguments, timeout_s) to a reply, by way of the actor. Blocks."""

FIRST_BACKOFF_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Links:
    """What all calls of a process share."""

    shards: Sequence[int]  # by position: the numbers that the servers know
    replicas: Sequence[int]
    endpoints: Endpoints
    book: ReplicaBook
    delay: HedgeDelay
    relay_delay: HedgeDelay
    counters: Counters
    actors: ThreadPoolExecutor
    actor_slots: threading.Semaphore  # so that what goes by actors does not pile up here
    actor_call: ActorCall | None
    proof: bytes
    server_proof: bytes


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: by socket as `kind` and `body`, by actor as `method` and `arguments`."""

    kind: Kind
    body: bytes
    decode: Callable[[bytes, int], Any]
    method: str
    arguments: Callable[[int | None, float], dict[str, Any]]


@dataclass
class Attempt:
    task: "Task"
    shard: int
    replica: int | None  # None: a relay
    address: str
    sent_at: float
    hedge: bool = False
    future: "Future[Any] | None" = None


@dataclass(eq=False)
class Task:
    """What one shard is asked; or a group of them, by way of one of their servers."""

    shards: tuple[int, ...]
    epoch: int | None
    relay: bool = False
    attempts: dict[int, Attempt] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)  # replicas that turned this round down
    retry_at: float = 0.0
    hedge_at: float = float("inf")
    relay_until: float = float("inf")
    backoff_s: float = FIRST_BACKOFF_S
    refusals: int = 0
    reason: str = "it did not answer"
    overloaded: Overloaded | None = None
    reply: Any = None
    missing: bool = False

    @property
    def open(self) -> bool:
        return self.reply is None and not self.missing
