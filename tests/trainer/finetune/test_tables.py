"""A task's files: the same rows from every format, and every fault named by file, line, column."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.finetune.tiny import write_rows
from trainer.finetune.errors import TaskDataError
from trainer.finetune.tables import read_table

ROWS = [{"text": "a cat", "label": "pet"}, {"text": 'a "fig", ripe', "label": "fruit"}]


def written(home: Path, suffix: str) -> Path:
    path = home / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".jsonl":
        write_rows(path, ROWS)
    elif suffix == ".csv.gz":
        path.write_bytes(gzip.compress(b'text,label\na cat,pet\n"a ""fig"", ripe",fruit\n'))
    elif suffix == ".csv":
        path.write_text('text,label\na cat,pet\n\n"a ""fig"", ripe",fruit\n')
    else:
        path.write_text('text\tlabel\na cat\tpet\n"a ""fig"", ripe"\tfruit\n')
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".csv.gz", ".tsv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    table = read_table(written(tmp_path, suffix), "task.train")
    assert len(table) == 2
    assert table.columns == {name: [row[name] for row in ROWS] for name in ("text", "label")}
    assert table.first(1).columns["text"] == ["a cat"]


def test_a_row_without_a_value_has_none_in_its_place(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"label": 1, "text": "b"}])
    assert read_table(path, "task.dev").columns == {"text": ["a", "b"], "label": [None, 1]}


def test_a_fault_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": 3}\n')
    fault = read_table(path, "task.dev").fault(1, "text", "it is no text")
    assert str(fault) == f"{path}, line 3, column 'text': it is no text"
    parquet = read_table(written(tmp_path, ".parquet"), "task.dev").fault(1, "text", "no")
    assert "rows.parquet, row 2, column 'text'" in str(parquet)


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, ".csv"), "task.train")
    with pytest.raises(
        TaskDataError, match=r"no column 'labels'.*did you mean 'label'.*task\.label"
    ):
        table.column("labels", "task.label")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "is of no known kind"),
        ("a.parquet.gz", "x", "is of no known kind"),
        ("a.parquet", "no parquet", "is damaged or no Parquet file"),
        ("a.jsonl", "{}\n[1]\n", "line 2: not an object but list"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text,label\na\n", "line 2: 1 values, but the header names 2"),
        ("a.csv", 'text\n"a\n', "not a row of this CSV"),
        ("a.csv", "text,text\na,b\n", "several columns are named 'text'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TaskDataError, match=message):
        read_table(tmp_path / name, "task.train")


def test_a_file_that_is_not_there_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match=r"task\.dev = .*no such file"):
        read_table(tmp_path / "none.csv", "task.dev")
