"""A memory of one's own for each test, and looks at what lies in it that go around the editor."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Row:
    """A live entry as it lies in its segment, its padding stripped."""

    doc_id: int
    tokens: tuple[int, ...]
    text: str
    title: str
    source: str
    domain: str


@dataclass(frozen=True)
class OwnMemory:
    """A copy of the tiny run's corpus, whose memory a test may change."""

    corpus: Path

    @property
    def path(self) -> Path:
        return self.corpus / "memory"

    @property
    def store(self) -> Store:
        return Store.open(self.path)

    def rows(self, version: str | None = None) -> dict[int, Row]:
        """All live entries by id, read row by row."""
        store, found = self.store, {}
        for ref in store.manifest(version).segments:
            segment, dead = store.segment(ref), set(store.deleted_rows(ref).tolist())
            for row in range(segment.rows):
                if row in dead:
                    continue
                entry_id = int(segment.ids[row])
                assert entry_id not in found
                tokens = segment.tokens[row].tolist()
                while tokens and tokens[-1] == store.meta.pad_token_id:
                    tokens.pop()
                found[entry_id] = Row(
                    doc_id=int(segment.doc_ids[row]),
                    tokens=tuple(tokens),
                    text=segment.strings("text", [row])[0],
                    title=segment.strings("title", [row])[0],
                    source=segment.strings("source", [row])[0],
                    domain=ref.domain,
                )
        return found

    def files(self) -> dict[str, bytes]:
        """Every file of the store, which is what a refusal must leave as it is."""
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        }

    def document(self, entries: int) -> int:
        """A document that has this many entries."""
        counts: dict[int, int] = {}
        for row in self.rows().values():
            counts[row.doc_id] = counts.get(row.doc_id, 0) + 1
        return next(doc_id for doc_id, count in counts.items() if count == entries)


def copied(tiny_run: TinyRun, place: Path) -> OwnMemory:
    return OwnMemory(Path(shutil.copytree(tiny_run.corpus, place)))


def run_json(words: list[str], capsys: Capture) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    code = main([*words, "--json"])
    printed, errors = capsys.readouterr()
    assert code == 0, errors
    return json.loads(printed)


def refusal(words: list[str], capsys: Capture, code: int = 2) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(words) == code
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("pluglm: error: ")
    assert errors.count("\n") == 1
    return errors


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in the format that the file's name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path
