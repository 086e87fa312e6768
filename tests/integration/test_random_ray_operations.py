"""A memory of actors under random operations while its actors are killed, against a dictionary."""

import random
from pathlib import Path

import pytest
import ray

from memory_server.actors.client import RayMemory
from memory_server.actors.names import NAMESPACE, shard_name
from tests.memory_model import Known, MemoryModel
from tests.ray_fixture import local_ray
from tests.toy_memory import toy_entries, toy_factory, toy_store, toy_weights

SHARDS, REPLICAS = 2, 2
FIRST_WEIGHTS = 1


def run(
    path: Path, *, seed: int, operations: int, kill_weight: float = 0.1, kills: int = 0
) -> dict[str, int]:
    """So many operations, and as many more as it takes until so many actors were killed."""
    first = toy_entries(range(60), seed=seed)
    store = toy_store(path / "s", first)
    name = f"random-{seed}"
    memory = RayMemory.start(
        store.path,
        shards=SHARDS,
        replicas=REPLICAS,
        name=name,
        encoder=toy_factory,
        weights=toy_weights(FIRST_WEIGHTS),
        encoder_step=FIRST_WEIGHTS,
        cpus_per_shard=0.25,
        deadline_s=60.0,
    )

    def kill(choose: random.Random) -> None:
        """Kill an actor, which Ray starts again."""
        actors = [shard_name(name, s, r) for s in range(SHARDS) for r in range(REPLICAS)]
        chosen = choose.choice([name, *actors])
        ray.kill(ray.get_actor(chosen, namespace=NAMESPACE), no_restart=False)

    model = MemoryModel(
        store=store,
        memory=memory,
        restart=None,
        kill=kill,
        choose=random.Random(seed),
        first_weights=FIRST_WEIGHTS,
        kill_weight=kill_weight,
        contents={store.head(): {entry.id: Known(entry, "default") for entry in first}},
    )
    try:
        for _ in range(operations):
            model.step()
        # What is drawn depends on how far refreshes are, so on the machine: at times few die.
        while model.done.get("kill_something", 0) < kills:
            model.step()
    finally:
        memory.close()
    return model.done


@pytest.mark.slow
@pytest.mark.integration
def test_every_reply_is_what_its_epoch_holds_whoever_dies(tmp_path: Path) -> None:
    with local_ray():
        # With those of the memory in one process (test_random_operations.py) there are 20,000.
        done = run(tmp_path, seed=0, operations=1_500, kill_weight=0.7, kills=8)
    assert done["kill_something"] >= 8
    assert done["search"] >= 700


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_long_history_whoever_dies(tmp_path: Path, seed: int) -> None:
    with local_ray():
        run(tmp_path, seed=seed, operations=20_000)
