"""The reference of configurations, out of the dataclasses that check them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.settings import AdaptationConfig
from cluster.config import PretrainConfig
from cluster.config_text import toml_value
from cluster.finetune import FinetuneConfig
from cluster.reference.markdown import GENERATED, cell, code_cell, escaped
from trainer.settings_fields import describe_bounds, describe_type

_INTRODUCTION = """\
A configuration is a TOML file; every key can be overridden on the command line
(`pluglm pretrain CONFIG.toml optim.steps=200`, `pluglm finetune TASK.toml --set train.epochs=3`).
A key that is not here is refused, and so is a value of another type or out of its range, before any
work; so are rules that span several keys. `--check` checks all of it and does nothing else. A key
without a default must be given. Types and ranges are those that the program itself checks."""

_KINDS: tuple[tuple[str, str, type[Any], type[Any] | None], ...] = (
    ("Pre-training", "`pluglm pretrain CONFIG.toml`", PretrainConfig, None),
    ("Fine-tuning", "`pluglm finetune TASK.toml`", FinetuneConfig, None),
    (
        "Comparing memories",
        "`pluglm adapt compare TASK.toml`: what fine-tuning takes, and",
        AdaptationConfig,
        FinetuneConfig,
    ),
    (
        "Training samples as knowledge",
        "`pluglm in-task TASK.toml`: what fine-tuning takes, and",
        InTaskConfig,
        FinetuneConfig,
    ),
)


def configuration_reference() -> str:
    """Markdown: every section, key, type, range, default and meaning."""
    contents, parts = [], []
    for title, command, kind, base in _KINDS:
        sections = sections_of(kind, leave_out=base)
        links = ", ".join(f"[`[{name}]`](#{_anchor(name, title)})" for name in sections)
        contents.append(f"| [{title}](#{_anchor(title)}) | {links} |")
        parts.append(f"## {title}\n\n{command}")
        parts.extend(_described(sections, title))
    table = "\n".join(["| for | sections |", "|---|---|", *contents])
    head = f"# Configuration\n\n{GENERATED}\n\n{_INTRODUCTION}\n\n{table}"
    return "\n\n".join([head, *parts]) + "\n"


def sections_of(kind: type[Any], *, leave_out: type[Any] | None = None) -> dict[str, type[Any]]:
    """A configuration's sections by name, in their order, without those of another one."""
    known = set() if leave_out is None else {item.name for item in fields(leave_out)}
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind) if item.name not in known}


def _anchor(*words: str) -> str:
    return "-of-".join(words).lower().replace(" ", "-")


def _described(sections: Mapping[str, type[Any]], title: str) -> Iterator[str]:
    for name, about in sections.items():
        keys = get_type_hints(about)
        rows = [
            f"| `{item.name}` | {_allowed(item, keys[item.name])} | {_default(item)} "
            f"| {cell(item.metadata['help'])} |"
            for item in fields(about)
        ]
        head = "| key | value | default | meaning |\n|---|---|---|---|"
        # What follows a docstring's first paragraph is for those who read the code.
        purpose = cleandoc(about.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        # Pre-training and fine-tuning both have a [model]: each needs a heading of its own.
        heading = f"### `[{name}]` of {title.lower()}"
        yield f"{heading}\n\n{escaped(purpose)}\n\n" + "\n".join([head, *rows])


def _allowed(item: Field[Any], hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    words, bounds = describe_type(hint), describe_bounds(item.metadata)
    if get_origin(hint) is tuple and bounds:
        bounds = f"each {bounds}"
    empty = "may_be_empty" in item.metadata
    if empty:
        words = words.replace(" of one or more ", " of ")
    parts = (words, bounds, "may be empty" if empty else "")
    return cell(", ".join(part for part in parts if part))


def _default(item: Field[Any]) -> str:
    if item.default is not MISSING:
        return code_cell(toml_value(item.default))
    if item.default_factory is not MISSING:
        return code_cell(toml_value(item.default_factory()))
    return "must be given"
