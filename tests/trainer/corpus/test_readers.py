"""Each format gives the same documents; a damaged file is named with its row."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from tests.trainer.corpus.samples import make_rows, write_json_lines
from trainer.corpus.documents import Document, Fields
from trainer.corpus.errors import CorpusError
from trainer.corpus.sources import find_sources

ROWS = [*make_rows(2500, longest=8), {"title": "Ünï", "text": 'a "quoted", text\nof two lines'}]


def documents(path: Path, fields: Fields | None = None) -> Iterator[Document]:
    (source,) = find_sources([path])
    return source.documents(fields or Fields())


def read(path: Path, fields: Fields | None = None) -> list[tuple[str, str]]:
    return [(document.title, document.text) for document in documents(path, fields)]


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["title", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_stream(path: Path, rows: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_ipc(path: Path, rows: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def by_title(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["title"]: row["text"] for row in rows}


def dump(path: Path, value: Any, **options: Any) -> None:
    path.write_text(json.dumps(value, **options), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], object]] = {
    "rows.jsonl": write_json_lines,
    "lines.json": write_json_lines,
    "array.json": dump,
    "spaced.json": lambda path, rows: dump(path, rows, indent=2),
    "titles.json": lambda path, rows: dump(path, by_title(rows)),
    "records.json": lambda path, rows: dump(path, {row["title"]: row for row in rows}),
    "rows.csv": lambda path, rows: write_csv(path, rows, ","),
    "rows.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "rows.parquet": lambda path, rows: pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=600
    ),
    "file.arrow": write_ipc,
    "stream.arrow": write_stream,
    "rows.feather": lambda path, rows: feather.write_feather(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    assert read(path) == [(row["title"], row["text"]) for row in ROWS]


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "titles.json", "rows.csv"])
def test_gzip_is_read_through(tmp_path: Path, name: str) -> None:
    plain = tmp_path / name
    WRITERS[name](plain, ROWS)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == read(plain)


def test_json_values_across_reads_are_whole(tmp_path: Path) -> None:
    rows = [{"text": letter * 900_000 + "é"} for letter in "abcde"]
    dump(tmp_path / "long.json", rows, ensure_ascii=False)
    assert read(tmp_path / "long.json") == [("", row["text"]) for row in rows]


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOne line\r\nand another.\r\n \r\n\r\nSecond é.\n".encode())
    assert read(path) == [("", "One line\r\nand another."), ("", "Second é.")]


def test_a_saved_dataset_is_read_in_its_own_order(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:5])):
        home = tmp_path / "set" / split
        home.mkdir(parents=True)
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        write_stream(home / names[0], rows[:1])
        write_stream(home / names[1], rows[1:])
        write_stream(home / "cache-1234.arrow", ROWS[9:])
        dump(home / "state.json", {"_data_files": [{"filename": name} for name in names]})
        dump(home / "dataset_info.json", {})
    dump(tmp_path / "set" / "dataset_dict.json", {"splits": ["train", "test"]})
    assert read(tmp_path / "set") == [(row["title"], row["text"]) for row in ROWS[:5]]
    assert read(tmp_path / "set" / "test") == [(row["title"], row["text"]) for row in ROWS[3:5]]
    (tmp_path / "set" / "test" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(CorpusError, match=r"state.json names .*00001-of-00002.*not there"):
        read(tmp_path / "set")


def test_other_fields_can_be_named(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"body": "Words", "id": 7}, {"body": None}])
    assert read(path, Fields(text="body", title="id")) == [("7", "Words")]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - len(data) // 4])
    if name == "rows.jsonl" or name.endswith("sv") or name == "lines.json":
        path.write_bytes(data[:-20])  # these have no end mark: cut inside the last row's quotes
    with pytest.raises(CorpusError, match=name):
        read(path)


BROKEN: dict[str, tuple[bytes, str]] = {
    "latin.txt": ("Erste\nZeile schön".encode("latin-1"), "line 2: not UTF-8 .*iconv"),
    "wide.txt": ("Text".encode("utf-16"), "begins like UTF-16"),
    "latin.json": ('["schön"]'.encode("latin-1"), "not UTF-8"),
    "latin.csv": ("text\nschön\n".encode("latin-1"), "line 2: not UTF-8"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2: holds list, not an object"),
    "field.jsonl": (b'{"body": "a", "n": 1}\n', "line 1: .*'text'; the fields are body, n"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: .*holds int, not text"),
    "title.jsonl": (b'{"text": "a", "title": []}\n', "line 1: .*not a title"),
    "half.jsonl": (b'{"text": "a\\ud800b"}\n', "line 1: .*half of a surrogate pair"),
    "columns.csv": (b"title,text\na,b\nc\n", "line 3: 1 columns under a header of 2"),
    "nocolumn.csv": (b"title,body\na,b\n", "there is no field 'text'; the fields are body, title"),
    "twice.csv": (b"text,text\na,b\n", "several columns"),
    "number.json": (b"[1, 2]", "row 1: holds int"),
    "scalar.json": (b'"text"', "begins with"),
    "after.json": (b'["a"] x', "follows the end"),
    "comma.json": (b'["a",]', "a comma before"),
    "onerow.json": (b'{"text": "a", "title": "b"}', "could be one row or titles"),
    "bad.txt.gz": (b"not gzip at all", "damaged or not gzip"),
    "short.txt.gz": (gzip.compress(b"many words " * 999)[:-9], "damaged or not gzip"),
    "bad.parquet": (b"PAR1 but not really", "damaged"),
    "empty.arrow": (b"", "is empty"),
    "bad.arrow": (b"no arrow file at all, and no stream", "damaged"),
    "old.feather": (b"FEA1....", "Feather version 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=rf"{name}.*{message}|{message}.*{name}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="no column 'text'; the columns are body, n"):
        read(tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="row 1: field 'n' holds int, not text"):
        read(tmp_path / "a.parquet", Fields(text="n"))


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.csv", "rows.parquet"])
def test_readers_stream_and_give_the_rows_before_the_damage(tmp_path: Path, name: str) -> None:
    """The first document is out before the file's end is read, so memory does not hold the file."""
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    if name == "rows.parquet":
        table = pa.Table.from_pylist([*ROWS, *ROWS])
        pq.write_table(table, path, row_group_size=2000, compression="none")
        data = bytearray(path.read_bytes())
        place = data.rindex(b"Title 2499")
        data[place - 4000 : place] = b"\xff" * 4000  # the footer is whole, a later page is not
        path.write_bytes(data)
    else:
        path.write_bytes(path.read_bytes()[:-20])
    stream = documents(path)
    assert next(stream).text == ROWS[0]["text"]
    with pytest.raises(CorpusError, match=name):
        list(stream)
