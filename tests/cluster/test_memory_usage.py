"""What is told of a memory's use is what the model's own retrievals add up to."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.cli.memory_usage import describe_usage
from cluster.config import load_config
from cluster.evaluate import memory_usage
from cluster.trained_model import load_trained_model
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun, make_tiny_run
from trainer.report.page import write_report
from trainer.task import CorpusTask
from trainer.usage import usage_report

K = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("used"))


def test_counts_and_entropy_are_the_retrievals_own(run: TinyRun) -> None:
    config = load_config(run.run / "config.toml")
    told = memory_usage(config, run.model)
    trained = load_trained_model(run.model)
    counts: dict[int, Counter[int]] = {}
    entropies: dict[int, list[float]] = {}
    with trained.memory(run.store) as memory, torch.no_grad():
        entries = memory.info().entries
        for batch in CorpusTask(config.data.corpus, run.store).heldout(config):
            output = trained.model(
                batch.input_ids,
                batch.attention_mask,
                lookup=lambda q: memory.search(q, K),
                output_attention=True,
            )
            for found in output.retrievals:
                counts.setdefault(found.layer, Counter()).update(
                    found.retrieved.ids.flatten().tolist()
                )
                for row, mask in zip(found.attention_BATK, batch.attention_mask, strict=True):
                    shares = row[:, mask.bool()].mean((0, 1))
                    entropy = float(-(shares * shares.log()).sum()) / torch.tensor(K).log()
                    entropies.setdefault(found.layer, []).append(float(entropy))
    assert told["entries"] == entries
    assert told["sequences"] == 12
    for layer in told["layers"]:
        of_layer = counts[layer["layer"]]
        assert layer["used"] == len(of_layer)
        assert layer["never_used_share"] == pytest.approx(1 - len(of_layer) / entries)
        mean = sum(entropies[layer["layer"]]) / 12
        assert layer["attention_entropy"] == pytest.approx(mean, abs=1e-4)
    total = sum(counts.values(), Counter())
    assert told["most_used"][0]["times"] == max(total.values())
    assert sum(one["entries"] for one in told["times_read"]) == len(total)
    assert told["by_domain"] == {"default": 1.0}


def test_entries_that_are_nearly_the_same_are_found(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    config = load_config(run.run / "config.toml")
    read = memory_usage(config, run.model)["most_used"][0]
    trained, store = load_trained_model(run.model), Store.open(run.store)
    with trained.memory(run.store) as memory:
        (entry,) = memory.entries([read["id"]])
    copied = store.incoming / "copy.arrow"
    write_segment(
        copied,
        ids=[7],
        doc_ids=[7],
        tokens_NS=torch.tensor([entry.tokens]).numpy(),
        texts=["a copy"],
        titles=["copied"],
        sources=["copy"],
        meta=store.meta,
    )
    store.commit(add_segments=[copied], message="the same once more")
    told = memory_usage(config, run.model)
    assert told["alike"][0]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert {e["id"] for e in told["alike"][0]["entries"]} == {7, entry.id}
    assert set(told["by_source"]) > {"copy"}
    # By their ids `pluglm memory remove` takes them out.
    shown = describe_usage(told).split("nearly the same")[1].split()
    assert {"7", str(entry.id)} <= set(shown)


def test_an_empty_text_reads_nothing(run: TinyRun) -> None:
    trained = load_trained_model(run.model)
    with trained.memory(run.store) as memory:
        told = usage_report(trained.model, memory, iter(()), k=K)
    assert (told["sequences"], told["layers"], told["most_used"], told["alike"]) == (0, [], [], [])


def test_the_command_and_the_reports_section(
    run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", "usage", str(run.run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (run.run / "usage.json").write_text(json.dumps(told), encoding="utf-8")
    page = write_report(run.run).read_text(encoding="utf-8")
    assert "How the memory is used" in page
    assert "12 held-out sequences read 3 entries each" in page
    assert main(["memory", "usage", str(run.run), "--sequences", "4"]) == 0
    assert "4 held-out sequences read 3 entries each" in capsys.readouterr().out
    (run.run / "usage.json").write_text('{"layers": "nonsense"}', encoding="utf-8")
    assert "How the memory is used" in write_report(run.run).read_text(encoding="utf-8")


def test_a_run_without_held_out_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_tiny_run(tmp_path).run
    world = run / "world" / "memory"
    world.mkdir(parents=True)
    (world / "store.json").write_text("{}")
    for words in (["memory", "usage", str(run)], ["evaluate", str(run)]):
        assert main(words) == 2
        assert "was trained on invented facts and has no held-out text" in capsys.readouterr().err
