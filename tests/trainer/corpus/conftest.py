"""Fixtures of the corpus tests: a small tokenizer, and a build into the test's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.corpus.samples import Build, make_rows, write_json_lines
from trainer.corpus.build import build_corpus
from trainer.corpus.info import CorpusInfo


@pytest.fixture(scope="session")
def trained_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a small WordPiece tokenizer."""
    home = tmp_path_factory.mktemp("tokenizer")
    source = write_json_lines(home / "rows.jsonl", make_rows(40, seed=5))
    return str(
        build_corpus([source], home / "out", tokenizer="train:256", workers=1).tokenizer_path
    )


@pytest.fixture
def build(tmp_path: Path, trained_tokenizer: str) -> Build:
    """`build_corpus` in this process, into tmp_path/corpus, with a tokenizer at hand."""

    def run(sources: Any, **arguments: Any) -> CorpusInfo:
        given = {"tokenizer": trained_tokenizer, "workers": 1, "heldout_fraction": 0.2}
        out = arguments.pop("out", tmp_path / "corpus")
        return build_corpus(
            sources if isinstance(sources, list) else [sources], out, **(given | arguments)
        )

    return run
