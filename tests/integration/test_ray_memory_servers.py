"""A memory server outlives who started it, is found by name, and goes on from its state."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from memory_server.actors.client import RayMemory
from memory_server.api import KeyEncoder, KeyEncoderFactory
from memory_server.errors import (
    CoordinatorLost,
    MemoryServerError,
    RefreshFailed,
    StateNotFound,
    UnknownEpoch,
)
from tests.integration.support_ray_memory import memory_actors, refreshed
from tests.ray_fixture import local_ray
from tests.toy_memory import (
    expected_ids,
    toy_entries,
    toy_factory,
    toy_queries,
    toy_store,
    toy_weights,
)

pytestmark = pytest.mark.integration

ENTRIES = toy_entries(range(60))
SETTINGS = {"shards": 2, "encoder": toy_factory, "cpus_per_shard": 0.25}
SERVE = """
import sys, ray
from memory_server.actors.client import RayMemory
from tests.toy_memory import toy_factory, toy_weights
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
memory = RayMemory.serve(
    sys.argv[2], shards=2, encoder=toy_factory, weights=toy_weights(1), encoder_step=11,
    name="kept", cpus_per_shard=0.25,
)
memory.close()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_ray():
        yield ray.get_runtime_context().gcs_address


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return toy_store(tmp_path / "store", ENTRIES).path


def broken_factory() -> KeyEncoderFactory:
    def broken(weights: object) -> KeyEncoder:
        raise ValueError("cannot encode")

    return broken


def answers_with(memory: RayMemory, seed: int) -> bool:
    queries = toy_queries(3)
    wanted = expected_ids(ENTRIES, toy_weights(seed), queries, 6)
    return memory.search(queries, 6).ids.tolist() == wanted


def test_a_server_outlives_the_process_that_started_it(address: str, store_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", SERVE, address, str(store_path)],
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    (found,) = RayMemory.list_servers()
    assert (found.name, found.state, found.detached, found.entries) == ("kept", "serving", True, 60)
    assert (found.store_path, found.encoder_step) == (str(store_path), 11)

    first, second = RayMemory.attach("kept"), RayMemory.attach("kept")
    assert answers_with(first, 1)
    old = first.info().epoch
    new = refreshed(first, encoder_step=20, weights=toy_weights(2))
    assert answers_with(second, 2)
    assert second.info().epoch == new
    first.close()  # an attached client only lets go
    assert answers_with(second, 2)
    with pytest.raises(MemoryServerError, match="already"):
        RayMemory.serve(store_path, name="kept", weights=toy_weights(1), **SETTINGS)
    assert answers_with(second, 2)

    # What proves who belongs to this memory is for its owner's eyes.
    state = Path(found.state_dir or "")
    assert state == store_path / "servers" / "kept"
    assert stat.S_IMODE((state / "secret").stat().st_mode) == 0o600
    second.release(old)
    assert [file.name for file in (state / "weights").iterdir()] == ["2.safetensors"]

    RayMemory.shut_down("kept")
    assert memory_actors() == []
    assert RayMemory.list_servers() == []
    with pytest.raises(CoordinatorLost, match="kept"):
        RayMemory.attach("kept")
    second.close()

    # Nobody has the weights any more but the state directory: a start that fails leaves it alone.
    book = (state / "book.json").read_bytes()
    broken = {**SETTINGS, "encoder": broken_factory()}
    with pytest.raises(RefreshFailed, match="cannot encode"):
        RayMemory.serve(store_path, name="kept", weights=None, **broken)
    assert memory_actors() == []
    assert (state / "book.json").read_bytes() == book
    assert [file.name for file in (state / "weights").iterdir()] == ["2.safetensors"]
    again = RayMemory.serve(store_path, name="kept", weights=None, **SETTINGS)
    assert answers_with(again, 2)
    info = again.info()
    assert info.encoder_step == 20
    assert info.epoch > new  # no reader of an epoch that is gone gets another one's answer
    with pytest.raises(UnknownEpoch):
        again.search(toy_queries(1), 1, epoch=new)
    RayMemory.shut_down("kept", forget=True)
    assert not state.exists()


def test_what_cannot_be_served_is_refused(address: str, store_path: Path, tmp_path: Path) -> None:
    with pytest.raises(StateNotFound, match="start the memory with weights"):
        RayMemory.serve(store_path, name="new", weights=None, **SETTINGS)
    with pytest.raises(CoordinatorLost, match="nobody"):
        RayMemory.shut_down("nobody")
    for name in ("", "a/b", ".hidden", "x-shard-1-0"):
        with pytest.raises(ValueError, match="name="):
            RayMemory.start(store_path, name=name, weights=toy_weights(1), **SETTINGS)
    for bad in ({"replicas": 0}, {"placement": "scatter"}, {"memory_limit_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RayMemory.start(store_path, name="bad", weights=toy_weights(1), **SETTINGS, **bad)
    with pytest.raises(ValueError, match="unobtainium"):
        RayMemory.start(
            store_path,
            name="bad",
            weights=toy_weights(1),
            resources_per_shard={"unobtainium": 1.0},
            **SETTINGS,
        )
    with pytest.raises(ValueError, match="fan_in"):
        RayMemory.start(store_path, name="bad", weights=toy_weights(1), fan_in=0, **SETTINGS)
    state = tmp_path / "state"
    settings = {**SETTINGS, "weights": toy_weights(1), "state_dir": state}
    with (
        RayMemory.start(store_path, name="one", **settings),
        # Two coordinators must never write one book.
        pytest.raises(MemoryServerError, match="another memory"),
    ):
        RayMemory.start(store_path, name="two", **settings)
    assert memory_actors() == []
    assert not state.exists()
