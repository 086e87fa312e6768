"""One tiny corpus and run for all tests of the command."""

from pathlib import Path

import pytest

from tests.cluster.memory_support import OwnMemory, copied
from tests.cluster.tiny_run import TinyRun, make_tiny_run, save_tiny_model
from tests.trainer.corpus.samples import make_rows, write_json_lines
from trainer.corpus.build import build_corpus


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Shared by all tests, which must leave it as it is."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny-run"))


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    """A model like the run's, whose tokenizer was trained on another text."""
    text = write_json_lines(tmp_path / "other.jsonl", make_rows(30, seed=9))
    info = build_corpus([text], tmp_path / "other", tokenizer="train:260", workers=1)
    save_tiny_model(tmp_path / "other-model", tokenizer=info.tokenizer_path)
    return tmp_path / "other-model"


@pytest.fixture
def own_memory(tiny_run: TinyRun, tmp_path: Path) -> OwnMemory:
    """The tiny run's memory, to be changed."""
    return copied(tiny_run, tmp_path / "corpus")
