"""An epoch as one shard holds it: how far its staging is, then what answers."""

import threading
from dataclasses import dataclass, field

from torch import Tensor

from memory_server.api import StageState
from memory_server.content import ShardContent
from memory_server.epochs import EpochPlan, Receipt
from memory_server.index import Index


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """How far a shard is with an epoch."""

    state: StageState
    done: int
    total: int
    error: str | None
    receipt: Receipt | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SealedEpoch:
    """All that answers: immutable."""

    content: ShardContent
    keys: Tensor  # float32 [N, Q]
    index: Index
    receipt: Receipt


@dataclass(kw_only=True)
class HeldEpoch:
    plan: EpochPlan
    began: float
    restoring: bool  # sealed before the shard restarted: searches wait for it
    done: int = 0
    total: int = 0
    error: str | None = None
    sealed: SealedEpoch | None = None
    seconds: float | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
