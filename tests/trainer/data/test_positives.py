"""Positive entries are live, of the right document, and cover the sequence when any does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from memory_server.errors import UnknownVersion
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from trainer.data.positives import PositiveEntries, Positives
from trainer.data.sequences import SequenceBatch

S, PAD = 4, 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(
        tmp_path, tokenizer_fingerprint="t", entry_tokens=S, vocab_size=70_000, pad_token_id=PAD
    )


def tokens_of(entry_id: int) -> list[int]:
    return [2, entry_id + 10, PAD, PAD]


def commit(store: Store, entries: list[tuple[int, int]], remove: list[int] | None = None) -> str:
    """Commit one segment of (id, document) entries and removals."""
    paths = []
    if entries:
        path = store.incoming / f"{entries[0][0]}.arrow"
        write_segment(
            path,
            ids=[entry for entry, _ in entries],
            doc_ids=[doc for _, doc in entries],
            tokens_NS=[tokens_of(entry) for entry, _ in entries],
            texts=[""] * len(entries),
            titles=[""] * len(entries),
            sources=[""] * len(entries),
            meta=store.meta,
        )
        paths.append(path)
    return store.commit(add_segments=paths, remove_ids=remove or [], message="test")


def choose(
    positives: PositiveEntries, docs: list[int], first: list[int], num: list[int], *, epoch: int = 0
) -> Positives:
    size = len(docs)
    batch = SequenceBatch(
        input_ids=np.zeros((size, 2), dtype=np.int64),
        doc_ids=np.array(docs, dtype=np.int64),
        first_entry=np.array(first, dtype=np.int32),
        num_entries=np.array(num, dtype=np.int32),
    )
    chosen = positives.choose(
        batch, seed=5, epochs_B=np.full(size, epoch), indices_B=np.arange(size)
    )
    for entry, tokens in zip(chosen.entry_ids.tolist(), chosen.tokens.tolist(), strict=True):
        assert tokens == ([PAD] * S if entry < 0 else tokens_of(entry))
    assert chosen.tokens.dtype == chosen.entry_ids.dtype == np.int64
    return chosen


def often(positives: PositiveEntries, doc: int, first: int, num: int, times: int = 3000) -> Counter:
    chosen = choose(positives, [doc] * times, [first] * times, [num] * times)
    return Counter(chosen.entry_ids.tolist())


def test_covering_entries_are_chosen_uniformly(store: Store) -> None:
    commit(store, [(i, 0) for i in range(3)] + [(i, 7) for i in range(3, 9)] + [(9, 8)])
    positives = PositiveEntries(store)
    counts = often(positives, 7, 1, 4)
    assert set(counts) == {4, 5, 6, 7}
    assert max(abs(n - 750) for n in counts.values()) < 120
    assert set(often(positives, 7, 5, 3, times=50)) == {8}
    assert set(often(positives, 0, 0, 3)) == {0, 1, 2}


def test_without_ordinals_any_entry_of_the_document_will_do(store: Store) -> None:
    commit(store, [(0, 1), (1, 2), (2, 2), (3, 2), (4, 3)])
    positives = PositiveEntries(store)
    for first, num in [(-1, 0), (-1, 2), (0, 0), (9, 1)]:
        assert set(often(positives, 2, first, num, times=100)) == {1, 2, 3}


def test_a_document_without_entries_gets_none(store: Store) -> None:
    commit(store, [(0, 10), (1, 30)])
    chosen = choose(PositiveEntries(store), [5, 20, 40, 30], [0] * 4, [1] * 4)
    np.testing.assert_array_equal(chosen.entry_ids, [-1, -1, -1, 1])


def test_removed_entries_are_never_chosen(store: Store) -> None:
    commit(store, [(i, i // 5) for i in range(15)])
    before = store.head()
    commit(store, [], remove=[5, 7, 8, 10, 11, 12, 13, 14])
    positives = PositiveEntries(store)
    assert set(often(positives, 1, 0, 5)) == {6, 9}
    assert set(often(positives, 1, 1, 2, times=50)) == {6}
    # None that covers is left: any other of the document. None at all is left: -1.
    assert set(often(positives, 1, 2, 2, times=100)) == {6, 9}
    assert set(often(positives, 2, 0, 2, times=50)) == {-1}
    assert set(often(PositiveEntries(store, before), 1, 2, 2, times=100)) == {7, 8}


def test_a_document_may_lie_in_several_segments(store: Store) -> None:
    commit(store, [(0, 1), (1, 2), (2, 2)])
    commit(store, [(3, 2), (4, 2), (5, 3)])
    positives = PositiveEntries(store)
    assert set(often(positives, 2, 1, 2, times=100)) == {2, 3}
    assert set(often(positives, 2, 3, 1, times=50)) == {4}
    assert set(often(positives, 2, -1, 0, times=200)) == {1, 2, 3, 4}


def test_an_edited_entry_is_replaced_by_its_new_text(store: Store) -> None:
    commit(store, [(0, 1), (1, 1), (2, 2)])
    commit(store, [(77, 1)], remove=[0, 1])
    assert set(often(PositiveEntries(store), 1, 0, 1, times=50)) == {77}


def test_nothing_in_the_memory_gives_none(store: Store) -> None:
    chosen = choose(PositiveEntries(store), [1, 2], [0, 0], [1, 1])
    np.testing.assert_array_equal(chosen.entry_ids, [-1, -1])


def test_the_choice_depends_on_seed_epoch_and_sequence_only(store: Store) -> None:
    commit(store, [(i, 0) for i in range(50)])
    positives = PositiveEntries(store)
    whole = choose(positives, [0] * 40, [0] * 40, [50] * 40).entry_ids
    again = choose(positives, [0] * 20, [0] * 20, [50] * 20).entry_ids
    np.testing.assert_array_equal(again, whole[:20])
    assert (choose(positives, [0] * 40, [0] * 40, [50] * 40, epoch=1).entry_ids != whole).any()


def test_an_unknown_version_is_refused(store: Store) -> None:
    with pytest.raises(UnknownVersion):
        PositiveEntries(store, "nosuch")


@pytest.mark.parametrize("seed", range(12))
def test_random_memories_agree_with_a_plain_list(store: Store, seed: int) -> None:
    """Segments in and out of document order, removals, and ordinals beyond the document's end."""
    draw = np.random.default_rng(seed)
    rows: dict[int, list[int]] = {}
    live: set[int] = set()
    next_id = 0
    for _ in range(4):
        docs = draw.integers(0, 8, draw.integers(1, 25))
        docs = np.sort(docs) if draw.random() < 0.5 else docs
        entries = [(next_id + i, int(doc)) for i, doc in enumerate(docs)]
        next_id += len(entries)
        gone = [i for i in live if draw.random() < 0.3]
        # A segment that loses its last row leaves the version, and its ordinals with it.
        gone = gone[: max(0, len(live) - 1)]
        commit(store, entries, remove=gone)
        live = (live - set(gone)) | {entry for entry, _ in entries}
    for ref in store.manifest().segments:
        segment = store.segment(ref)
        for entry, doc in zip(segment.ids.tolist(), segment.doc_ids.tolist(), strict=True):
            rows.setdefault(doc, []).append(entry)
    docs_b = draw.integers(0, 9, 300).tolist()
    first, num = draw.integers(-1, 12, 300).tolist(), draw.integers(0, 5, 300).tolist()
    chosen = choose(PositiveEntries(store), docs_b, first, num).entry_ids.tolist()
    for doc, begin, count, entry in zip(docs_b, first, num, chosen, strict=True):
        of_doc = [i for i in rows.get(doc, []) if i in live]
        covering = rows.get(doc, [])[begin : begin + count] if begin >= 0 else []
        allowed = [i for i in covering if i in live] or of_doc or [-1]
        assert entry in allowed
