"""`pluglm checkpoint list` and `verify`, through `main` as a person calls them."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from cluster.checks import corpus_fingerprint
from cluster.cli import main
from cluster.config import load_config
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun
from trainer import checkpoint as checkpoints
from trainer.checkpoint import CheckpointState, Written
from trainer.corpus.info import load_corpus_info
from trainer.data.cursor import Cursor

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    corpus = corpus_fingerprint(load_corpus_info(tiny_run.corpus))
    return make_run(tiny_run, tmp_path / "run", corpus)


def make_run(tiny_run: TinyRun, run: Path, fingerprint: str) -> Path:
    """Write what its trainers would have written."""
    run.mkdir()
    shutil.copy(tiny_run.run / "config.toml", run / "config.toml")
    for step in (10, 20):
        state = CheckpointState(
            step=step,
            cursor=Cursor(0, step),
            trainers=2,
            zero_stage=2,
            content_version=Store.open(tiny_run.store).head(),
            encoder_step=step,
            published_step=step,
            corpus_fingerprint=fingerprint,
            settings=tomllib.loads(load_config(run / "config.toml").to_toml()),
        )
        folder = checkpoints.begin(run, step)
        written = Written(files=checkpoints.write_rng(folder, 0), parameters={}, moments=[])
        checkpoints.commit(run, state, {"w": torch.zeros(3)}, [written], keep=5)
    return run


def verified(run: Path, capsys: Capture, *words: str) -> tuple[int, str]:
    code = main(["checkpoint", "verify", str(run), *words])
    return code, capsys.readouterr().out


def rewrite(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new))


def test_a_whole_checkpoint_passes(run: Path, capsys: Capture) -> None:
    code, out = verified(run, capsys)
    assert code == 0
    assert out.startswith("step-00000020: whole;")
    assert verified(run, capsys, "--checkpoint", "step-00000010")[0] == 0


def test_every_damage_is_told(run: Path, capsys: Capture) -> None:
    folder = run / "checkpoints" / "step-00000020"
    (folder / "rng-00000.safetensors").unlink()
    data = bytearray((folder / "key_weights.safetensors").read_bytes())
    data[-2] ^= 4
    (folder / "key_weights.safetensors").write_bytes(data)
    code, out = verified(run, capsys)
    assert code == 1
    assert len(out.splitlines()) == 2
    assert "rng-00000.safetensors is missing" in out
    assert "key_weights.safetensors is damaged: its checksum is" in out
    assert verified(run, capsys, "--checkpoint", "step-00000010")[0] == 0
    code, out = verified(run, capsys, "--json")
    assert len(json.loads(out)["problems"]) == 2


def test_settings_of_another_run_are_told(run: Path, capsys: Capture) -> None:
    rewrite(run, "top_k = 3", "top_k = 4")
    code, out = verified(run, capsys)
    assert code == 1
    assert "memory.top_k = 4" in out


def test_a_corpus_or_a_content_that_is_not_there_is_told(
    run: Path, tiny_run: TinyRun, tmp_path: Path, capsys: Capture
) -> None:
    empty = tmp_path / "another-store"
    shutil.copytree(tiny_run.store, empty)
    head = Store.open(empty).head()
    next((empty / "manifests").glob(f"{head}*")).unlink()
    config = load_config(run / "config.toml", [f"memory.store={empty}"])
    (run / "config.toml").write_text(config.to_toml())
    code, out = verified(run, capsys)
    assert code == 1
    assert f"the memory's content {head} is not to be had" in out
    config = load_config(run / "config.toml", [f"data.corpus={tmp_path / 'nowhere'}"])
    (run / "config.toml").write_text(config.to_toml())
    code, out = verified(run, capsys)
    assert code == 1
    assert "nowhere" in out


def test_the_synthetic_world_has_its_memory_in_the_run(
    tiny_run: TinyRun, tmp_path: Path, capsys: Capture
) -> None:
    """It reads no corpus."""
    run = make_run(tiny_run, tmp_path / "synthetic", "")
    config = load_config(run / "config.toml", [f"data.corpus={tmp_path / 'nowhere'}"])
    (run / "config.toml").write_text(config.to_toml())
    (run / "world").mkdir()
    shutil.copytree(tiny_run.store, run / "world" / "memory")
    assert verified(run, capsys) == (
        0,
        "step-00000020: whole; its settings, corpus and memory are there\n",
    )
    shutil.rmtree(run / "world" / "memory" / "manifests")
    assert verified(run, capsys)[0] == 1


def test_the_list_names_what_can_be_resumed(run: Path, capsys: Capture) -> None:
    (run / "checkpoints" / "step-00000020" / "state.json").write_text("{")
    assert main(["checkpoint", "list", str(run)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step-00000010  ")
    assert "2 trainers, ZeRO-2" in first
    assert second.startswith("step-00000020  not to be resumed from: ")
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["step-00000010", "step-00000020"]
    assert rows[0]["state"]["step"] == 10


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["checkpoint", "verify", str(run), "--checkpoint", "step-7"]) == 1
    assert "it has step-00000010, step-00000020" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path / "nothing")]) == 1
    assert "holds no committed checkpoint" in capsys.readouterr().err
