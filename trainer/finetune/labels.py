"""Labels as a task's files have them: strings or whole numbers, known by their name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from trainer.finetune.errors import TaskDataError
from trainer.finetune.tables import Table


def label_name(table: Table, column: str, row: int, value: Any) -> str:
    """The name of one label.

    Raises:
        TaskDataError: it is no string and no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        what = "no value" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise table.fault(row, column, f"{what}; a label is a string or a whole number")
    return str(value)


def in_order(names: set[str]) -> tuple[str, ...]:
    """Labels in the order of their ids: by number where all are numbers, else by name."""
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_names(table: Table, column: str, values: Sequence[Any]) -> tuple[str, ...]:
    """The labels that a training file knows.

    Raises:
        TaskDataError: a value that is no label, or fewer than two labels.
    """
    names = in_order({label_name(table, column, row, value) for row, value in enumerate(values)})
    if len(names) < 2:
        raise TaskDataError(
            f"{table.path}, column {column!r}: every row has the label {names[0]!r}; there is "
            "nothing to tell apart"
        )
    return names


def label_indices(
    table: Table, column: str, values: Sequence[Any], labels: tuple[str, ...]
) -> list[int]:
    """Each row's label as its index.

    Raises:
        TaskDataError: a value that is no label, or one that the training file does not have.
    """
    index = {name: i for i, name in enumerate(labels)}
    found = []
    for row, value in enumerate(values):
        name = label_name(table, column, row, value)
        if name not in index:
            raise table.fault(row, column, unseen(name, labels))
        found.append(index[name])
    return found


def unseen(name: str, labels: tuple[str, ...]) -> str:
    """What is wrong with a label that the training file does not have."""
    near = difflib.get_close_matches(name, labels, n=1)
    some = ", ".join(repr(label) for label in labels[:8]) + (", …" if labels[8:] else "")
    hint = f"did you mean {near[0]!r}?" if near else f"it has {some}"
    return f"the label {name!r} is not in the training file; {hint}"
