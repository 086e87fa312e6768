"""A memory under tens of thousands of random operations, against a plain dictionary."""

import random
from pathlib import Path
from typing import BinaryIO

import pytest

from memory_server.api import Memory
from memory_server.index.base import IndexSettings
from memory_server.local import LocalMemory
from memory_server.store.files import Files
from tests.memory_model import Known, MemoryModel
from tests.toy_memory import (
    empty_store,
    toy_entries,
    toy_factory,
    toy_weights,
    write_toy_segment,
)

FIRST_WEIGHTS = 1


class Unsynced(Files):
    """Thousands of commits need not survive a loss of power."""

    def sync(self, handle: BinaryIO) -> None:
        handle.flush()

    def sync_directory(self, directory: Path) -> None:
        pass


def run(path: Path, *, seed: int, operations: int, index: IndexSettings) -> dict[str, int]:
    first = toy_entries(range(60), seed=seed)
    store = empty_store(path / "s", files=Unsynced())
    store.commit(add_segments=[write_toy_segment(store, "first", first)], message="first")
    started: list[LocalMemory] = []

    def start(weights: int) -> Memory:
        for memory in started:
            memory.close()
        memory = LocalMemory(
            store,
            encoder=toy_factory,
            weights=toy_weights(weights),
            encoder_step=weights,
            index=index,
        )
        started.append(memory)
        return memory

    model = MemoryModel(
        store=store,
        memory=start(FIRST_WEIGHTS),
        restart=start,
        kill=None,
        choose=random.Random(seed),
        first_weights=FIRST_WEIGHTS,
        contents={store.head(): {entry.id: Known(entry, "default") for entry in first}},
    )
    for _ in range(operations):
        model.step()
    started[-1].close()
    return model.done


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_reply_is_what_its_epoch_holds(tmp_path: Path, dtype: str) -> None:
    done = run(
        tmp_path,
        seed=0 if dtype == "float32" else 1,
        operations=18_500 if dtype == "float32" else 1_000,
        index=IndexSettings(key_dtype=dtype),  # type: ignore[arg-type]
    )
    assert sum(done.values()) == (18_500 if dtype == "float32" else 1_000)
    for name in ("search", "add", "update", "remove", "swap", "refresh"):
        assert done[name] > 0, name
    # Of what is rare, nothing was left out by chance.
    assert dtype == "int8" or done["restart_memory"] > 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_long_history(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed=seed, operations=50_000, index=IndexSettings())
