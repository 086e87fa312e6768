"""Searches that were answered in part are counted, and their begin and end are told once."""

from __future__ import annotations

import torch

from memory_server.api import Retrieved
from trainer.lost_shards import LostShards


def reply(*missing: int) -> Retrieved:
    return Retrieved(
        ids=torch.zeros(1, 1, dtype=torch.int64),
        scores=torch.zeros(1, 1),
        tokens=torch.zeros(1, 1, 4, dtype=torch.int64),
        doc_ids=torch.zeros(1, 1, dtype=torch.int64),
        epoch=1,
        encoder_step=0,
        missing_shards=missing,
    )


def test_nothing_is_told_of_a_whole_memory() -> None:
    told: list[str] = []
    shards = LostShards(told.append)
    for _ in range(3):
        shards.note(reply())
    assert (told, shards.take()) == ([], 0)


def test_begin_change_and_end_are_told_once_and_every_search_is_counted() -> None:
    told: list[str] = []
    shards = LostShards(told.append)
    for missing in [(), (1,), (1,), (1, 2), (1, 2)]:
        shards.note(reply(*missing))
    assert [line.split(" of ")[0] for line in told] == ["shard 1", "shard 1, 2"]
    assert "searches go on without" in told[0]
    assert shards.take() == 4
    shards.note(reply(1, 2))
    assert shards.take() == 1
    shards.note(reply())
    shards.note(reply())
    assert shards.take() == 0
    assert told[2:] == ["all shards of the memory answer again, after 5 searches without"]
    shards.note(reply(0))
    assert len(told) == 4
