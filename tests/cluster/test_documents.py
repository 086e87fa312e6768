"""Every `pluglm` command and every setting that a document names is one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.settings import AdaptationConfig
from cluster.cli.command import UsageError
from cluster.cli.registry import COMMANDS, find_command, members
from cluster.config import PretrainConfig
from cluster.config_sections import known_keys_of
from trainer.finetune.settings import FinetuneSettings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").glob("*.toml"),
        *(ROOT / "experiments").glob("*.toml"),
    ]
)
PROGRAM = re.compile(r"(?:\$ )?(?:\.venv/bin/)?pluglm ([a-z-].*)")
CONFIGURATIONS = {
    "finetune": FinetuneSettings,
    "adapt compare": AdaptationConfig,
    "in-task": InTaskConfig,
}
KEYS = {
    kind: known_keys_of(kind)
    for kind in (PretrainConfig, FinetuneSettings, AdaptationConfig, InTaskConfig)
}
# Words of the prose that stand for something else than themselves.
STANDS_FOR = re.compile(r"\.\.\.|[A-Z]+_?[A-Z]*$|\||KEY=|key=")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command as a document has it: a whole one in a block, or one that the prose names."""

    document: str
    text: str
    whole: bool

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def lines_of(document: Path) -> Iterator[Line]:
    name = str(document.relative_to(ROOT))
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".toml":
        text = re.sub(r"^# ?", "", text, flags=re.M)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    if document.suffix == ".toml":
        blocks = re.findall(r"^ +pluglm (?:.*\\\n)*.*", text, re.M)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            found = PROGRAM.fullmatch(line.strip())
            # `pluglm COMMAND [options]` of the reference is a pattern.
            if found and "[" not in found[1].replace("[MASK]", "").replace("=[", ""):
                yield Line(document=name, text=found[1], whole=True)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for named in re.findall(r"`pluglm ([a-z][^`]*)`", prose):
        yield Line(document=name, text=" ".join(named.split()), whole=False)


LINES = [line for document in DOCUMENTS for line in lines_of(document)]
WHOLE = [line for line in LINES if line.whole]
NAMED = [line for line in LINES if not line.whole]


def test_the_documents_show_most_commands() -> None:
    shown = {find_command(shlex.split(line.text, comments=True))[0].name for line in WHOLE}
    assert [command.name for command in COMMANDS if command.name not in shown] == []
    assert {line.document for line in WHOLE} >= {"README.md", "docs/memory.md", "docs/training.md"}
    assert NAMED


@pytest.mark.parametrize("line", WHOLE, ids=str)
def test_a_command_of_a_block_parses(line: Line) -> None:
    command, rest = find_command(shlex.split(line.text, comments=True))
    if "--help" in rest:
        return
    options = command.parser().parse_intermixed_args(rest)
    kind = CONFIGURATIONS.get(command.name, PretrainConfig)
    given = [*(getattr(options, "overrides", None) or ())]
    if command.name in (*CONFIGURATIONS, "quickstart"):
        given += options.set
    for override in given:
        section, _, key = override.partition("=")[0].partition(".")
        assert key in KEYS[kind].get(section, {}), override


@pytest.mark.parametrize("line", NAMED, ids=str)
def test_a_command_that_the_prose_names_is_one_and_has_these_options(line: Line) -> None:
    words = shlex.split(line.text)
    alternatives = words[1].split("|") if len(words) > 1 else [""]
    for second in alternatives:
        named = [words[0], *([second] if second else []), *words[2:]]
        if len(named) == 1 or STANDS_FOR.match(second) or second.startswith("-"):
            if members(named[0]) or any(command.name == named[0] for command in COMMANDS):
                known = [command.parser() for command in members(named[0])]
                known += [find_command(named[:1])[0].parser()] if not known else []
            else:
                raise UsageError(f"there is no command {named[0]}")
        else:
            known = [find_command(named)[0].parser()]
        flags = {flag for parser in known for flag in parser._option_string_actions}
        assert [word for word in named if word.startswith("-") and word not in flags] == []


@pytest.mark.parametrize(
    "document",
    # The Python interface names modules, not settings.
    [path for path in DOCUMENTS if path.suffix == ".md" and path.name != "api.md"],
    ids=lambda path: path.name,
)
def test_a_setting_that_the_prose_names_is_one(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    sections: dict[str, set[str]] = {}
    for known in KEYS.values():
        for section, keys in known.items():
            sections.setdefault(section, set()).update(keys)
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)(?=[`= ])", text)
    wrong = [f"{s}.{key}" for s, key in named if s in sections and key not in sections[s]]
    # Modules, attributes and files that are called like a section.
    others = {"model.export", "model.safetensors", "model.share_statistics"}
    assert [name for name in wrong if name not in others and not name.endswith(".py")] == []
