"""Rows of one text, or of a pair: read, checked and tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from trainer.corpus.entries import cut_entries, entry_prefix
from trainer.finetune.encoded import TOKENIZE_ROWS, EncodedRows, int_lists
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table

DEFAULT_PAIR = "text_pair"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of a split; `pair_column` is empty where rows have one text."""

    table: Table
    text_column: str
    pair_column: str


def pair_column(settings: TaskSettings, train: Table) -> str:
    """The column of the second text; empty: none. The training file decides about the default."""
    if settings.text_pair == DEFAULT_PAIR and DEFAULT_PAIR not in train.columns:
        return ""
    return settings.text_pair


def read_texts(settings: TaskSettings, table: Table, pair: str) -> Texts:
    """Check that every row has its text.

    Raises:
        TaskDataError: names file, row and column.
    """
    texts = Texts(table=table, text_column=settings.text, pair_column=pair)
    check_texts(table, settings.text, "task.text")
    if pair:
        check_texts(table, pair, "task.text_pair")
    return texts


def check_texts(table: Table, column: str, setting: str) -> list[str]:
    """A column of texts.

    Raises:
        TaskDataError: it is missing, or a value is no text; names the row.
    """
    values = table.column(column, setting)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            what = "no value" if value is None else f"{type(value).__name__} {value!r:.40}"
            raise table.fault(row, column, f"{what}; it must be text")
    return values


def encode_texts(
    texts: Texts, tokenizer: Any, *, max_length: int, targets: pa.Array
) -> EncodedRows:
    """Tokenise, the longer text of a pair cut first; `targets` become the column `labels`.

    Raises:
        TaskDataError: a text without tokens; names it.
    """
    table = texts.table
    first = table.columns[texts.text_column]
    second = table.columns[texts.pair_column] if texts.pair_column else None
    names = [n for n in ("input_ids", "token_type_ids") if n in tokenizer.model_input_names]
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    cut = 0
    for start in range(0, len(table), TOKENIZE_ROWS):
        block = slice(start, start + TOKENIZE_ROWS)
        encoded = tokenizer(
            first[block],
            None if second is None else second[block],
            truncation="longest_first",
            max_length=max_length,
            verbose=False,
        )
        for offset, encoding in enumerate(encoded.encodings):
            parts = set(encoding.sequence_ids)
            for part, column in enumerate((texts.text_column, texts.pair_column)):
                if column and part not in parts:
                    raise table.fault(start + offset, column, "the text has no tokens")
            cut += bool(encoding.overflowing)
        for name in names:
            columns[name] += encoded[name]
    arrays = {name: int_lists(rows) for name, rows in columns.items()}
    return EncodedRows(arrays | {"labels": targets}, cut=cut)


def encode_entries(
    table: Table, column: str, setting: str, tokenizer: Any, *, entry_tokens: int
) -> pa.Array:
    """Each row's text of a column as the first entry that a memory has of it, without padding.

    Args:
        setting: the setting that names the column.
        entry_tokens: the longest that entries of the memory are.

    Raises:
        TaskDataError: no such column, a value that is no text, or one without tokens; names it.
    """
    values = check_texts(table, column, setting)
    prefix = entry_prefix(tokenizer.cls_token_id, None, entry_tokens)
    rows: list[list[int]] = []
    for start in range(0, len(values), TOKENIZE_ROWS):
        texts = values[start : start + TOKENIZE_ROWS]
        encodings = tokenizer(texts, add_special_tokens=False, verbose=False).encodings
        for text, encoding in zip(texts, encodings, strict=True):
            if not encoding.ids:
                raise table.fault(len(rows), column, "the text has no tokens")
            cut = cut_entries(encoding, text, prefix=prefix, entry_tokens=entry_tokens, pad=-1)
            tokens = cut.tokens[0]
            rows.append(tokens[tokens >= 0].tolist())
    return int_lists(rows)
