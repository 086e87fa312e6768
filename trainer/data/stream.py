"""A rank's batches, made ahead of time by one background thread.

`step_batches` is the pure part: which micro-batches a rank trains on at a cursor. `BatchStream`
runs it ahead in a thread and keeps the cursor of what it has *handed out*, so that a checkpoint
is exact whatever was prefetched.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.cursor import Cursor, rank_slice
from trainer.data.dealing import deal, within_tokens
from trainer.data.masking import MaskingSettings, mask_batch
from trainer.data.order import Order, ShuffledOrder, WholeShuffle
from trainer.data.pieces import ALWAYS_WHOLE, Phases, cut
from trainer.data.positives import Positives
from trainer.data.sequences import SequenceBatch

_LENGTH_MULTIPLE = 8
_PREFETCHED_STEPS = 2
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One micro-batch; B sequences of T tokens, S tokens per memory entry.

    Attributes:
        input_ids: int64 [B,T], masked; T is cut to the longest sequence, a multiple of 8.
        attention_mask: int64 [B,T], 1 at tokens, 0 at padding.
        labels: int64 [B,T], the true id at masked positions, else -100.
        doc_ids: int64 [B], the sequences' documents.
        positive_tokens: int64 [B,S], an entry of the same document; None when not asked for.
        positive_ids: int64 [B], that entry's id; -1 where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    doc_ids: Tensor
    positive_tokens: Tensor | None
    positive_ids: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TrainBatch:
        """Return the batch with every tensor on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)

    def rows(self, rows: slice) -> TrainBatch:
        """Return some of the sequences."""
        chosen = {
            field.name: value[rows]
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **chosen)


class Sequences(Protocol):
    """What a stream needs of a dataset; `SequenceDataset` is one."""

    def __len__(self) -> int: ...

    def gather(self, indices: NDArray[np.integer]) -> SequenceBatch: ...


class PositiveSource(Protocol):
    """What a stream needs of the memory's entries; `PositiveEntries` is one."""

    def choose(
        self,
        batch: SequenceBatch,
        *,
        seed: int,
        epochs_B: NDArray[np.integer],
        indices_B: NDArray[np.integer],
    ) -> Positives: ...


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How a step is cut; the same on every rank.

    Attributes:
        batch_size: sequences per optimizer step, of all ranks; with `batch_tokens` the most.
        micro_batch_size: sequences per forward pass of one rank; with `batch_tokens` the average
            if a step is full.
        batch_tokens: most tokens per step, padding not counted; 0: no limit.
        length_buckets: put sequences of like length into one micro-batch.
        by_file: deal a step's sequences in the order of their files, so that each rank reads few.
        phases: how long sequences are at which step.
    """

    batch_size: int
    micro_batch_size: int
    batch_tokens: int = 0
    length_buckets: bool = False
    by_file: bool = False
    phases: Phases = ALWAYS_WHOLE


def step_batches(
    dataset: Sequences,
    positives: PositiveSource | None,
    masking: MaskingSettings,
    *,
    seed: int,
    cutting: Cutting,
    rank: int,
    world_size: int,
    cursor: Cursor,
    step: int = 0,
    order: Order | None = None,
) -> tuple[list[TrainBatch], Cursor]:
    """Make one optimizer step's micro-batches of one rank.

    Args:
        step: optimizer steps before this one, which tell the phase.
        order: in which order sequences come; None: shuffled epochs of the dataset.

    Returns:
        (batch_size / world_size / micro_batch_size micro-batches, the next step's cursor).

    Raises:
        ValueError: the batch does not divide, or the cursor is not of this dataset.
    """
    order = order or ShuffledOrder(WholeShuffle(len(dataset), seed))
    size, micro = cutting.batch_size, cutting.micro_batch_size
    taken = order.take(cursor, size)
    pad = masking.vocab.pad_token_id

    def read(places: NDArray[np.int64]) -> SequenceBatch:
        indices, epochs = taken.indices[places], taken.epochs[places]
        return cut(
            dataset.gather(indices),
            cutting.phases.length(step),
            pad_token_id=pad,
            seed=seed,
            epochs_B=epochs,
            indices_B=indices,
        )

    if cutting.batch_tokens or cutting.length_buckets:
        # Every rank must know how long all of the step's sequences are.
        lengths = (read(np.arange(size)).input_ids != pad).sum(1)
        count = within_tokens(lengths, cutting.batch_tokens)
        if count < size:
            taken = order.take(cursor, count)
        dealt = deal(
            lengths[:count],
            ranks=world_size,
            passes=size // (world_size * micro),
            by_length=cutting.length_buckets,
            by_tokens=cutting.batch_tokens > 0,
        )[rank]
    else:
        places = np.argsort(taken.indices, kind="stable") if cutting.by_file else np.arange(size)
        share = rank_slice(places, rank, world_size)
        dealt = [share[start : start + micro] for start in range(0, len(share), micro)]
    places = np.concatenate(dealt)
    mine, epochs = taken.indices[places], taken.epochs[places]
    sequences = read(places)
    masked, labels = mask_batch(
        sequences.input_ids, seed=seed, epochs_B=epochs, indices_B=mine, settings=masking
    )
    present = sequences.input_ids != pad
    found = None
    if positives is not None:
        found = positives.choose(sequences, seed=seed, epochs_B=epochs, indices_B=mine)
    batches = []
    start = 0
    for part in dealt:
        rows = slice(start, start + len(part))
        start += len(part)
        length = _trimmed_length(present[rows])
        no_ids = np.full(len(part), -1, dtype=np.int64)
        batches.append(
            TrainBatch(
                input_ids=_tensor(masked[rows, :length]),
                attention_mask=_tensor(present[rows, :length]),
                labels=_tensor(labels[rows, :length]),
                doc_ids=_tensor(sequences.doc_ids[rows]),
                positive_tokens=None if found is None else _tensor(found.tokens[rows]),
                positive_ids=_tensor(no_ids if found is None else found.entry_ids[rows]),
            )
        )
    return batches, taken.cursor


def _trimmed_length(present_BT: NDArray[np.bool_]) -> int:
    """Length of the longest sequence, rounded up to a multiple of 8, at most T."""
    width = int(present_BT.shape[1])
    used = np.flatnonzero(present_BT.any(axis=0))
    longest = int(used[-1]) + 1 if used.size else 1
    return min(width, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


def _tensor(array: NDArray[Any]) -> Tensor:
    # A copy: each micro-batch owns its memory, and none keeps the whole step's arrays alive.
    return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class BatchStream(Iterator[list[TrainBatch]]):
    """Endless iterator over optimizer steps; each item is the list of this rank's micro-batches.

    `next` blocks until the step is ready and raises whatever making it raised. Close it, or use it
    as a context manager; a stream that is merely dropped ends its thread too. One thread consumes.
    """

    def __init__(
        self,
        dataset: Sequences,
        positives: PositiveSource | None,
        masking: MaskingSettings,
        *,
        seed: int,
        cutting: Cutting,
        rank: int,
        world_size: int,
        cursor: Cursor,
        step: int = 0,
        order: Order | None = None,
    ) -> None:
        """Check the sizes and start making batches.

        Args:
            dataset: the sequences.
            positives: where to take a positive entry for each sequence, or None.
            masking: how to mask.
            seed: of shuffle, masks and positives.
            cutting: how steps are cut.
            rank: this trainer, in [0, world_size).
            world_size: number of trainers.
            cursor: where to begin.
            step: optimizer steps before the first one.
            order: in which order sequences come; None: shuffled epochs of the dataset.

        Raises:
            ValueError: batch_size is not a multiple of micro_batch_size * world_size, or the rank
                or the cursor is out of range.
        """
        batch_size, micro_batch_size = cutting.batch_size, cutting.micro_batch_size
        if min(batch_size, micro_batch_size, world_size) < 1 or batch_size % (
            micro_batch_size * world_size
        ):
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of micro_batch_size x trainers "
                f"= {micro_batch_size} x {world_size}"
            )
        order = order or ShuffledOrder(WholeShuffle(len(dataset), seed))
        order.take(cursor, 1)
        rank_slice(np.empty(batch_size, dtype=np.int64), rank, world_size)

        def make(at: Cursor, after: int) -> tuple[list[TrainBatch], Cursor]:
            return step_batches(
                dataset,
                positives,
                masking,
                seed=seed,
                cutting=cutting,
                rank=rank,
                world_size=world_size,
                cursor=at,
                step=after,
                order=order,
            )

        self._cursor = cursor
        self._stop = threading.Event()
        self._ready: _Queue = queue.Queue(maxsize=_PREFETCHED_STEPS)
        # The thread knows the queue and the event but not the stream, so that a dropped stream is
        # collected and its thread told to stop.
        self._thread = threading.Thread(
            target=_produce,
            args=(make, cursor, step, self._ready, self._stop),
            name=f"batches-rank-{rank}",
            daemon=True,
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    @property
    def cursor(self) -> Cursor:
        """The cursor behind the steps handed out so far; what was only prefetched is not."""
        return self._cursor

    def __next__(self) -> list[TrainBatch]:
        while not self._stop.is_set():
            try:
                item = self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, _Failure):
                self.close()
                raise item.error
            batches, self._cursor = item
            return batches
        raise RuntimeError("the batch stream is closed; open a new one at its cursor")

    def close(self) -> None:
        """Stop the thread and wait for it; the cursor stays readable. Again: does nothing."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_Item = tuple[list[TrainBatch], Cursor] | _Failure
_Queue = queue.Queue[_Item]


def _produce(
    make: Callable[[Cursor, int], tuple[list[TrainBatch], Cursor]],
    cursor: Cursor,
    step: int,
    ready: _Queue,
    stop: threading.Event,
) -> None:
    item: _Item
    while not stop.is_set():
        try:
            item = make(cursor, step)
            cursor, step = item[1], step + 1
        except BaseException as error:  # handed to the consumer, who raises it
            item = _Failure(error)
        while not stop.is_set():
            try:
                ready.put(item, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        if isinstance(item, _Failure):
            return
