"""docs/reference/configuration.md: every section, field, type, default, range and meaning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.adaptation import in_task_settings, settings
from cluster.adaptation.in_task_settings import InTaskConfig, InTaskSettings
from cluster.adaptation.settings import AdaptationConfig, CompareSettings
from cluster.config import PretrainConfig
from cluster.config_sections import known_keys_of
from cluster.reference.markdown import code, link, page, prose, table
from trainer.finetune.settings import METRICS, FinetuneSettings, TaskSettings
from trainer.settings_fields import describe_bounds, describe_type, shown

_INTRODUCTION = """\
# Configuration

Every key of every TOML file that `pluglm` reads. A file has sections (`[optim]`) with keys
(`lr = 2e-3`); what it leaves out has the default below. A key can be overridden where the command
is given, the last one wins:

```
pluglm pretrain configs/quickstart.toml optim.lr=1e-3 memory.top_k=8
pluglm finetune configs/finetune-classification.toml --set train.epochs=5
```

Values are written as in TOML; a bare word is a string. All of it is checked before any work is
done: an unknown key, a wrong type and an impossible value are refused with what is allowed. Some
values must also fit each other (`optim.batch_size` and `runtime.trainers`, for example); the
refusal names both. `pluglm pretrain CONFIG --check` prints the resolved configuration and stops; a
run writes it to `config.toml` in its directory.

"required" in the column of defaults: the file or an override must set the key."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """One kind of TOML file, and the command that reads it."""

    command: str
    settings: type[Any]
    about: str
    base: type[Any] | None = None


_FILES = (
    _File(
        command="pluglm pretrain",
        settings=PretrainConfig,
        about="The guides are [training.md](../training.md) and [memory.md](../memory.md).",
    ),
    _File(
        command="pluglm finetune",
        settings=FinetuneSettings,
        about="The guide is [finetuning.md](../finetuning.md).",
    ),
    _File(
        command="pluglm adapt compare",
        settings=AdaptationConfig,
        base=FinetuneSettings,
        about="The sections of `pluglm finetune`, and one more. The guide is "
        "[adapt.md](../adapt.md).",
    ),
    _File(
        command="pluglm in-task",
        settings=InTaskConfig,
        base=FinetuneSettings,
        about="The sections of `pluglm finetune`, and one more. The guide is "
        "[adapt.md](../adapt.md).",
    ),
)

_KEYS = frozenset(
    f"{section}.{key}"
    for file in _FILES
    for section, keys in known_keys_of(file.settings).items()
    for key in keys
)

# What a section's table cannot say: values that are checked outside of the declarations.
_ALSO: dict[type[Any], list[str]] = {
    CompareSettings: table(
        ["in `conditions`", "what is fine-tuned"],
        [(code(name), prose(about)) for name, about in settings.CONDITIONS.items()],
    ),
    InTaskSettings: table(
        ["in `conditions`", "what is fine-tuned"],
        [(code(name), prose(about)) for name, about in in_task_settings.CONDITIONS.items()],
    ),
    TaskSettings: table(
        ["`kind`", "allowed in `metric`, the first one decides if it is empty"],
        [(code(kind), " · ".join(map(code, names))) for kind, names in METRICS.items()],
    ),
}


def configuration_page(configs: Path) -> str:
    """The page as Markdown.

    Args:
        configs: the directory of the shipped TOML files.
    """
    lines = [_INTRODUCTION, ""]
    for file in _FILES:
        names = [_heading(file, name) for name in _sections(file)]
        places = " · ".join(link(code(name.split()[-1]), name) for name in names)
        lines.append(f"* {code(file.command)}: {places}")
    lines += [
        "* `pluglm experiment`: stages, not sections: [experiments.md](../experiments.md)",
        "",
        "The shipped files, which `pluglm` finds in a checkout and in an installed wheel:",
        "",
        *table(["file", "what it is"], _shipped(configs)),
    ]
    for file in _FILES:
        lines += ["", f"## {file.command}", "", file.about]
        for name, section in _sections(file).items():
            lines += ["", f"### {_heading(file, name)}", "", *_section(section)]
    return page(lines)


def _sections(file: _File) -> Mapping[str, type[Any]]:
    """Section name to its dataclass, without those of the file that this one builds on."""
    hints = get_type_hints(file.settings)
    already = {item.name for item in fields(file.base)} if file.base else set()
    return {
        item.name: hints[item.name] for item in fields(file.settings) if item.name not in already
    }


def _heading(file: _File, section: str) -> str:
    # Two files have a section of the same name; headings must differ to be linked to.
    return f"{file.command.removeprefix('pluglm ')} [{section}]"


def _section(section: type[Any]) -> Iterator[str]:
    about = inspect.cleandoc(section.__doc__ or "")
    yield prose(about)
    yield ""
    hints = get_type_hints(section)
    yield from table(
        ["key", "type", "default", "meaning"],
        (
            (
                code(item.name),
                _type(hints[item.name], item.metadata),
                _default(item),
                _help(item.metadata["help"]),
            )
            for item in fields(section)
        ),
    )
    if section in _ALSO:
        yield from ["", *_ALSO[section]]


def _type(hint: Any, metadata: Mapping[str, Any]) -> str:
    if get_origin(hint) is Literal:
        return " · ".join(code(f'"{choice}"') for choice in get_args(hint))
    words = describe_type(hint)
    if "may_be_empty" in metadata:
        words = words.replace("one or more ", "") + ", or []"
    bounds = describe_bounds(metadata)
    if bounds:
        words += f"; each {bounds}" if get_origin(hint) is tuple else f", {bounds}"
    return prose(words)


def _help(text: str) -> str:
    """The meaning, in which the names of keys stand out."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"\b[a-z_]+\.[a-z_]+\b", lambda word: _key(word.group()), part)
        for part in parts[::2]
    ]
    return prose("".join(parts))


def _key(word: str) -> str:
    return code(word) if word in _KEYS else word


def _default(item: Field[Any]) -> str:
    return "required" if item.default is MISSING else code(shown(item.default))


def _shipped(configs: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(configs.glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in takewhile(_is_comment, lines))
        # The first sentence; what follows is how to run it.
        about = re.match(r".*?[.](?= |$)", comment)
        if about is None:
            raise ValueError(f"{path}: begin it with a comment, a sentence that says what it is")
        yield f"[configs/{path.name}](../../configs/{path.name})", prose(about.group())


def _is_comment(line: str) -> bool:
    return line.startswith("#")
