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

_KEYS = {"from", "to", "columns", "where", "rows", "shuffle"}


def select(settings: Mapping[str, Any], fill: Callable[[str], str]) -> int:
    """Write the chosen rows; returns how many.

    Args:
        settings: `from` (a Parquet file), `to`, `columns` (those that are written), `where`
            (columns that must equal values), `rows` (most), `shuffle` (a seed: which rows are
            taken, and in which order).
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
    where = dict(settings.get("where", {}))
    columns = list(settings["columns"])
    try:
        table = pq.read_table(source, columns=sorted({*columns, *where}))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"select: {source} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    rows = [
        row
        for row in range(table.num_rows)
        if all(table[name][row].as_py() == value for name, value in where.items())
    ]
    if "shuffle" in settings:
        random.Random(int(settings["shuffle"])).shuffle(rows)
    rows = rows[: settings.get("rows") or len(rows)]
    if not rows:
        raise ConfigError(f"select: no row of {source} has {where}")
    draft = target.with_name(f".{target.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        for row in table.select(columns).take(rows).to_pylist():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    draft.replace(target)
    return len(rows)
