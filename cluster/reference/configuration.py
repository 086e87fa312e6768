"""The reference of configurations, out of the dataclasses that check them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.settings import AdaptationConfig
from cluster.config import PretrainConfig
from cluster.finetune import FinetuneConfig
from cluster.reference.markdown import GENERATED, cell
from trainer.settings_fields import describe_bounds, describe_type, shown

_INTRODUCTION = """\
A configuration is a TOML file; every key can be overridden on the command line
(`pluglm pretrain CONFIG.toml optim.steps=200`, `pluglm finetune TASK.toml --set train.epochs=3`).
A key that is not here is refused, and so is a value of another type or out of its range, before any
work. A key without a default must be given."""

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
    parts = [f"# Configuration\n\n{GENERATED}\n\n{_INTRODUCTION}"]
    for title, command, kind, base in _KINDS:
        parts.append(f"## {title}\n\n{command}")
        parts.extend(_sections(kind, leave_out=base))
    return "\n\n".join(parts) + "\n"


def _sections(kind: type[Any], *, leave_out: type[Any] | None) -> Iterator[str]:
    known = set() if leave_out is None else {item.name for item in fields(leave_out)}
    hints = get_type_hints(kind)
    for section in fields(kind):
        if section.name in known:
            continue
        about = hints[section.name]
        keys = get_type_hints(about)
        rows = [
            f"| `{item.name}` | {_allowed(item, keys[item.name])} | {_default(item)} "
            f"| {cell(item.metadata['help'])} |"
            for item in fields(about)
        ]
        head = "| key | value | default | meaning |\n|---|---|---|---|"
        # What follows a docstring's first paragraph is for those who read the code.
        purpose = cleandoc(about.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        yield f"### `[{section.name}]`\n\n{purpose}\n\n" + "\n".join([head, *rows])


def _allowed(item: Field[Any], hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    bounds = describe_bounds(item.metadata)
    return cell(f"{describe_type(hint)}{f', {bounds}' if bounds else ''}")


def _default(item: Field[Any]) -> str:
    if item.default is not MISSING:
        return f"`{cell(shown(item.default))}`"
    if item.default_factory is not MISSING:
        return f"`{cell(shown(item.default_factory()))}`"
    return "must be given"
