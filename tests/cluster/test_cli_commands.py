"""The commands on a small corpus and run, through `main` as a person calls them."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cluster.cli import main
from cluster.config import PretrainConfig, load_config
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun, save_tiny_model
from tests.trainer.corpus.samples import make_rows, write_json_lines
from trainer.corpus.info import load_corpus_info

Capture = pytest.CaptureFixture[str]


def error_of(words: list[str], capsys: Capture) -> str:
    """The one line of a refusal."""
    assert main(words) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("pluglm: error: ")
    assert not any("Traceback" in line for line in err)
    return err[-1]


def test_corpus_build_makes_what_it_was_asked_for_and_says_so(
    tmp_path: Path, capsys: Capture
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"body": row["text"], "name": row["title"]} for row in make_rows(30)]
    write_json_lines(source, rows)
    out = tmp_path / "corpus"
    words = ["corpus", "build", str(source), "--out", str(out), "--tokenizer", "train:300"]
    words += ["--sequence-length", "20", "--entry-tokens", "10", "--heldout-fraction", "0.5"]
    words += ["--text-field", "body", "--title-field", "name", "--title-in-entry"]
    words += ["--workers", "1", "--limit-documents", "25"]
    assert main(words) == 0
    printed, progress = capsys.readouterr()
    info = load_corpus_info(out)
    assert (info.sequence_length, info.entry_tokens, info.documents) == (20, 10, 25)
    assert info.arguments["title_in_entry"] is True
    assert info.arguments["heldout_fraction"] == 0.5
    assert f"{info.sequences:,} of up to 20 tokens" in printed
    assert f"data.corpus={out}" in printed
    assert "corpus: encoding" in progress

    assert main(words) == 0
    assert main(["corpus", "info", str(out)]) == 0
    assert info.tokenizer_fingerprint in capsys.readouterr().out

    words[words.index("20")] = "22"
    assert "--overwrite" in error_of(words, capsys)
    assert main([*words, "--overwrite"]) == 0
    assert load_corpus_info(out).sequence_length == 22


def test_memory_info_tells_what_a_store_holds(tiny_run: TinyRun, capsys: Capture) -> None:
    store = Store.open(tiny_run.store)
    for path in (tiny_run.store, tiny_run.corpus, tiny_run.run):
        assert main(["memory", "info", str(path), "--verify"]) == 0
        shown = capsys.readouterr().out
        assert f"entries     {store.manifest().entries}\n" in shown
        assert store.meta.tokenizer_fingerprint in shown
        assert store.head() in shown
        assert "verified" in shown


def test_a_damaged_segment_is_named(tiny_run: TinyRun, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    copy = shutil.copytree(tiny_run.store, tmp_path / "store")
    (segment,) = (copy / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    assert main(["memory", "info", str(copy), "--verify"]) == 1
    assert segment.name in capsys.readouterr().err


def test_memory_search_prints_a_table_of_the_runs_own_memory(
    tiny_run: TinyRun, capsys: Capture
) -> None:
    assert main(["memory", "search", str(tiny_run.run), "ancient [MASK] king", "-k", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "title", "source", "text"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert all("Title " in line and "articles.jsonl" in line for line in lines[1:])


def test_memory_search_prints_json_for_a_store_and_a_model(
    tiny_run: TinyRun, capsys: Capture
) -> None:
    words = ["memory", "search", str(tiny_run.store), "ancient king", "--json"]
    words += ["--model", str(tiny_run.model), "-k", "3"]
    assert main(words) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert set(hits[0]) == {"rank", "score", "id", "doc_id", "title", "source", "text"}

    assert main([*words, "--exclude-document", str(hits[0]["doc_id"])]) == 0
    others = json.loads(capsys.readouterr().out)
    assert hits[0]["doc_id"] not in {hit["doc_id"] for hit in others}


def test_memory_search_refuses_what_does_not_fit(
    tiny_run: TinyRun, other_tokenizer: Path, capsys: Capture
) -> None:
    store = ["memory", "search", str(tiny_run.store)]
    assert "--model is needed" in error_of([*store, "king"], capsys)
    assert "no model at" in error_of([*store, "king", "--model", "/no/model"], capsys)
    assert "another tokenizer" in error_of(
        [*store, "king", "--model", str(other_tokenizer)], capsys
    )
    run = ["memory", "search", str(tiny_run.run)]
    assert "must be from 1 to" in error_of([*run, "king", "-k", "9999"], capsys)
    assert "no tokens" in error_of([*run, " "], capsys)


def test_a_run_that_has_not_finished_has_no_model(
    tiny_run: TinyRun, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text((tiny_run.run / "config.toml").read_text())
    for words in (["memory", "search", str(run), "king"], ["evaluate", str(run)]):
        assert "when training is complete" in error_of(words, capsys)


def test_the_directory_above_a_run_is_refused_with_the_run_named(
    tiny_run: TinyRun, capsys: Capture
) -> None:
    above = str(tiny_run.run.parent)
    for words in (["memory", "info", above], ["evaluate", above], ["report", above]):
        assert f"did you mean {tiny_run.run}?" in error_of(words, capsys)


def test_evaluate_measures_a_run_with_its_own_settings(tiny_run: TinyRun, capsys: Capture) -> None:
    assert main(["evaluate", str(tiny_run.run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 entries per sequence" in lines[0]
    text = "\n".join(lines)
    for words in ("own entry in the memory", "own document left out", "shuffled", "no memory"):
        assert words in text


def test_evaluate_without_a_run_says_the_same_with_the_same_settings(
    tiny_run: TinyRun, capsys: Capture
) -> None:
    assert main(["evaluate", str(tiny_run.run), "--json", "--sequences", "6", "-k", "2"]) == 0
    of_the_run = json.loads(capsys.readouterr().out)
    words = ["evaluate", "--model", str(tiny_run.model), "--corpus", str(tiny_run.corpus)]
    words += ["--sequences", "6", "-k", "2", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == of_the_run
    assert main([*words, "--store", str(tiny_run.store)]) == 0
    assert json.loads(capsys.readouterr().out) == of_the_run
    assert of_the_run["k"] == 2
    assert {case["name"] for case in of_the_run["cases"]} == {
        "own entry in the memory",
        "own document left out",
    }

    assert main([*words, "--set", "evaluate.mask_probability=0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] > of_the_run["masks"]


def test_evaluate_refuses_what_does_not_fit(
    tiny_run: TinyRun, other_tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, corpus = str(tiny_run.run), ["--corpus", str(tiny_run.corpus)]
    assert "another tokenizer" in error_of(
        ["evaluate", "--model", str(other_tokenizer), *corpus], capsys
    )
    assert "memory.top_k = 9999: must be at most" in error_of(
        ["evaluate", run, "-k", "9999"], capsys
    )
    assert "no memory store" in error_of(["evaluate", run, "--store", str(tmp_path)], capsys)
    assert "did you mean" in error_of(["evaluate", run, "--set", "memory.topk=3"], capsys)
    save_tiny_model(
        tmp_path / "short", tokenizer=tiny_run.corpus / "tokenizer", max_position_embeddings=20
    )
    short = ["evaluate", run, "--model", str(tmp_path / "short")]
    assert "must be at least 24" in error_of(short, capsys)


def test_report_writes_the_page_of_an_unfinished_run(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 3.0}\n')
    assert main(["report", str(tmp_path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "report.html"
    assert "<html" in path.read_text(encoding="utf-8")


def test_pretrain_check_prints_a_configuration_that_loads_back_equal(
    tiny_run: TinyRun, tmp_path: Path, capsys: Capture
) -> None:
    path = tiny_run.run / "config.toml"
    # Options may stand between the overrides.
    words = ["pretrain", str(path), "memory.top_k=8", "--check", "optim.steps=9"]
    assert main(words) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(path, ["memory.top_k=8", "optim.steps=9"])
    assert "did you mean memory.top_k?" in error_of([*words, "memory.top_kk=1"], capsys)


def test_pretrain_hands_on_configuration_resume_and_exit_code(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[PretrainConfig, bool, bool]] = []

    def pretrain(config: PretrainConfig, *, resume: bool, auto_resume: bool) -> int:
        seen.append((config, resume, auto_resume))
        return 75

    module = ModuleType("cluster.pretrain")
    module.pretrain = pretrain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cluster.pretrain", module)
    path = tiny_run.run / "config.toml"
    assert main(["pretrain", str(path), "--resume", "optim.steps=9"]) == 75
    assert main(["pretrain", str(path)]) == 75
    assert main(["pretrain", str(path), "--auto-resume"]) == 75
    config = load_config(path)
    assert seen == [
        (load_config(path, ["optim.steps=9"]), True, False),
        (config, False, False),
        (config, False, True),
    ]
