"""An epoch as one shard holds it: how far its staging is, then what answers."""

import threading
from dataclasses import dataclass, field

from memory_server.api import StageState
from memory_server.index.base import Index
from memory_server.keys.key_blocks import BlockedKeys
from memory_server.shard.content import ShardContent
from memory_server.shard.epochs import EpochPlan, Receipt


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """How far a shard is with an epoch."""

    state: StageState
    done: int
    total: int
    error: str | None
    receipt: Receipt | None
    seconds: float
    remaining_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class SealedEpoch:
    """All that answers: immutable. `weights_id` is of the weights that made the keys."""

    weights_id: int
    content: ShardContent
    keys: BlockedKeys
    index: Index
    receipt: Receipt


@dataclass(kw_only=True)
class HeldEpoch:
    plan: EpochPlan
    began: float
    restoring: bool  # sealed before the shard restarted: searches wait for it
    encoding_since: float | None = None
    done: int = 0
    total: int = 0
    error: str | None = None
    sealed: SealedEpoch | None = None
    seconds: float | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def remaining_s(self, now: float) -> float | None:
        """Seconds that the rows still to come will take if they go on as those so far."""
        if self.encoding_since is None or not self.done:
            return None
        return (now - self.encoding_since) * (self.total - self.done) / self.done
