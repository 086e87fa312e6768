"""Dealing rows to shards, and merging the shards' hits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_server.index.merge import best_hits, order_hits
from memory_server.shard.partition import deal_rows

segment_rows = st.lists(st.integers(0, 40), max_size=8)


@given(rows=segment_rows, shards=st.integers(1, 17))
def test_every_row_is_dealt_once_and_shards_differ_by_one_row_at_most(rows, shards):
    dealt = [
        [
            (span.segment, row)
            for span in deal_rows(rows, shards=shards, shard=shard)
            for row in range(span.start, span.stop)
        ]
        for shard in range(shards)
    ]
    everything = sorted(row for shard in dealt for row in shard)
    assert everything == [(s, row) for s, count in enumerate(rows) for row in range(count)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(rows=segment_rows, more=st.integers(0, 40), shards=st.integers(1, 9))
def test_an_appended_segment_moves_no_row(rows, more, shards):
    for shard in range(shards):
        before = deal_rows(rows, shards=shards, shard=shard)
        after = deal_rows([*rows, more], shards=shards, shard=shard)
        assert after[: len(before)] == before


@pytest.mark.parametrize(("shards", "shard"), [(0, 0), (2, 2), (2, -1)])
def test_impossible_shards_are_refused(shards, shard):
    with pytest.raises(ValueError, match="shard"):
        deal_rows([3], shards=shards, shard=shard)


@given(data=st.data(), batch=st.integers(0, 3), hits=st.integers(1, 12))
def test_merge_equals_sorting_all_hits(data, batch, hits):
    k = data.draw(st.integers(1, hits))
    ids = torch.randperm(batch * hits).view(batch, hits)
    scores = torch.tensor(
        data.draw(
            st.lists(
                st.sampled_from([-2.0, 0.0, 1.5, 2.5, 7.0]),
                min_size=ids.numel(),
                max_size=ids.numel(),
            )
        )
    ).view(batch, hits)
    pads = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=ids.numel(), max_size=ids.numel())),
        dtype=torch.bool,
    ).view(batch, hits)
    ids[pads], scores[pads] = -1, float("-inf")
    at = best_hits(scores.numpy(), ids.numpy(), k)
    merged_ids, merged_scores = ids.numpy().take(at), scores.numpy().take(at)
    same = order_hits(scores, ids)[:, :k]
    assert merged_ids.tolist() == ids.gather(1, same).tolist()
    for b in range(batch):
        pairs = [
            (-score, entry_id)
            for score, entry_id in zip(scores[b].tolist(), ids[b].tolist(), strict=True)
            if entry_id >= 0
        ]
        expected = [entry_id for _, entry_id in sorted(pairs)[:k]]
        assert merged_ids[b].tolist() == expected + [-1] * (k - len(expected))
        assert merged_scores[b].tolist() == sorted(merged_scores[b].tolist(), reverse=True)


def test_merge_refuses_what_it_cannot_do():
    scores, ids = np.zeros((1, 6), dtype=np.float32), np.arange(6).reshape(1, 6)
    for k in (0, 7):
        with pytest.raises(ValueError, match="allow 1 to 6"):
            best_hits(scores, ids, k)
    with pytest.raises(ValueError, match="B, M"):
        best_hits(scores, ids[0], 1)
