"""The prefetching stream hands out what the pure step does, resumes exactly and ends cleanly."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from trainer.data.cursor import Cursor
from trainer.data.masking import MaskingSettings
from trainer.data.pieces import Phases
from trainer.data.positives import PositiveEntries
from trainer.data.sequences import SequenceBatch, SequenceDataset
from trainer.data.stream import BatchStream, Cutting, TrainBatch, step_batches

N, T = 22, 24
FIELDS = ("input_ids", "attention_mask", "labels", "doc_ids", "positive_tokens", "positive_ids")


@pytest.fixture
def dataset(
    tmp_path: Path, part_writer: Callable[..., None], sequence_maker: Callable[..., np.ndarray]
) -> SequenceDataset:
    lengths = np.random.default_rng(0).integers(3, 19, N)
    part_writer(tmp_path / "sequences/part-00000.arrow", sequence_maker(lengths, T, 50, 1))
    return SequenceDataset(tmp_path / "sequences")


@pytest.fixture
def positives(tmp_path: Path) -> PositiveEntries:
    store = Store.create(
        tmp_path / "memory",
        tokenizer_fingerprint="t",
        entry_tokens=4,
        vocab_size=50,
        pad_token_id=0,
    )
    docs = np.repeat(np.arange(N - 2), 3)  # the last two documents have no entry
    path = store.incoming / "a.arrow"
    write_segment(
        path,
        ids=1000 + np.arange(len(docs)),
        doc_ids=docs,
        tokens_NS=np.stack([np.full(len(docs), 2), 5 + docs, 5 + docs, docs * 0], axis=1),
        texts=[""] * len(docs),
        titles=[""] * len(docs),
        sources=[""] * len(docs),
        meta=store.meta,
    )
    store.commit(add_segments=[path], message="entries")
    return PositiveEntries(store)


@pytest.fixture
def arguments(vocab_maker: Callable[..., Any]) -> dict[str, Any]:
    return {
        "masking": MaskingSettings(vocab=vocab_maker()),
        "seed": 9,
        "cutting": Cutting(batch_size=8, micro_batch_size=2),
        "rank": 0,
        "world_size": 1,
        "cursor": Cursor(),
    }


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and stream_threads():
        time.sleep(0.01)
    assert not stream_threads()


def stream_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("batches-rank-")]


def take(stream: BatchStream, steps: int) -> list[TrainBatch]:
    return [batch for step in itertools.islice(stream, steps) for batch in step]


def assert_equal(one: list[TrainBatch], other: list[TrainBatch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for name in FIELDS:
            a, b = getattr(left, name), getattr(right, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), name


def test_the_stream_equals_the_pure_steps(
    dataset: SequenceDataset, positives: PositiveEntries, arguments: dict[str, Any]
) -> None:
    wanted: list[TrainBatch] = []
    cursor = Cursor()
    for _ in range(6):
        batches, cursor = step_batches(dataset, positives, **{**arguments, "cursor": cursor})
        wanted += batches
    with BatchStream(dataset, positives, **arguments) as stream:
        assert_equal(take(stream, 6), wanted)
        assert stream.cursor == cursor == Cursor(*divmod(48, N))


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_a_stream_resumed_at_its_cursor_continues_exactly(
    dataset: SequenceDataset,
    positives: PositiveEntries,
    arguments: dict[str, Any],
    steps_before: int,
) -> None:
    with BatchStream(dataset, positives, **arguments) as stream:
        whole = take(stream, steps_before + 4)
    with BatchStream(dataset, positives, **arguments) as stream:
        take(stream, steps_before)
        time.sleep(0.05)  # lets the thread run ahead, which the cursor must not show
        saved = stream.cursor
    with BatchStream(dataset, positives, **{**arguments, "cursor": saved}) as resumed:
        assert_equal(take(resumed, 4), whole[steps_before * 4 :])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_sees(
    dataset: SequenceDataset,
    positives: PositiveEntries,
    arguments: dict[str, Any],
    world_size: int,
) -> None:
    with BatchStream(dataset, positives, **arguments) as stream:
        single = take(stream, 5)
    cursor = Cursor()
    together: list[TrainBatch] = []
    for _ in range(5):
        following = set()
        for rank in range(world_size):
            change = {"rank": rank, "world_size": world_size, "cursor": cursor}
            with BatchStream(dataset, positives, **{**arguments, **change}) as stream:
                together += take(stream, 1)
                following.add(stream.cursor)
        (cursor,) = following
    assert_equal(together, single)


def test_a_batch_is_what_it_says(
    dataset: SequenceDataset, positives: PositiveEntries, arguments: dict[str, Any]
) -> None:
    seen: list[int] = []
    with BatchStream(
        dataset, positives, **{**arguments, "cutting": Cutting(batch_size=N, micro_batch_size=2)}
    ) as stream:
        (step,) = itertools.islice(stream, 1)
    for batch in step:
        rows, length = batch.input_ids.shape
        assert rows == 2
        original = torch.where(batch.labels >= 0, batch.labels, batch.input_ids)
        documents = batch.doc_ids.numpy()
        wanted = torch.from_numpy(dataset.gather(documents).input_ids)
        assert torch.equal(original, wanted[:, :length])
        assert not wanted[:, length:].any()
        longest = int((wanted != 0).sum(dim=1).max())
        assert longest <= length < longest + 8
        assert length % 8 == 0
        assert torch.equal(batch.attention_mask, (original != 0).long())
        assert ((batch.labels >= 0).sum(dim=1) >= 1).all()
        assert batch.positive_tokens is not None
        for doc, entry, tokens in zip(
            documents.tolist(),
            batch.positive_ids.tolist(),
            batch.positive_tokens.tolist(),
            strict=True,
        ):
            if doc < N - 2:
                assert (entry - 1000) // 3 == doc
                assert tokens == [2, 5 + doc, 5 + doc, 0]
            else:
                assert (entry, tokens) == (-1, [0, 0, 0, 0])
        assert {getattr(batch, name).dtype for name in FIELDS} == {torch.int64}
        seen += documents.tolist()
    assert sorted(seen) == list(range(N))


def test_without_positives_there_are_none(
    dataset: SequenceDataset, arguments: dict[str, Any]
) -> None:
    with BatchStream(dataset, None, **arguments) as stream:
        batch = next(stream)[0]
    assert batch.positive_tokens is None
    assert batch.positive_ids.tolist() == [-1, -1]
    assert batch.to("meta").input_ids.device.type == "meta"
    assert batch.to("meta").positive_tokens is None


class FailingDataset:
    """Reads well until it is asked for the second time."""

    def __init__(self, dataset: SequenceDataset) -> None:
        self.dataset = dataset
        self.reads = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def gather(self, indices: np.ndarray) -> SequenceBatch:
        self.reads += 1
        if self.reads > 1:
            raise OSError("the disk went away")
        return self.dataset.gather(indices)


def test_an_error_reaches_the_consumer_after_the_good_steps(
    dataset: SequenceDataset, arguments: dict[str, Any]
) -> None:
    stream = BatchStream(FailingDataset(dataset), None, **arguments)
    assert len(next(stream)) == 4
    with pytest.raises(OSError, match="the disk went away"):
        next(stream)
    assert stream.cursor == Cursor(0, 8)
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_closing_twice_and_early_is_fine(
    dataset: SequenceDataset, arguments: dict[str, Any]
) -> None:
    stream = BatchStream(dataset, None, **arguments)
    stream.close()
    stream.close()
    assert not stream_threads()
    assert stream.cursor == Cursor()
    with pytest.raises(RuntimeError, match="open a new one"):
        next(stream)


def test_a_dropped_stream_ends_its_thread(
    dataset: SequenceDataset, arguments: dict[str, Any]
) -> None:
    stream = BatchStream(dataset, None, **arguments)
    next(stream)
    assert stream_threads()
    del stream  # the fixture checks that the thread goes


def test_prefetch_is_bounded(dataset: SequenceDataset, arguments: dict[str, Any]) -> None:
    class Counting(FailingDataset):
        def gather(self, indices: np.ndarray) -> SequenceBatch:
            self.reads += 1
            return self.dataset.gather(indices)

    counting = Counting(dataset)
    with BatchStream(counting, None, **arguments) as stream:
        next(stream)
        time.sleep(0.3)
        # One handed out, two in the queue, one waiting for a place in it.
        assert counting.reads <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutting": Cutting(batch_size=9, micro_batch_size=2)}, "batch_size=9 must be a multiple"),
        ({"world_size": 8}, r"micro_batch_size x trainers = 2 x 8"),
        ({"cutting": Cutting(batch_size=8, micro_batch_size=0)}, "must be a multiple"),
        ({"rank": 1}, "rank must be"),
        ({"cursor": Cursor(0, N)}, "belongs to another corpus"),
    ],
)
def test_impossible_arguments_are_refused_at_once(
    dataset: SequenceDataset, arguments: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchStream(dataset, None, **{**arguments, **change})


@pytest.mark.parametrize(
    "change",
    [{"length_buckets": True}, {"batch_tokens": 76}, {"batch_tokens": 76, "length_buckets": True}],
    ids=str,
)
def test_what_a_step_holds_does_not_depend_on_the_ranks(
    dataset: SequenceDataset, arguments: dict[str, Any], change: dict[str, Any]
) -> None:
    cutting = Cutting(batch_size=8, micro_batch_size=2, phases=Phases((0, 8), (4,)), **change)
    positions = []
    for ranks, micro in ((1, 2), (2, 2), (2, 4), (4, 2)):
        now = {**arguments, "cutting": replace(cutting, micro_batch_size=micro)}
        cursor, docs, cursors = Cursor(), [], []
        for step in range(8):
            steps = [
                step_batches(
                    dataset,
                    None,
                    **{**now, "cursor": cursor, "rank": r, "world_size": ranks, "step": step},
                )
                for r in range(ranks)
            ]
            (cursor,) = {following for _, following in steps}
            parts = [batch for batches, _ in steps for batch in batches]
            assert len(parts) == 8 // micro
            tokens = sum(int(batch.attention_mask.sum()) for batch in parts)
            assert tokens <= cutting.batch_tokens or not cutting.batch_tokens
            assert step < 4 or max(batch.input_ids.shape[1] for batch in parts) <= 8
            docs.append(sorted(int(doc) for batch in parts for doc in batch.doc_ids))
            cursors.append(cursor)
        positions.append((docs, cursors))
    assert all(other == positions[0] for other in positions[1:])
    in_one_row = [doc for step in positions[0][0] for doc in step]
    assert sorted(in_one_row[:N]) != in_one_row[:N]
    whole = positions[0][1][-1]
    assert len(in_one_row) == whole.epoch * N + whole.position  # each once per epoch


def test_a_resumed_stream_is_in_the_phase_of_its_step(
    dataset: SequenceDataset, arguments: dict[str, Any]
) -> None:
    cutting = Cutting(batch_size=8, micro_batch_size=8, phases=Phases((8, 0), (3,)))
    given = {**arguments, "cutting": cutting}
    with BatchStream(dataset, None, **given) as stream:
        whole = take(stream, 5)
    assert [batch.input_ids.shape[1] > 8 for batch in whole] == [False] * 3 + [True] * 2
    with BatchStream(dataset, None, **given) as stream:
        take(stream, 2)
        saved = stream.cursor
    with BatchStream(dataset, None, **{**given, "cursor": saved, "step": 2}) as resumed:
        assert_equal(take(resumed, 3), whole[2:])
