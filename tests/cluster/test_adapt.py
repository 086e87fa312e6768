"""`pluglm adapt` and `evaluate --domains`: a domain plugged in, read, and taken out again."""

import json
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMForMaskedLM
from tests.cluster.memory_support import Capture, OwnMemory, refusal, run_json
from tests.cluster.tiny_run import TinyRun, save_tiny_model
from tests.trainer.corpus.samples import make_rows, write_json_lines


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    return write_json_lines(tmp_path / "papers.jsonl", make_rows(9, seed=21))


def test_a_domain_is_plugged_in_told_of_and_taken_out(
    own_memory: OwnMemory, tiny_run: TinyRun, papers: Path, capsys: Capture
) -> None:
    before = own_memory.rows()
    place = str(own_memory.path)
    words = ["adapt", place, "--name", "biomed", str(papers), "--model", str(tiny_run.model)]
    assert main(words) == 0
    told = capsys.readouterr().out
    new = {i: row for i, row in own_memory.rows().items() if i not in before}
    tokens = sum(len(row.tokens) for row in new.values())
    assert f"9 passages, {len(new)} entries, {tokens} tokens in " in told
    assert f"{len(new)} encoded by the model" in told
    assert f"to go back: pluglm adapt {place} --name biomed --undo" in told
    assert {row.domain for row in new.values()} == {"biomed"}
    assert next(own_memory.store.log()).message == "adapt to biomed, from papers.jsonl"

    assert main(["adapt", place, "--name", "biomed", "--undo"]) == 0
    assert f"back again: pluglm memory plug {place} biomed" in capsys.readouterr().out
    assert own_memory.rows() == before
    assert main(["memory", "plug", place, "biomed"]) == 0
    assert own_memory.rows() == before | new


def test_what_comes_is_what_memory_plug_makes_of_the_same_text(
    own_memory: OwnMemory, papers: Path, capsys: Capture
) -> None:
    words = ["--name", "biomed", str(papers)]
    planned = run_json(["adapt", str(own_memory.path), *words, "--dry-run"], capsys)
    assert planned["version"] is None
    assert "biomed" not in own_memory.store.manifest().domains()
    done = run_json(["adapt", str(own_memory.path), *words], capsys)
    assert (done["domain"], done["encoded"]) == ("biomed", None)
    assert done["tokens"] == planned["tokens"] > done["added"] == planned["added"] > 0
    first = own_memory.rows()
    own_memory.store.unplug("biomed")
    assert main(["memory", "plug", str(own_memory.path), "biomed", "--from", str(papers)]) == 0

    def said(rows: dict[int, object]) -> list[tuple[object, object]]:
        return [(r.text, r.tokens) for r in rows.values() if r.domain == "biomed"]  # type: ignore[attr-defined]

    assert said(first) == said(own_memory.rows())


def test_a_plugged_domain_is_replaced_only_when_asked(
    own_memory: OwnMemory, papers: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["adapt", str(own_memory.path), "--name", "biomed"]
    assert main([*words, str(papers)]) == 0
    before = own_memory.files()
    said = refusal([*words, str(papers)], capsys)
    assert "has the domain 'biomed' already" in said
    assert "--replace" in said
    assert "--undo" in said
    assert own_memory.files() == before
    rows, head = own_memory.rows(), own_memory.store.head()
    corrected = write_json_lines(tmp_path / "corrected.jsonl", make_rows(2, seed=22))
    assert main([*words, str(corrected), "--replace"]) == 0
    back = f"memory rollback {own_memory.path} {head}"
    assert f"to go back: pluglm {back}" in capsys.readouterr().out
    now = {row.source for row in own_memory.rows().values() if row.domain == "biomed"}
    assert now == {"corrected.jsonl"}
    assert main(back.split()) == 0
    assert own_memory.rows() == rows


def test_a_run_brings_its_own_model(tiny_run: TinyRun, papers: Path, capsys: Capture) -> None:
    planned = run_json(
        ["adapt", str(tiny_run.run), "--name", "biomed", str(papers), "--dry-run"], capsys
    )
    assert planned["encoded"] == planned["added"]


def test_what_cannot_become_a_domain_is_refused_and_nothing_is_written(
    own_memory: OwnMemory,
    tiny_run: TinyRun,
    other_tokenizer: Path,
    papers: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    before = own_memory.files()
    words = ["adapt", str(own_memory.path), "--name", "biomed"]
    (tmp_path / "empty.txt").write_text(" \n\n \n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81" * 20)
    (tmp_path / "table.xls").write_bytes(b"x")
    ready = tmp_path / "ready.jsonl"
    ready.write_text(json.dumps({"tokens": [2, 9999]}), encoding="utf-8")
    save_tiny_model(tmp_path / "short", tokenizer=tiny_run.model, max_position_embeddings=8)
    broken = PlugLMForMaskedLM.from_pretrained(tiny_run.model)
    with torch.no_grad():
        broken.base_model.embeddings.word_embeddings.weight[5:].fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    from trainer.corpus.tokenizer import load_tokenizer

    load_tokenizer(tiny_run.model).save_pretrained(tmp_path / "broken")
    for more, said in (
        ([], "give the domain's text"),
        ([str(tmp_path / "empty.txt")], "empty.txt"),
        ([str(tmp_path / "bytes.txt")], "bytes.txt"),
        ([str(tmp_path / "table.xls")], "table.xls"),
        ([str(ready)], "token id 9999 is not in the vocabulary"),
        ([str(papers), "--tokenizer", str(other_tokenizer)], "was made with the tokenizer of"),
        ([str(papers), "--model", str(other_tokenizer)], "was made with another tokenizer"),
        ([str(papers), "--model", str(tmp_path / "short")], "reads at most 8"),
        ([str(papers), "--undo"], "--undo takes a domain out"),
        (["--undo"], "has no domain 'biomed'; it has default"),
        ([str(papers), "--name", " "], "domain"),
    ):
        assert said in refusal([*words, *more], capsys), said
        assert own_memory.files() == before
    assert "--name" in refusal(["adapt", str(own_memory.path), str(papers)], capsys)
    assert main([*words, str(papers), "--model", str(tmp_path / "broken")]) == 2
    assert "makes keys that hold NaN or infinity" in capsys.readouterr().err
    assert own_memory.files() == before


def test_the_model_makes_the_keys_that_a_memory_of_the_domain_has(
    own_memory: OwnMemory, tiny_run: TinyRun, papers: Path
) -> None:
    """What `adapt` lets through, a memory serves: all entries, by chosen domains."""
    words = ["adapt", str(own_memory.path), "--name", "biomed", str(papers)]
    assert main([*words, "--model", str(tiny_run.model)]) == 0
    model = PlugLMForMaskedLM.from_pretrained(tiny_run.model).eval()
    encoder = KeyEncoderFactory(model.config.to_dict())
    with LocalMemory(
        own_memory.path, encoder=encoder, weights=model.key_weights(), domains=["biomed"]
    ) as memory:
        rows = own_memory.rows()
        biomed = {i for i, row in rows.items() if row.domain == "biomed"}
        assert memory.info().entries == len(biomed)
        found = memory.search(torch.randn(4, 8), len(biomed))
        assert set(found.ids.flatten().tolist()) == biomed


def test_evaluation_reads_the_domains_that_it_is_told(
    own_memory: OwnMemory, tiny_run: TinyRun, papers: Path, capsys: Capture
) -> None:
    def evaluated(*more: str, store: Path = own_memory.path) -> dict[str, object]:
        words = ["evaluate", str(tiny_run.run), "--store", str(store), *more]
        found: dict[str, object] = run_json(words, capsys)
        return found

    general = evaluated()
    assert main(["adapt", str(own_memory.path), "--name", "biomed", str(papers)]) == 0
    head = own_memory.store.head()
    assert evaluated("--domains", "default") == general
    both, alone = evaluated(), evaluated("--domains", "biomed")
    assert evaluated("--domains", "biomed,default") == both
    assert both != general
    # The domain alone is what a memory is that has nothing else.
    assert own_memory.store.head() == head
    own_memory.store.unplug("default")
    assert evaluated() == alone

    words = ["evaluate", str(tiny_run.run), "--store", str(own_memory.path), "--domains"]
    assert "has no domain 'law'; it has biomed" in refusal([*words, "biomed,law"], capsys)
    assert "names a domain twice" in refusal([*words, "biomed,biomed"], capsys)
    assert "names no domain somewhere" in refusal([*words, "biomed,"], capsys)
    few = refusal([*words, "biomed", "-k", "60"], capsys)
    assert "memory.top_k = 60: must be at most" in few
