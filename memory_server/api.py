"""What a memory is to those who use it: the types of its replies and the `Memory` protocol.

Two implementations pass one contract test-suite: `LocalMemory` (in process) and `RayMemory`
(actors). Shape suffixes: B batch, K retrieved, S entry tokens, Q key width, N entries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KeyEncoder = Callable[[Tensor], Tensor]
"""Entry tokens, int64 [n, S], to keys, float32 [n, Q]. No gradient, eval mode."""


@runtime_checkable
class KeysById(Protocol):
    """Keys that were made before, found by the entry's id instead of being encoded."""

    @property
    def key_width(self) -> int:
        """Q."""
        ...

    def keys_of(self, ids: npt.NDArray[np.int64], tokens: npt.NDArray[Any]) -> Tensor:
        """float32 [n, Q] for ids [n] and their tokens [n, S]; raises UnknownEntry."""
        ...


KeySource = KeyEncoder | KeysById
"""What a shard gets keys from."""
KeyEncoderFactory = Callable[[Mapping[str, Tensor]], KeySource]
"""Weights to an encoder. It must pickle: shards in other processes call it."""


@runtime_checkable
class TabledFactory(Protocol):
    """A KeyEncoderFactory that can also make encoders from tables, which it builds from weights.

    Tables take a while to build and then make keys many times faster; they hold tensors only, so
    that processes can share them.
    """

    def __call__(self, weights: Mapping[str, Tensor]) -> KeySource: ...

    def tables(
        self,
        weights: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        *,
        entry_tokens: int | None = None,
    ) -> Mapping[str, Tensor] | None:
        """Build the tables on a device, for entries of at most so many tokens (None: any).

        None where the model's keys cannot be made from tables. Raises ValueError for weights that
        do not fit.
        """
        ...

    def from_tables(self, tables: Mapping[str, Tensor]) -> KeyEncoder:
        """The encoder of these tables; shares their memory, computes where they are.

        It takes tokens of any integer type.
        """
        ...

    def tables_digest(
        self, weights: Mapping[str, Tensor], *, entry_tokens: int | None = None
    ) -> str:
        """Hexadecimal; the same only where the tables are the same."""
        ...

    def tables_bytes(self, entry_tokens: int | None = None) -> int:
        """What the tables take; 0 where there are none."""
        ...

    def tables_pay_from(self, entry_tokens: int | None = None) -> int | None:
        """So many entries take as long to encode directly as by tables; None: there are none."""
        ...


StageState = Literal["encoding", "sealed", "failed"]
"""Where an epoch stands: its keys are being made, every shard has them, or it has failed."""
LostShardPolicy = Literal["wait", "degrade"]
"""When a shard does not answer: wait for it up to the deadline, or answer without and say so."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """One reply: the k best live entries of one epoch for each query, best first.

    Attributes:
        ids: int64 [B, K]; -1 pads where fewer than K eligible entries exist.
        scores: float32 [B, K], descending, -inf pads; ties have the lower id first.
        tokens: int64 [B, K, S]; the pad token in pads.
        doc_ids: int64 [B, K]; -1 pads.
        epoch: the epoch that answered, the same on every shard.
        encoder_step: the optimizer step whose weights made the keys.
        missing_shards: shards that did not answer; never empty by accident, only under "degrade".
        exact: whether every shard searched exactly; an approximate index may miss a winner.
        keys: float32 [B, K, Q], only from a memory of stored vectors; zeros in pads.
        values: float32 [B, K, J, H], J vectors per entry, only where they are stored.
    """

    ids: Tensor
    scores: Tensor
    tokens: Tensor
    doc_ids: Tensor
    epoch: int
    encoder_step: int
    missing_shards: tuple[int, ...] = ()
    exact: bool = True
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One passage. `tokens` is padded to the store's entry length S."""

    id: int
    doc_id: int
    tokens: tuple[int, ...]
    text: str
    title: str
    source: str


@dataclass(frozen=True, kw_only=True)
class MemoryInfo:
    """What the live epoch holds. `bytes` is by part: keys, ids, index (RAM) and tokens (mapped)."""

    entries: int
    shards: int
    key_width: int
    entry_tokens: int
    epoch: int
    encoder_step: int
    content_version: str
    tokenizer_fingerprint: str
    pad_token_id: int
    bytes: Mapping[str, int]
    index: str


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """How far an epoch is.

    `done` of `total` rows have keys; `seconds` since it was staged; `remaining_s` as the rows so
    far let expect, None as long as nothing can be said.
    """

    epoch: int
    state: StageState
    done: int
    total: int
    error: str | None
    seconds: float
    remaining_s: float | None = None


@runtime_checkable
class EpochPin(Protocol):
    """A reader's hold on an epoch: a release of it waits until this is closed or its lease ends."""

    @property
    def epoch(self) -> int:
        """The epoch that is held."""
        ...

    def renew(self) -> None:
        """Begin the lease anew. Raises UnknownEpoch when it has ended."""
        ...

    def close(self) -> None:
        """Let go. A second call does nothing."""
        ...

    def __enter__(self) -> "EpochPin": ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable
class Memory(Protocol):
    """A versioned key-value store of passages that answers exact top-k searches."""

    def info(self) -> MemoryInfo:
        """Describe the live epoch."""
        ...

    def search(
        self,
        queries_BQ: Tensor,
        k: int,
        *,
        exclude_doc_ids: Tensor | None = None,
        epoch: int | None = None,
        exact: bool = False,
    ) -> Retrieved:
        """Return the k best entries of each query by inner product. Blocks; not collective.

        Args:
            queries_BQ: floating point, finite; searched in float32.
            k: 1 <= k <= requests.MAX_TOP_K; more than the eligible entries gives pads.
            exclude_doc_ids: int64 [B]; entries of that document are masked inside the top-k, -1:
                none.
            epoch: a sealed epoch to answer from; None: the live one.
            exact: search exactly, also where an approximate index may answer.

        Returns:
            Tensors on the device of `queries_BQ`.

        Raises:
            ValueError: bad k, wrong key width, NaN or infinity, wrong shape.
            UnknownEpoch: the epoch is not held. EpochNotSealed: it is not ready.
            ShardLost: a shard did not answer before the deadline.
            Overloaded: too many searches wait already.
        """
        ...

    def stage(
        self,
        *,
        encoder_step: int,
        weights: Mapping[str, Tensor] | None = None,
        content_version: str | None = None,
    ) -> int:
        """Begin an epoch beside the live one and return its number at once.

        None means that the weights, or the content, follow the live epoch: see `activate`. Entries
        whose weights and content did not change keep their keys. The live epoch answers on,
        whatever becomes of this one. New weights take the place of weights that wait behind
        others' staging, which then fails as superseded: there are never two that wait.

        Raises:
            ValueError, UnknownVersion: refused. NotEnoughMemory: it would not fit; says how much.
        """
        ...

    def staging(self, epoch: int) -> StageStatus:
        """Say how far the epoch is. Does not block."""
        ...

    def wait_sealed(self, epoch: int, timeout_s: float) -> None:
        """Block until the epoch is sealed on every shard.

        Raises:
            RefreshFailed: it failed; says why. TimeoutError: not sealed in time.
        """
        ...

    def activate(self, epoch: int, *, expected_live: int | None = None) -> int:
        """Answer from this epoch when a search names none. Returns when every shard has switched.

        If what the epoch follows has changed since it was staged (other content went live during a
        refresh, or other weights during an edit), an epoch of its own part and the live other part
        is staged, sealed and activated instead, which takes as long as the difference; the one that
        was named is released.

        Args:
            expected_live: switch only if this epoch is live still, so that of two who switch at
                once one is told.

        Returns:
            The epoch that is live now.

        Raises:
            LiveEpochChanged: another epoch than `expected_live` is live; nothing was switched.
            EpochNotSealed: some shard has not sealed it. UnknownEpoch: not held.
            RefreshFailed: what had to be staged instead could not be.
        """
        ...

    def pin(self, epoch: int | None = None, *, lease_s: float = 60.0) -> EpochPin:
        """Hold an epoch, by default the live one, so that no release takes it from this reader.

        Args:
            lease_s: after that many seconds without `renew` the hold ends, as if the reader died.

        Raises:
            ValueError: a bad lease. UnknownEpoch, EpochNotSealed: no such epoch.
        """
        ...

    def release(self, epoch: int) -> None:
        """Free an epoch, or cancel its staging. Searches already running on it finish.

        One that a reader has pinned is freed when no reader holds it any more.

        Raises:
            EpochInUse: it is the live one. UnknownEpoch: not held.
        """
        ...

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """Return the live epoch's entries with these ids, in the order asked.

        Raises:
            UnknownEntry: names the ids that are not there.
        """
        ...

    def close(self) -> None:
        """Free everything this memory started. A second call does nothing."""
        ...
