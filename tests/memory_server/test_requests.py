"""What is asked of a memory or of a store, and cannot be: refused by type, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_server.local import LocalMemory
from memory_server.requests import checked_ids, checked_request
from memory_server.store.store import Store
from tests.toy_memory import (
    empty_store,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
    write_toy_segment,
)

QUERIES = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("queries", "excluded", "said"),
    [
        (np.zeros((2, 4), dtype=np.float32), None, "queries must be a torch tensor, not ndarray"),
        ([[0.0] * 4] * 2, None, "queries must be a torch tensor, not list"),
        (None, None, "queries must be a torch tensor, not NoneType"),
        (QUERIES, [1, 2], "exclude_doc_ids must be a torch tensor, not list"),
        (QUERIES, np.array([1, 2]), "exclude_doc_ids must be a torch tensor, not ndarray"),
        (QUERIES, 3, "exclude_doc_ids must be a torch tensor, not int"),
    ],
)
def test_only_tensors_are_searched_with(queries: Any, excluded: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        checked_request(queries, 3, excluded, 4)


@pytest.mark.parametrize(
    ("ids", "kind"),
    [([2**70], ValueError), ([-(2**70)], ValueError), ([1.0], TypeError), (["1"], TypeError)],
)
def test_ids_are_whole_numbers_of_int64(ids: list[Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="id"):
        checked_ids(ids)
    assert checked_ids([3, np.int64(2), torch.tensor(2**63 - 1)]) == [3, 2, 2**63 - 1]


def test_a_memory_refuses_them(tmp_path: Path) -> None:
    path = toy_store(tmp_path / "s", toy_entries([1, 2])).path
    with LocalMemory(path, encoder=toy_factory, weights=toy_weights(0)) as memory:
        with pytest.raises(TypeError, match="torch tensor"):
            memory.search(toy_queries(2).numpy(), 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="beyond int64"):
            memory.entries([2**70])
        with pytest.raises(TypeError, match="integers"):
            memory.entries([1.0])  # type: ignore[list-item]
        assert [entry.id for entry in memory.entries([2, 1])] == [2, 1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return empty_store(tmp_path / "s")


@pytest.mark.parametrize(
    ("wish", "kind", "said"),
    [
        ({"message": 3}, TypeError, "a commit's message is a text, not 3"),
        ({"message": " "}, ValueError, "not empty"),
        ({"message": "caf\udcff"}, ValueError, "no valid UTF-8"),
        ({"message": "m", "remove_ids": [2**70]}, ValueError, "must fit in int64"),
        ({"message": "m", "remove_doc_ids": [0.5]}, ValueError, "row of integers"),
    ],
)
def test_a_commit_that_cannot_be(
    store: Store, wish: dict[str, Any], kind: type[Exception], said: str
) -> None:
    segment = write_toy_segment(store, "a", toy_entries([1]))
    head = store.head()
    with pytest.raises(kind, match=said):
        store.commit(add_segments=[segment], **wish)
    assert store.head() == head


@pytest.mark.parametrize("largest", [2**63 - 1, 2**63 - 2**37 + 1])
def test_no_entry_uses_up_the_numbers(store: Store, largest: int) -> None:
    with pytest.raises(ValueError, match="numbers for later ones"):
        write_toy_segment(store, "a", toy_entries([largest]))


def test_nor_does_a_segment_that_another_program_wrote(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as unbounded:
        unbounded.setattr("memory_server.store.segments.LARGEST_ID", 2**63 - 1)
        segment = write_toy_segment(store, "a", toy_entries([2**63 - 1]))
    with pytest.raises(ValueError, match="numbers for later ones"):
        store.commit(add_segments=[segment], message="m")


def test_age_that_is_no_number(store: Store) -> None:
    with pytest.raises(ValueError, match="min_age_s=nan"):
        store.gc(min_age_s=float("nan"))
