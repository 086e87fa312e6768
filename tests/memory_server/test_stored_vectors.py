"""Vectors that are made once: kept bit for bit, found by id, and a memory that searches them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memory_server.errors import (
    DuplicateEntry,
    RefreshFailed,
    StoreDamaged,
    StoreError,
    StoreNotFound,
    UnknownEntry,
)
from memory_server.keys.stored_vectors import StoredVectors, token_marks
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from tests.toy_memory import (
    KEY_WIDTH,
    ToyEntry,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
    write_toy_segment,
)

ENTRIES = toy_entries([3, 5, 6, 10, 11, 12])
IDS = np.array([e.id for e in ENTRIES])
TOKENS = np.array([e.tokens for e in ENTRIES])


def random_array(*shape: int, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def written(path: Path, entries: list[ToyEntry] = ENTRIES) -> StoredVectors:
    """Keys as the toy encoder makes them, so that both memories must answer alike."""
    tokens = np.array([e.tokens for e in entries])
    keys = toy_factory(toy_weights(1))(torch.from_numpy(tokens)).numpy().astype(np.float16)  # type: ignore[operator]
    values = random_array(len(entries), 2, 4)
    return StoredVectors.write(path, [e.id for e in entries], keys, values, tokens_NS=tokens)


def memory_of(tmp_path: Path, entries: list[ToyEntry] = ENTRIES) -> tuple[Store, LocalMemory]:
    store = toy_store(tmp_path / "store", entries)
    written(tmp_path / "vectors")
    return store, LocalMemory(store, vectors=tmp_path / "vectors")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    keys, values = random_array(6, 8, dtype=dtype), random_array(6, 3, 4, dtype=dtype, seed=1)
    keys[0, 0] = np.finfo(dtype).smallest_subnormal
    StoredVectors.write(tmp_path / "v", IDS, keys, values)
    opened = StoredVectors.open(tmp_path / "v")
    assert opened.values_NJH is not None
    for given, kept in ((keys, opened.keys_NQ), (values, opened.values_NJH)):
        assert kept.dtype == given.dtype
        assert kept.shape == given.shape
        assert kept.tobytes() == given.tobytes()
    opened.verify()
    assert opened.key_width == 8


def test_a_mapped_array_is_written_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", random_array(50, 8))
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    stored = StoredVectors.write(tmp_path / "v", range(50), mapped)
    assert np.array_equal(stored.keys_NQ, mapped)
    assert stored.values(torch.tensor([1])) is None


def test_vectors_are_found_by_id_in_any_order_and_pads_are_zeros(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(1).permutation(len(IDS))
    keys, values = random_array(6, 8), random_array(6, 2, 4, seed=1)
    stored = StoredVectors.write(tmp_path / "v", IDS[shuffled], keys[shuffled], values[shuffled])
    asked = torch.tensor([[12, -1], [3, 10]])
    given = stored.keys(asked)
    assert given.dtype == torch.float32
    assert np.array_equal(given[0, 0], keys[5].astype(np.float32))
    assert not given[0, 1].any()
    read = stored.values(asked)
    assert read is not None
    assert read.shape == (2, 2, 2, 4)
    assert np.array_equal(read[1, 1], values[3].astype(np.float32))
    with pytest.raises(UnknownEntry, match="such as entry 4"):
        stored.keys(torch.tensor([3, 4]))


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    good = random_array(6, 8)
    bad = good.copy()
    bad[4, 1] = np.nan
    for keys, named in (
        (good.astype(np.float64), "keys_NQ is float64"),
        (good[:5], "the first of 6 rows"),
        (bad, "NaN or infinity in row 4"),
        (np.asfortranarray(good), "C order"),
    ):
        with pytest.raises(ValueError, match=named):
            StoredVectors.write(tmp_path / "v", IDS, keys)
    with pytest.raises(ValueError, match="values_NJH has shape"):
        StoredVectors.write(tmp_path / "v", IDS, good, good)
    with pytest.raises(DuplicateEntry, match=": 3;"):
        StoredVectors.write(tmp_path / "v", [3, *IDS[:5]], good)
    assert not (tmp_path / "v").exists()
    StoredVectors.write(tmp_path / "v", IDS, good)
    with pytest.raises(StoreError, match="holds vectors already"):
        StoredVectors.write(tmp_path / "v", IDS, good)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="no stored vectors"):
        StoredVectors.open(tmp_path / "v")
    StoredVectors.write(tmp_path / "v", IDS, random_array(6, 8))
    file = tmp_path / "v" / "vectors.arrow"
    whole = file.read_bytes()
    at = whole.index(np.ascontiguousarray(IDS).tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(StoreDamaged, match="was altered"):
        StoredVectors.open(tmp_path / "v").verify()
    file.write_bytes(whole[:-10])
    with pytest.raises(StoreDamaged, match=r"vectors\.arrow"):
        StoredVectors.open(tmp_path / "v")


def test_a_mark_changes_with_every_token_and_place() -> None:
    rows = np.array([[1, 2, 0], [2, 1, 0], [1, 2, 1], [0, 1, 2], [2, 2, 0], [0, 0, 0]])
    marks = token_marks(rows)
    assert len(set(marks.tolist())) == len(rows)
    assert np.array_equal(token_marks(rows.astype(np.uint16)), marks)


def test_a_memory_of_stored_keys_answers_as_one_that_encodes(tmp_path: Path) -> None:
    store, stored = memory_of(tmp_path)
    encoding = LocalMemory(store, encoder=toy_factory, weights=toy_weights(1))
    queries_BQ = toy_queries(7)
    with stored, encoding:
        given, wanted = stored.search(queries_BQ, 4), encoding.search(queries_BQ, 4)
        assert torch.equal(given.ids, wanted.ids)
        assert torch.equal(given.scores, wanted.scores)
        assert torch.equal(given.tokens, wanted.tokens)
        assert wanted.keys is None
        assert wanted.values is None
        assert given.keys is not None
        assert given.values is not None
        # The keys are those of the hits: their products with the queries are the scores.
        products_BK = (given.keys @ queries_BQ.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(products_BK, given.scores)
        assert given.values.shape == (7, 4, 2, 4)
        assert stored.info().key_width == KEY_WIDTH
        assert stored.info().entries == len(ENTRIES)
        padded = stored.search(queries_BQ, 8)
        assert padded.keys is not None
        assert not padded.keys[:, 6:].any()


def test_content_is_staged_as_far_as_its_entries_have_vectors(tmp_path: Path) -> None:
    store, memory = memory_of(tmp_path)
    with memory:
        smaller = store.commit(remove_ids=[5], message="one less")
        epoch = memory.stage(encoder_step=0, content_version=smaller)
        memory.wait_sealed(epoch, 60)
        memory.activate(epoch)
        assert 5 not in memory.search(toy_queries(3), 6).ids
        new = store.commit(
            add_segments=[write_toy_segment(store, "new", toy_entries([40]))], message="one more"
        )
        refused = memory.stage(encoder_step=0, content_version=new)
        with pytest.raises(RefreshFailed, match=r"no vectors in .*, such as entry 40"):
            memory.wait_sealed(refused, 60)
        assert memory.search(toy_queries(3), 2).epoch == epoch
        memory.release(refused)


def test_another_text_under_the_same_id_is_noticed(tmp_path: Path) -> None:
    store, memory = memory_of(tmp_path)
    with memory:
        edited = store.commit(
            remove_ids=[10],
            add_segments=[write_toy_segment(store, "edit", toy_entries([10], seed=9))],
            message="edited",
        )
        epoch = memory.stage(encoder_step=0, content_version=edited)
        with pytest.raises(RefreshFailed, match="other tokens than 1 of the entries have, such as"):
            memory.wait_sealed(epoch, 60)


def test_keys_are_made_in_one_way_only(tmp_path: Path) -> None:
    store, memory = memory_of(tmp_path)
    with memory, pytest.raises(ValueError, match="weights cannot change them"):
        memory.stage(encoder_step=1, weights=toy_weights(2))
    for options in (
        {},
        {"weights": toy_weights(1)},
        {"encoder": toy_factory, "weights": toy_weights(1), "vectors": tmp_path / "vectors"},
        {"encoder": toy_factory, "vectors": tmp_path / "vectors"},
    ):
        with pytest.raises(ValueError, match="give what makes the keys"):
            LocalMemory(store, **options)  # type: ignore[arg-type]
