"""An epoch as one shard holds it: how far its staging is, then what answers."""

import threading
from dataclasses import dataclass, field

from memory_server.api import StageState
from memory_server.index.base import Index, IndexInput
from memory_server.keys.key_blocks import BlockedKeys
from memory_server.shard.content import ShardContent
from memory_server.shard.domain_index import DomainIndexes
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
    """All that answers: immutable, but for what is built when it is first asked for.

    Attributes:
        weights_id: of the weights that made the keys.
        rows: what the index was built from.
    """

    weights_id: int
    content: ShardContent
    keys: BlockedKeys
    index: Index
    rows: IndexInput
    receipt: Receipt
    domain_indexes: DomainIndexes = field(default_factory=DomainIndexes, compare=False)


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
