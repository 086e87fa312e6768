"""What `pluglm pretrain` refuses before it starts anything: one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import ray

from cluster.cli import main
from tests.integration.support_pretrain import make_corpus, write_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and one whose tokenizer was trained on other text."""
    home = tmp_path_factory.mktemp("refusals")
    return make_corpus(home), make_corpus(home, seed=1, documents=40)


@pytest.fixture
def config(tmp_path: Path, corpora: tuple[Path, Path]) -> Path:
    return write_config(tmp_path, corpora[0])


def refusal(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a refused run, which must have left no trace."""
    code = main(["pretrain", str(config), *words])
    said = capsys.readouterr()
    assert code in (1, 2), said.err
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("pluglm: error: ")
    assert not ray.is_initialized()
    run_dir = config.with_suffix("")
    # The lock of a run that had nothing else to lose is no trace: the next one takes it.
    assert [path.name for path in run_dir.glob("*") if path.name != ".lock"] == []
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["memory.top_k=900000"], ["memory.top_k = 900000", "at most", "entries"]),
        (["memory.shards=900000"], ["memory.shards = 900000", "at most", "entries"]),
        (["memory.topk=5"], ["memory.topk", "memory.top_k"]),
        (["runtime.zero_stage=4"], ["runtime.zero_stage = 4", "3"]),
        (["optim.batch_size=9"], ["optim.batch_size = 9", "multiple", "8"]),
        (["runtime.micro_batch_size=3"], ["runtime.micro_batch_size = 3", "divide"]),
        (["model.max_positions=16"], ["model.max_positions = 16", "at least 33"]),
        (["model.num_heads=5"], ["model.num_heads = 5", "divide"]),
        (["model.init_from=/nowhere"], ["model.init_from = /nowhere", "config.json"]),
        (["data.corpus=/nowhere"], ["/nowhere", "pluglm corpus build"]),
        (['data.more_corpora=["/elsewhere"]'], ["/elsewhere", "pluglm corpus build"]),
        (['data.more_corpora=["a","a"]'], ["data.more_corpora", '"a" is', "given twice"]),
        (
            ["data.weights=[1.0,2.0]"],
            ["data.weights = [1.0, 2.0]", "each of the 1 corpora"],
        ),
        (["data.phase_lengths=[9,0]"], ["data.phase_steps = []", "one fewer"]),
        (["data.phase_lengths=[4]"], ["data.phase_lengths = [4]", "at least 8"]),
        (["data.phase_lengths=[9,12,0]", "data.phase_steps=[5,5]"], ["phase_steps", "must rise"]),
        (["optim.batch_tokens=100"], ["optim.batch_tokens = 100", "at least 132", "33 tokens"]),
        (["memory.store=/nowhere"], ["/nowhere"]),
        (["runtime.deepspeed_config=/nowhere.json"], ["/nowhere.json", "cannot be read"]),
        (["--resume"], ["no committed checkpoint", "without --resume"]),
    ],
)
def test_impossible_settings(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: list[str]
) -> None:
    line = refusal(config, capsys, *words)
    assert all(part in line for part in says), line


def test_a_memory_of_another_tokenizer(
    config: Path, corpora: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = corpora[1] / "memory"
    line = refusal(config, capsys, f"memory.store={foreign}")
    assert str(foreign) in line
    assert "tokenizer" in line


@pytest.mark.parametrize("folder", ["sequences", "heldout"])
def test_a_truncated_sequence_file_is_named(
    config: Path,
    corpora: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpora[0], copy)
    (part,) = (copy / folder).glob("*.arrow")
    os.truncate(part, part.stat().st_size // 2)
    line = refusal(config, capsys, f"data.corpus={copy}")
    assert str(part) in line
    assert "build the corpus again" in line


def test_a_second_corpus_of_another_tokenizer(
    config: Path, corpora: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(config, capsys, f'data.more_corpora=["{corpora[1]}"]')
    assert str(corpora[1]) in line
    assert f"--tokenizer {corpora[0] / 'tokenizer'}" in line


def test_an_unfinished_corpus(
    config: Path, corpora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpora[0], copy)
    (copy / "corpus.json").unlink()
    assert str(copy) in refusal(config, capsys, f"data.corpus={copy}")


def test_a_corpus_without_held_out_text(
    config: Path, corpora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpora[0], copy)
    manifest = json.loads((copy / "corpus.json").read_text())
    manifest["heldout_sequences"] = manifest["heldout_documents"] = 0
    (copy / "corpus.json").write_text(json.dumps(manifest))
    line = refusal(config, capsys, f"data.corpus={copy}")
    assert "--heldout-fraction" in line


def test_no_ray_at_the_address_is_said_at_once(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert main(["pretrain", str(config), f"cluster.address={address}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert address in line
    assert "ray start --head" in line
    assert not ray.is_initialized()
