"""What a run's counted reads tell for `usage.json`: how often entries were read, and which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_server.api import Entry, Memory
from memory_server.errors import UnknownEntry
from trainer.checkpoint import latest_checkpoint, read_state
from trainer.reads.figures import (
    Floats,
    Weighted,
    distribution,
    share_of_most_read,
    times_read,
    weighted,
)
from trainer.reads.files import Counted, read_counted
from trainer.reads.present import gone
from trainer.reads.sample import Int64s, hashed

_MOST_READ = 10
_LOOKED_UP = 4096
_AT_ONCE = 512
_TEXT_CUT = 200

DomainsOf = Callable[[Sequence[int]], Mapping[int, str]]


def counted_in(run_dir: Path) -> tuple[int, Counted] | None:
    """The reads that the newest checkpoint of a run counts, and its step; None: there are none.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint = latest_checkpoint(run_dir)
    counted = None if checkpoint is None else read_counted(checkpoint)
    if checkpoint is None or counted is None:
        return None
    return read_state(checkpoint).step, counted


def training_usage(
    step: int, counted: Counted, memory: Memory, *, domains_of: DomainsOf | None = None
) -> dict[str, Any]:
    """How training used a memory, all layers together.

    Args:
        step: until which reads were counted. counted: what a checkpoint keeps.
        memory: what is in it now is told about.
        domains_of: the domains of entries by id; None: they are not told.

    Returns:
        `from_step` and `to_step`; `reads`; `entries` of the memory; `used`, how many of them were
        ever read, `never_used_share`, and `estimated`, whether these are from a sample;
        `reading_of_most_used_hundredth`; of the whole run `read_evenness`, `attended_evenness`,
        `top_read_share` and `top_attended_share`; `times_read`; `most_used`; shares of the reading
        `by_source` and `by_domain`, and of the attention `attended_by_source` and
        `attended_by_domain`, of what is in the memory: by all entries that were read, or by an even
        sample of 4,096.

    Raises:
        MemoryServerError: the memory does not answer.
    """
    total = counted.total
    entries = memory.info().entries
    used = min(max(total.distinct - gone(memory, total), 0), entries)
    known = weighted(total)
    looked_up, stands_for = _looked_up(known)
    ids = known.ids[looked_up]
    there = _there(memory, ids.tolist())
    domains = domains_of(list(there)) if domains_of is not None else {}
    most_read = zip(known.ids[:_AT_ONCE].tolist(), known.times[:_AT_ONCE].tolist(), strict=True)
    shown = [(i, times) for i, times in most_read if i in there][:_MOST_READ]
    figures: dict[str, Any] = {
        "from_step": counted.since_step,
        "to_step": step,
        "reads": total.all_times,
        "entries": entries,
        "used": used,
        "never_used_share": 1 - used / max(entries, 1),
        "estimated": total.level > 0,
        "reading_of_most_used_hundredth": share_of_most_read(total, max(1, round(entries / 100))),
        **distribution(total, entries),
        "times_read": times_read(total),
        "most_used": [
            {**_told(there[i]), "times": times, "domain": domains.get(i, "")} for i, times in shown
        ],
    }
    for name, of in (
        ("by_source", {i: entry.source for i, entry in there.items()}),
        ("by_domain", domains),
    ):
        figures[name] = _shares(ids, stands_for * known.times[looked_up], of)
        figures[f"attended_{name}"] = _shares(ids, stands_for * known.attended[looked_up], of)
    return figures


def _looked_up(known: Weighted) -> tuple[Int64s, Floats]:
    """Places in `known` of the most read entries and of an even sample of the others, and how many
    entries each of these stands for."""
    places = np.arange(len(known.ids))
    first, rest = places[:_AT_ONCE], places[_AT_ONCE:]
    drawn = rest[np.argsort(hashed(known.ids[rest]))[: _LOOKED_UP - _AT_ONCE]]
    stands_for = known.weight.copy()
    stands_for[drawn] *= len(rest) / max(len(drawn), 1)
    chosen = np.concatenate([first, drawn])
    return chosen, stands_for[chosen]


def _shares(ids: Int64s, amounts: npt.NDArray[Any], name_of: Mapping[int, str]) -> dict[str, float]:
    """Shares of what these entries got by their names; those without a name are left out."""
    sums: defaultdict[str, float] = defaultdict(float)
    for entry_id, amount in zip(ids.tolist(), amounts.tolist(), strict=True):
        if entry_id in name_of:
            sums[name_of[entry_id]] += amount
    whole = sum(sums.values())
    largest = sorted(sums.items(), key=lambda pair: -pair[1])[:_MOST_READ]
    return {name: part / whole for name, part in largest} if whole else {}


def _there(memory: Memory, ids: Sequence[int]) -> dict[int, Entry]:
    """Those of these entries that are in the memory."""
    found: dict[int, Entry] = {}
    for start in range(0, len(ids), _AT_ONCE):
        asked = list(ids[start : start + _AT_ONCE])
        try:
            entries = memory.entries(asked)
        except UnknownEntry as error:
            missing = set(error.ids)
            entries = memory.entries([i for i in asked if i not in missing])
        found.update({entry.id: entry for entry in entries})
    return found


def _told(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "title": entry.title, "text": entry.text[:_TEXT_CUT]}
