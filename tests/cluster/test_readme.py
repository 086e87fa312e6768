"""What the README tells a newcomer to type is what the command understands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from cluster import checks
from cluster.cli import main
from cluster.cli.registry import find_command
from cluster.config import load_config
from memory_server.store.store import Store

README = Path(__file__).resolve().parents[2] / "README.md"


def readme_commands() -> list[list[str]]:
    """The words of every `pluglm` line in a code block."""
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\.venv/bin/)?pluglm ", line)]


def test_the_readme_shows_commands() -> None:
    assert len(readme_commands()) >= 5
    assert "@@" not in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_every_command_line_parses(words: list[str]) -> None:
    command, rest = find_command(words)
    command.parser().parse_intermixed_args(rest)


def test_your_own_text_goes_from_corpus_to_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's two commands fit each other: corpus build with its defaults, then pretrain."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").mkdir()
    words = [f"word{n}" for n in range(60)]
    documents = [" ".join(words[(n * k) % 60] for k in range(1, 40)) for n in range(1, 200)]
    lines = [json.dumps({"title": str(n), "text": text}) for n, text in enumerate(documents)]
    (tmp_path / "my-texts" / "texts.jsonl").write_text("\n".join(lines))
    build, pretrain = readme_commands_of("corpus build"), readme_commands_of("pretrain")
    build[build.index("--tokenizer") + 1] = "train:300"
    assert main(build) == 0
    pretrain[1] = str(README.parent / pretrain[1])
    config = load_config(pretrain[1], pretrain[2:])
    source = checks.corpus_source(config)
    checks.check_model(config, source)
    checks.check_memory(config, source, Store.open(source.store).head())


def readme_commands_of(name: str) -> list[str]:
    return next(w for w in readme_commands() if w[: len(name.split())] == name.split())
