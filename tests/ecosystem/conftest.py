"""The world of colours, made once: a model that reads its memory, and its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_server.store.store import Store
from tests.ecosystem.colours import make_model, make_store, make_tokenizer, train_to_read


@pytest.fixture(scope="session")
def reader_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked-LM model that finds a noun's fact in its memory and copies the colour."""
    torch.manual_seed(0)
    model = make_model()
    train_to_read(model)
    path = tmp_path_factory.mktemp("colours") / "reader"
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


@pytest.fixture
def quiet() -> Any:
    """A masked-LM model, untrained, that knows it has no memory."""
    model = make_model()
    model.attach(None)
    return model
