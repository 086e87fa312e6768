"""Training on a memory server: it is found by name, edited under the run, and outlives it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster import checks
from cluster.config import load_config
from memory_server.actors.client import RayMemory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from memory_server.switch import show_content
from model import KeyEncoderFactory
from tests.integration.support_pretrain import (
    COMMAND,
    REPOSITORY,
    make_corpus,
    pretraining,
    read_lines,
    write_config,
)
from tests.ray_fixture import local_ray
from trainer.build import build_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SERVER = "shared"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("served-corpus"))


@pytest.fixture(scope="module")
def server(corpus: Path) -> Iterator[Store]:
    """The corpus's memory, served with the keys of weights that no run has."""
    config = load_config(str(write_config(corpus.parent, corpus, name="first")), [])
    source = checks.corpus_source(config)
    shape = checks.check_model(config, source)
    with local_ray(8):
        RayMemory.serve(
            source.store,
            shards=2,
            encoder=KeyEncoderFactory(shape.to_dict()),
            weights=build_model(shape, seed=99).key_weights(),
            encoder_step=1000,
            name=SERVER,
            cpus_per_shard=0.5,
        ).close()
        yield Store.open(source.store)
        RayMemory.shut_down(SERVER)


def joining(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a command must be told to join this test's Ray, and no other on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return [f"memory.server={SERVER}", f"cluster.address={ray.get_runtime_context().gcs_address}"]


def add_entry(store: Store, entry_id: int) -> str:
    tokens = np.zeros((1, store.meta.entry_tokens), dtype=np.int64)
    tokens[0, :3] = 5, 6, 7
    path = store.incoming / f"{entry_id}.arrow"
    write_segment(
        path,
        ids=[entry_id],
        doc_ids=[entry_id],
        tokens_NS=tokens,
        texts=["new"],
        titles=[""],
        sources=[""],
        meta=store.meta,
    )
    return store.commit(add_segments=[path], message="while a run trains")


def test_a_run_trains_on_a_server_that_is_edited_meanwhile(
    server: Store, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*joining(monkeypatch), "optim.steps=400", "memory.refresh_every_steps=100"]
    with RayMemory.attach(SERVER) as memory:
        with pretraining(write_config(tmp_path, corpus), *words) as run:
            run.wait_for_step(20)
            assert memory.info().encoder_step < 1000, "the run's own weights make the keys"
            version = add_entry(server, 900_001)
            show_content(memory, version)
            assert memory.entries([900_001])[0].text == "new"
            run.wait_until(
                lambda: any("was edited" in line["message"] for line in run.lines("event")),
                what="the edit, seen by the trainers",
            )
            ended = run.end()
        assert ended.code == 0, ended.stderr
        told = [line["message"] for line in run.lines("event") if "was edited" in line["message"]]
        assert told == [f"the memory was edited: content {version} from here on"]
        info = memory.info()
        assert (info.content_version, info.encoder_step) == (version, 400)
        assert len(memory.held()) == 1, "nothing that the run staged is left"
        assert memory.entries([900_001])[0].text == "new"


def test_a_server_of_another_store_is_refused(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_corpus(tmp_path, seed=1)
    with pretraining(write_config(tmp_path, other), *joining(monkeypatch)) as run:
        ended = run.end()
    assert ended.code == 2
    assert "it serves the store" in ended.error_line
    with RayMemory.attach(SERVER) as memory:
        assert memory.info().entries > 0


def test_a_server_that_is_not_there_is_said_by_name(
    server: Store, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*joining(monkeypatch), "memory.server=nobody"]
    with pretraining(write_config(tmp_path, corpus), *words) as run:
        ended = run.end()
    assert ended.code == 1
    assert "nobody" in ended.error_line


def test_torchrun_trains_beside_the_server(
    server: Store, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*joining(monkeypatch), "optim.steps=30", "checkpoint.every_steps=10"]
    config = write_config(tmp_path, corpus)
    run_dir = config.with_suffix("")
    doctor = ["doctor", str(config), *words, "--address", words[1].split("=")[1]]
    looked = subprocess.run([*COMMAND, *doctor], cwd=REPOSITORY, capture_output=True, text=True)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert "Ray has 8 CPUs" in looked.stdout
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "0", "-m", "cluster.torchrun"]
    for _ in range(2):  # the second one goes on, and has only to evaluate
        done = subprocess.run(
            [*torchrun, str(config), *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(run_dir, "train")] == list(range(1, 31))
    assert (run_dir / "report.html").exists()
    with RayMemory.attach(SERVER) as memory:
        assert memory.info().encoder_step == 30
