"""`pluglm memory serve|cancel` without a Ray: what is refused before one is reached, and cancelling
on a memory of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster import memory_servers
from cluster.cli import main
from cluster.cli.memory_serve import CANCEL, SERVE, _settings
from cluster.trained_model import load_trained_model
from memory_server.errors import UnknownEpoch
from memory_server.local import LocalMemory
from tests.cluster.memory_support import Capture, OwnMemory, refusal
from tests.cluster.tiny_run import TinyRun

BAD = [
    (["--name", ""], "cannot name a memory server"),
    (["--name", "../up"], "cannot name a memory server"),
    (["--name", "a b"], "cannot name a memory server"),
    (["--name", "wiki-shard-0-0"], "cannot name a memory server"),
    (["--gpus-per-shard", "-1"], "gpus_per_shard=-1"),
    (["--gpus-per-shard", "nan"], "gpus_per_shard=nan"),
    (["--gpus-per-shard", "inf"], "gpus_per_shard=inf"),
    (["--gpus-per-shard", "1.5"], "gpus_per_shard=1.5"),
    (["--index", "nonsense"], "nonsense"),
    (["--min-recall", "2"], "min_recall=2.0"),
    (["--deadline", "0"], "'0' is no number above 0"),
    (["--deadline", "nan"], "'nan' is no number above 0"),
    (["--audit-every", "-3"], "'-3' is no number above 0"),
    (["--memory-limit-gib", "lots"], "'lots' is no number above 0"),
    (["--queue-limit", "0"], "'0' is not a whole number of 1 or more"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_settings_are_refused_before_a_ray_is_reached(
    own_memory: OwnMemory,
    tiny_run: TinyRun,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    def reached(address: str) -> None:
        raise AssertionError(f"{address} was reached")

    monkeypatch.setattr(memory_servers, "joined_ray", reached)
    line = ["memory", "serve", str(own_memory.path), "--model", str(tiny_run.model)]
    named = [] if "--name" in words else ["--name", "tiny"]
    assert said in refusal([*line, *named, *words], capsys)


def test_settings_are_what_was_given() -> None:
    words = "runs/first --name wiki --deadline 5 --queue-limit 9 --memory-limit-gib 1.5"
    words += " --audit-every 7 --min-recall 0.5 --gpus-per-shard 0.5"
    settings = _settings(SERVE.parser().parse_args(words.split()))
    assert (settings.deadline_s, settings.queue_limit) == (5.0, 9)
    assert settings.memory_limit_bytes == 3 * 2**29
    assert (settings.index.audit_every_s, settings.index.min_recall) == (7.0, 0.5)
    assert settings.gpus_per_shard == 0.5
    plain = _settings(SERVE.parser().parse_args(["runs/first", "--name", "wiki"]))
    assert plain.memory_limit_bytes is None


def test_cancel_takes_a_name_and_a_number(capsys: Capture) -> None:
    options = CANCEL.parser().parse_args(["wiki", "7", "--address", "head:6379"])
    assert (options.name, options.epoch, options.address) == ("wiki", 7, "head:6379")
    for words in (["wiki"], ["wiki", "-1"], ["wiki", "newest"]):
        refusal(["memory", "cancel", *words], capsys)


def test_a_staged_epoch_is_given_up_and_the_live_one_stays(
    own_memory: OwnMemory, tiny_run: TinyRun, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load_trained_model(tiny_run.model).memory(own_memory.path) as memory:

        @contextmanager
        def attached(name: str, address: str) -> Iterator[LocalMemory]:
            yield memory

        monkeypatch.setattr(memory_servers, "attached", attached)
        live = memory.info().epoch
        assert main(["memory", "add", str(own_memory.path), "--text", "a king"]) == 0
        epoch = memory.stage(encoder_step=0, content_version=own_memory.store.head())
        assert main(["memory", "cancel", "tiny", str(epoch)]) == 0
        assert f"goes on answering from epoch {live}" in capsys.readouterr().out
        with pytest.raises(UnknownEpoch):
            memory.staging(epoch)
        assert memory.info().epoch == live
        assert "is the one that answers" in refusal(["memory", "cancel", "tiny", str(live)], capsys)
        refusal(["memory", "cancel", "tiny", str(epoch)], capsys, code=1)
        refusal(["memory", "cancel", "tiny", "99"], capsys, code=1)
        assert memory.info().epoch == live


def test_why_an_epoch_failed_is_said_once(
    own_memory: OwnMemory,
    tiny_run: TinyRun,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no keys today")

    monkeypatch.setattr("memory_server.shard.shard.Shard._build", fails)
    line = ["memory", "search", str(own_memory.path), "a king", "--model", str(tiny_run.model)]
    assert main(line) == 1
    said = capsys.readouterr().err + "".join(
        f"{record.getMessage()}\n" for record in caplog.records
    )
    assert said.count("no keys today") == 1
