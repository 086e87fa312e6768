"""Command lines of the documents parse as a whole, and every setting that they name is one.

Commands that the prose only names are looked at in tests/cluster/reference.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.settings import AdaptationConfig
from cluster.cli.registry import COMMANDS, find_command
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
WRITTEN_BY_HAND = [
    path for path in DOCUMENTS if path.suffix == ".md" and path.parent.name != "reference"
]
CONFIGURATIONS = {
    "finetune": FinetuneSettings,
    "adapt compare": AdaptationConfig,
    "in-task": InTaskConfig,
}
KEYS = {
    kind: known_keys_of(kind)
    for kind in (PretrainConfig, FinetuneSettings, AdaptationConfig, InTaskConfig)
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command of a block, as a document has it."""

    document: str
    text: str

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
                yield Line(document=name, text=found[1])


def words_of(line: Line) -> list[str]:
    """The words of the command; what a shell makes of the rest of the line is left out."""
    words = shlex.split(line.text, comments=True)
    shell = [number for number, word in enumerate(words) if word in ("|", "&&", ";", ">")]
    return words[: shell[0]] if shell else words


LINES = [line for document in DOCUMENTS for line in lines_of(document)]


def test_the_documents_show_most_commands() -> None:
    shown = {find_command(words_of(line))[0].name for line in LINES}
    assert [command.name for command in COMMANDS if command.name not in shown] == []
    assert {line.document for line in LINES} >= {"README.md", "docs/memory.md", "docs/training.md"}


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_command_of_a_block_parses(line: Line) -> None:
    command, rest = find_command(words_of(line))
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


@pytest.mark.parametrize("document", WRITTEN_BY_HAND, ids=lambda path: path.name)
def test_no_document_says_a_heading_or_a_line_of_a_block_twice(document: Path) -> None:
    """What a merge that went wrong leaves behind."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        lines = [line for line in block.splitlines() if line.startswith(("pluglm ", "rsync "))]
        assert len(set(lines)) == len(lines)
    headings = re.findall(r"^##+ .*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    if document.name != "CHANGELOG.md":  # every version has its own "Added"
        assert [each for each in set(headings) if headings.count(each) > 1] == []
