"""Rows of a Parquet table that become JSON Lines, so that facts can be held out of a text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import ConfigError

_KEYS = {"from", "to", "columns", "where", "unless", "rows", "skip", "shuffle"}


def select(settings: Mapping[str, Any], fill: Callable[[str], str]) -> int:
    """Write the chosen rows; returns how many.

    Args:
        settings: `from` (a Parquet file), `to`, `columns` (those that are written), `where`
            (columns that must equal values), `unless` (columns that must not equal them), `shuffle`
            (a seed: in which order), then `skip` (so many are left out) and `rows` (most).
        fill: fills a path's slots.

    Raises:
        ConfigError: a bad setting, or no row is left.
    """
    unknown = set(settings) - _KEYS
    missing = {"from", "to", "columns"} - set(settings)
    if unknown or missing:
        raise ConfigError(
            f"select: unknown {sorted(unknown)}, missing {sorted(missing)}; allowed: "
            f"{', '.join(sorted(_KEYS))}"
        )
    source, target = Path(fill(settings["from"])), Path(fill(settings["to"]))
    where, unless = dict(settings.get("where", {})), dict(settings.get("unless", {}))
    columns = list(settings["columns"])
    try:
        table = pq.read_table(source, columns=sorted({*columns, *where, *unless}))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"select: {source} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    rows = [
        row
        for row in range(table.num_rows)
        if all(table[name][row].as_py() == value for name, value in where.items())
        and not any(table[name][row].as_py() == value for name, value in unless.items())
    ]
    if "shuffle" in settings:
        random.Random(int(settings["shuffle"])).shuffle(rows)
    found, skip = len(rows), int(settings.get("skip", 0))
    rows = rows[skip:][: settings.get("rows") or found]
    if not rows:
        raise ConfigError(
            f"select: of {source} {found} rows have {where} and not {unless}, {skip} of which are "
            "skipped: none is left"
        )
    draft = target.with_name(f".{target.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        for row in table.select(columns).take(rows).to_pylist():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    draft.replace(target)
    return len(rows)
