"""A task's file as columns of plain values, and where each row stands in it."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.corpus.line_reader import read_lines
from trainer.finetune.errors import TaskDataError

KINDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of one file.

    Attributes:
        path: the file.
        columns: name to one value per row, as the file has them: CSV gives text only; None where
            a row has no value.
        lines: the line of each row, from 1; empty for Parquet, which has none.
    """

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def first(self, rows: int) -> Table:
        """The first so many rows."""
        columns = {name: values[:rows] for name, values in self.columns.items()}
        return Table(path=self.path, columns=columns, lines=self.lines[:rows])

    def column(self, name: str, setting: str) -> list[Any]:
        """A column's values.

        Args:
            setting: the setting that names it, for the message.

        Raises:
            TaskDataError: there is none of this name; names the nearest.
        """
        if name in self.columns:
            return self.columns[name]
        near = difflib.get_close_matches(name, list(self.columns), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else ""
        raise TaskDataError(
            f"{self.path}: there is no column {name!r}; the columns are "
            f"{', '.join(self.columns) or 'none'}. {hint} Name the column with {setting}."
        )

    def fault(self, row: int, column: str, what: str) -> TaskDataError:
        """The error for one value; `row` counts from 0."""
        place = f"line {self.lines[row]}" if self.lines else f"row {row + 1}"
        return TaskDataError(f"{self.path}, {place}, column {column!r}: {what}")


def read_table(path: Path | str, setting: str) -> Table:
    """Read a file of a task whole.

    Args:
        path: .jsonl, .ndjson, .csv, .tsv (these also as .gz) or .parquet.
        setting: the setting that names it, for messages.

    Raises:
        TaskDataError: missing, of another kind, damaged, or without any row.
        CorpusError: a text file cannot be read or is not UTF-8.
    """
    path = Path(path).expanduser()
    packed = path.suffix == ".gz"
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    if suffix not in KINDS or (packed and suffix == ".parquet"):
        raise TaskDataError(
            f"{setting} = {str(path)!r}: is of no known kind; give a {', '.join(KINDS)} file, or a "
            "text file of these as .gz"
        )
    if not path.is_file():
        raise TaskDataError(f"{setting} = {str(path)!r}: there is no such file; correct the path")
    if suffix == ".parquet":
        table = _read_parquet(path)
    elif suffix in (".csv", ".tsv"):
        table = _read_csv(path, "\t" if suffix == ".tsv" else ",")
    else:
        table = _read_json_lines(path)
    if not len(table):
        raise TaskDataError(f"{path} has no rows; {setting} needs at least one")
    return table


def _read_parquet(path: Path) -> Table:
    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskDataError(f"{path} is damaged or no Parquet file ({reason})") from error
    # Not to_pydict: a file may hold two columns of one name, and the last would win.
    names = found.schema.names
    _refuse_repeated(path, names)
    return Table(
        path=path,
        columns={name: found.column(i).to_pylist() for i, name in enumerate(names)},
    )


def _read_csv(path: Path, delimiter: str) -> Table:
    rows = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    values: list[list[str]] = []
    lines: list[int] = []
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise TaskDataError(
                f"{path}, line {line}: not a row of this CSV ({error}); check its quotes and "
                "separators"
            ) from error
        if row is None:
            break
        if not row:
            continue  # a blank line
        if header is None:
            header = row
            _refuse_repeated(path, header)
            continue
        if len(row) != len(header):
            raise TaskDataError(
                f"{path}, line {line}: {len(row)} values, but the header names {len(header)} "
                "columns; quote values that hold a separator"
            )
        values.append(row)
        lines.append(line)
    columns = zip(*values, strict=True) if values else ([] for _ in header or ())
    named = {name: list(column) for name, column in zip(header or (), columns, strict=True)}
    return Table(path=path, columns=named, lines=lines)


def _read_json_lines(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, text in read_lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TaskDataError(
                f"{path}, line {line}: not JSON ({error}); JSON Lines has one whole object per line"
            ) from error
        if not isinstance(row, dict):
            raise TaskDataError(f"{path}, line {line}: not an object but {type(row).__name__}")
        rows.append(row)
        lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(
        path=path, columns={name: [row.get(name) for row in rows] for name in names}, lines=lines
    )


def _refuse_repeated(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise TaskDataError(f"{path}: several columns are named {name!r}; rename one")
