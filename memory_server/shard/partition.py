"""Which rows a shard holds: a pure function of the segments' row counts.

Every segment is dealt to all shards in contiguous runs, and the rows that do not divide evenly go
on from where the segment before stopped. So the shards are balanced to within one row; rows that
are there stay where they are when a segment is appended or rows are removed; and no shard needs to
be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows [start, stop) of the segment at position `segment` of the manifest."""

    segment: int
    start: int
    stop: int


def deal_rows(segment_rows: Sequence[int], *, shards: int, shard: int) -> list[Span]:
    """The rows of one shard, in the manifest's order, without empty spans.

    Args:
        segment_rows: rows of each segment, removed ones included: they are masked, not moved.
        shards: how many shards there are, at least 1.
        shard: 0 <= shard < shards.

    Raises:
        ValueError: a count is out of range.
    """
    if shards < 1 or not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: need shards >= 1 and 0 <= shard < shards")
    if any(rows < 0 for rows in segment_rows):
        raise ValueError(f"row counts must not be negative: {list(segment_rows)}")
    spans = []
    before = 0
    for segment, rows in enumerate(segment_rows):
        after = before + rows
        start = _below(after, shards, shard) - _below(before, shards, shard)
        stop = _below(after, shards, shard + 1) - _below(before, shards, shard + 1)
        if start < stop:
            spans.append(Span(segment=segment, start=start, stop=stop))
        before = after
    return spans


def _below(rows: int, shards: int, shard: int) -> int:
    """How many of the first `rows` rows the shards before `shard` hold together."""
    return shard * (rows // shards) + min(shard, rows % shards)
