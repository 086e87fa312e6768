"""What a trainer's micro-batch asks the memory, at once and in the background."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_server.errors import ShardLost
from trainer.searching import MemoryLookup


class Asked:
    """Remembers what it was asked; answers when it may."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.seen: list[tuple[list[float], int, list[int] | None, int | None]] = []

    def search(
        self, queries: Tensor, k: int, *, exclude_doc_ids: Tensor | None, epoch: int | None
    ) -> Any:
        assert self.gate.wait(20)
        excluded = None if exclude_doc_ids is None else exclude_doc_ids.tolist()
        self.seen.append((queries[:, 0].tolist(), k, excluded, epoch))
        if queries[0, 0] == 99:
            raise ShardLost("shard 1")
        return queries


def lookup_of(memory: Any, pool: ThreadPoolExecutor, **options: Any) -> MemoryLookup:
    notes: list[Any] = []
    made = MemoryLookup(
        memory,
        k=3,
        epoch=7,
        exclude_doc_ids=options.get("exclude"),
        pool=pool,
        waiting=options.get("waiting", nullcontext),
        note=options.get("note", notes.append),
    )
    return made


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers).unsqueeze(1)


def test_chunks_of_every_layer_take_their_own_documents() -> None:
    memory, noted = Asked(), []
    exclude = torch.tensor([10, 11, 12, 13, 14])
    with ThreadPoolExecutor(1) as pool:
        lookup = lookup_of(memory, pool, exclude=exclude, note=noted.append)
        for _ in range(2):  # two memory layers
            waits = [lookup.start(column(0, 1, 2)), lookup.start(column(3, 4))]
            assert [wait()[:, 0].tolist() for wait in waits] == [[0, 1, 2], [3, 4]]
        lookup(column(0, 1, 2, 3, 4))
    assert memory.seen == [
        ([0, 1, 2], 3, [10, 11, 12], 7),
        ([3, 4], 3, [13, 14], 7),
    ] * 2 + [([0, 1, 2, 3, 4], 3, [10, 11, 12, 13, 14], 7)]
    assert len(noted) == 5


def test_only_waiting_counts_and_a_search_that_is_begun_does_not_wait() -> None:
    memory, waited = Asked(), []

    class Waiting:
        def __enter__(self) -> None:
            waited.append("in")

        def __exit__(self, *error: object) -> None:
            waited.append("out")

    memory.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        lookup = lookup_of(memory, pool, waiting=Waiting)
        wait = lookup.start(column(1))
        assert waited == []
        memory.gate.set()
        wait()
        assert waited == ["in", "out"]


def test_what_is_not_a_number_is_asked_as_zero_and_errors_come_out() -> None:
    memory = Asked()
    with ThreadPoolExecutor(1) as pool:
        lookup = lookup_of(memory, pool)
        lookup.start(column(float("nan"), float("inf")))()
        lookup(column(float("-inf")))
        with pytest.raises(ShardLost):
            lookup.start(column(99))()
        with pytest.raises(ShardLost):
            lookup(column(99))
    assert [seen[0] for seen in memory.seen[:2]] == [[0, 0], [0]]
