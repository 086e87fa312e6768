"""The entries that training rows learn to find: passages that the data name, or samples."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path

import numpy as np

from memory_server.store.id_rows import rows_with
from memory_server.store.store import Store
from trainer.finetune.encoded import OWN_DOC_IDS, RIGHT_ENTRIES, EncodedRows, int_lists
from trainer.finetune.errors import TaskDataError
from trainer.finetune.settings import FinetuneSettings
from trainer.finetune.start import Start
from trainer.finetune.tables import read_table
from trainer.finetune.texts import encode_entries
from trainer.settings_fields import ConfigError


def with_named_entries(settings: FinetuneSettings, start: Start, rows: EncodedRows) -> EncodedRows:
    """Training rows, each with the tokens of the passage in the column `memory.right_entry`.

    Raises:
        ConfigError: a kind of task whose rows have none. TaskDataError: names file, row and column.
    """
    column = settings.memory.right_entry
    if settings.task.kind not in ("classification", "regression"):
        raise ConfigError(
            f"memory.right_entry = {column!r}: must be empty with task.kind = "
            f'"{settings.task.kind}"; only rows of texts have one right entry each'
        )
    table = read_table(settings.task.train, "task.train")
    if settings.task.train_rows:
        table = table.first(settings.task.train_rows)
    entries = encode_entries(
        table,
        column,
        "memory.right_entry",
        start.tokenizer,
        entry_tokens=_store(settings).meta.entry_tokens,
    )
    return rows.with_column(RIGHT_ENTRIES, entries)


def with_own_samples(settings: FinetuneSettings, rows: EncodedRows) -> EncodedRows:
    """Training rows, each with the tokens of the entry that the memory has of it.

    Rows of one text are of one document, which has an entry for each of them, in their order.

    Args:
        rows: with the column `OWN_DOC_IDS`.

    Raises:
        ConfigError: a kind of task without labels. TaskDataError: a row has no entry.
    """
    if settings.task.kind != "classification":
        raise ConfigError(
            f'memory.find_own_label = true: must be false with task.kind = "{settings.task.kind}"; '
            "only rows of classification have a label"
        )
    doc_ids = [int(rows.kept(OWN_DOC_IDS, row)) for row in range(len(rows))]
    entries = _entries_of(_store(settings), settings.memory.domains, doc_ids)
    found = []
    for number, doc_id in enumerate(doc_ids, start=1):
        if not entries[doc_id]:
            raise TaskDataError(
                f"task.train = {settings.task.train!r}, row {number}: the memory "
                f"{settings.memory.store} has no entry of it; memory.find_own_label needs all "
                "training rows as entries, as `pluglm in-task` makes them"
            )
        found.append(entries[doc_id].popleft())
    return rows.with_column(RIGHT_ENTRIES, int_lists(found))


def _entries_of(
    store: Store, domains: tuple[str, ...], doc_ids: list[int]
) -> defaultdict[int, deque[list[int]]]:
    """The tokens of these documents' live entries, without padding, by ascending id."""
    wanted, pad = np.unique(np.array(doc_ids, dtype=np.int64)), store.meta.pad_token_id
    found: list[tuple[int, int, list[int]]] = []
    for ref in store.manifest().of_domains(domains):
        segment = store.segment(ref)
        rows = rows_with(segment.doc_ids, wanted)
        for row in np.setdiff1d(rows, store.deleted_rows(ref)).tolist():
            tokens = segment.tokens[row]
            kept = tokens[tokens != pad].tolist()
            found.append((int(segment.ids[row]), int(segment.doc_ids[row]), kept))
    entries: defaultdict[int, deque[list[int]]] = defaultdict(deque)
    for _, doc_id, tokens in sorted(found):
        entries[doc_id].append(tokens)
    return entries


def _store(settings: FinetuneSettings) -> Store:
    return Store.open(Path(settings.memory.store).expanduser())
