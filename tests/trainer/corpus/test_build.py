"""What a finished corpus holds: every token in one entry, the exact text, and nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.trainer.corpus.samples import (
    Build,
    contents,
    make_rows,
    open_corpus,
    write_json_lines,
)
from trainer.corpus.build import build_corpus
from trainer.corpus.errors import CorpusError
from trainer.corpus.info import load_corpus_info
from trainer.corpus.progress import BuildProgress, ProgressBar
from trainer.corpus.tokenizer import tokenizer_fingerprint

TEXTS = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=80)
    | st.lists(st.sampled_from(["river", "Café", "unbelievable", "x1-y", "東京"]), max_size=30).map(
        " ".join
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, entry_tokens=st.integers(2, 9), sequence_length=st.integers(3, 12))
def test_every_token_of_every_document_is_in_exactly_one_entry(
    tmp_path_factory: pytest.TempPathFactory,
    trained_tokenizer: str,
    texts: list[str],
    entry_tokens: int,
    sequence_length: int,
) -> None:
    home = tmp_path_factory.mktemp("property")
    texts = [*texts, "the river and the city"]  # a corpus without a training sequence is refused
    source = write_json_lines(home / "rows.jsonl", [{"text": text} for text in texts])
    info = build_corpus(
        [source],
        home / "corpus",
        tokenizer=trained_tokenizer,
        entry_tokens=entry_tokens,
        sequence_length=sequence_length,
        minimum_sequence_tokens=1,
        heldout_fraction=0.0,
        workers=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(trained_tokenizer)
    corpus = open_corpus(info)
    kept = [text for text in texts if text.strip()]
    for ordinal, text in enumerate(kept):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows = np.flatnonzero(corpus.doc_ids == info.sources[0].base + ordinal)
        assert (corpus.tokens[rows][:, 0] == tokenizer.cls_token_id).all()
        found = corpus.tokens[rows][:, 1:].reshape(-1)
        assert found[found != tokenizer.pad_token_id].tolist() == wanted
        joined = "".join("".join(corpus.texts[row].split()) for row in rows)
        assert joined in "".join(text.split())
        inside = corpus.sequences["doc_id"] == info.sources[0].base + ordinal
        words = corpus.sequences["input_ids"][inside][:, 1:].reshape(-1)
        words = words[(words != tokenizer.pad_token_id) & (words != tokenizer.sep_token_id)]
        assert words.tolist() == [i for i in wanted if i != tokenizer.sep_token_id]


def test_entries_hold_the_exact_text_of_their_tokens(tmp_path: Path, build: Build) -> None:
    rows = make_rows(120)
    info = build(write_json_lines(tmp_path / "rows.jsonl", rows), entry_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path)
    corpus = open_corpus(info)
    assert len(corpus.ids) == info.entries
    for row in range(info.entries):
        ordinal = int(corpus.doc_ids[row] - info.sources[0].base)
        assert corpus.texts[row] in rows[ordinal]["text"]
        assert corpus.titles[row] == rows[ordinal]["title"]
        assert corpus.sources[row] == "rows.jsonl"
        again = tokenizer(corpus.texts[row], add_special_tokens=False)["input_ids"]
        stored = corpus.tokens[row][corpus.tokens[row] != tokenizer.pad_token_id].tolist()
        assert stored == [tokenizer.cls_token_id, *again]


def test_ids_run_on_and_sequences_point_to_their_entries(tmp_path: Path, build: Build) -> None:
    first = write_json_lines(tmp_path / "a.jsonl", make_rows(90))
    second = write_json_lines(tmp_path / "b.jsonl", make_rows(70, seed=1))
    info = build([second, first], documents_per_chunk=7, rows_per_file=60, entry_tokens=20)
    corpus = open_corpus(info)
    assert (np.diff(corpus.doc_ids) >= 0).all()
    for source in info.sources:
        mine = (corpus.ids >= source.base) & (corpus.ids < source.base + 2**39)
        assert corpus.ids[mine].tolist() == list(range(source.base, source.base + source.entries))
        assert set(corpus.doc_ids[mine]) == set(range(source.base, source.base + source.documents))
    assert len(list(info.sequences_path.iterdir())) > 1
    for rows in (corpus.sequences, corpus.heldout):
        assert (np.diff(rows["doc_id"]) >= 0).all()
        for ids, doc_id, ordinal, count in zip(*rows.values(), strict=True):
            start = np.searchsorted(corpus.doc_ids, doc_id) + ordinal
            covering = corpus.tokens[start : start + count]
            assert (corpus.doc_ids[start : start + count] == doc_id).all()
            entry_words = covering[:, 1:][covering[:, 1:] != 0].tolist()
            words = ids[ids != 0].tolist()[1:-1]
            places = range(len(entry_words) - len(words) + 1)
            assert any(entry_words[i : i + len(words)] == words for i in places)


def test_equal_lengths_cut_sequences_and_entries_identically(tmp_path: Path, build: Build) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(60))
    info = build(source, entry_tokens=24, sequence_length=25, heldout_fraction=0.0)
    corpus = open_corpus(info)
    assert (corpus.sequences["num_entries"] == 1).all()
    start = np.searchsorted(corpus.doc_ids, corpus.sequences["doc_id"])
    entries = corpus.tokens[start + corpus.sequences["first_entry"]]
    tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path)
    for entry, sequence in zip(entries, corpus.sequences["input_ids"], strict=True):
        words = entry[entry != tokenizer.pad_token_id].tolist()
        padding = [tokenizer.pad_token_id] * (24 - len(words))
        assert sequence.tolist() == [*words, tokenizer.sep_token_id, *padding]
    short = (entries != 0).sum(axis=1) - 1
    assert short.min() >= 8  # shorter last pieces are entries, but no sequences
    assert info.entries > info.sequences


def test_held_out_documents_are_in_the_memory_and_never_in_training(
    tmp_path: Path, build: Build
) -> None:
    rows = make_rows(200)
    rows.append(dict(rows[0], title="A copy"))
    info = build(write_json_lines(tmp_path / "a.jsonl", rows), heldout_fraction=0.3)
    corpus = open_corpus(info)
    trained, held = set(corpus.sequences["doc_id"]), set(corpus.heldout["doc_id"])
    assert not trained & held
    assert 30 <= info.heldout_documents <= 90
    assert trained | held <= set(corpus.doc_ids)
    base = info.sources[0].base
    assert (base in trained) == (base + 200 in trained)  # a copy is on its original's side
    counts = np.load(info.token_counts_path)
    assert counts.dtype == np.int64
    ids = corpus.sequences["input_ids"]
    assert counts.tolist() == [
        0 if token in (0, 2, 3) else int((ids == token).sum()) for token in range(info.vocab_size)
    ]


def test_titles_can_lead_their_entries(tmp_path: Path, build: Build) -> None:
    rows = [{"title": "River Kingdom", "text": "ancient temple " * 40}]
    source = write_json_lines(tmp_path / "a.jsonl", rows)
    info = build(source, entry_tokens=32, title_in_entry=True, heldout_fraction=0.0)
    tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path)
    title = tokenizer("River Kingdom", add_special_tokens=False)["input_ids"][:7]
    corpus = open_corpus(info)
    assert len(corpus.tokens) > 2
    for tokens, text in zip(corpus.tokens, corpus.texts, strict=True):
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        stored = tokens[tokens != tokenizer.pad_token_id].tolist()
        assert stored == [tokenizer.cls_token_id, *title, *words]


def test_the_number_of_workers_and_of_chunks_per_file_change_no_row(
    tmp_path: Path, build: Build
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(150))
    one = build(source, documents_per_chunk=20, out=tmp_path / "one")
    two = build(source, documents_per_chunk=20, out=tmp_path / "two", workers=2)
    assert contents(one.path) == contents(two.path)
    other = build(source, documents_per_chunk=33, rows_per_file=50, out=tmp_path / "three")
    assert open_corpus(other).tokens.tolist() == open_corpus(one).tokens.tolist()
    assert open_corpus(other).ids.tolist() == open_corpus(one).ids.tolist()


def test_empty_documents_are_passed_over_and_a_limit_holds(tmp_path: Path, build: Build) -> None:
    rows = [{"text": " "}, {"text": None}, *make_rows(30)]
    source = write_json_lines(tmp_path / "a.jsonl", rows)
    other = write_json_lines(tmp_path / "b.jsonl", make_rows(30, seed=3))
    info = build([source, other], limit_documents=40, documents_per_chunk=7)
    assert info.documents == 40
    assert [entry.documents for entry in info.sources] == [30, 10]
    assert info == load_corpus_info(info.path)


def test_a_corpus_without_held_out_documents_is_whole(tmp_path: Path, build: Build) -> None:
    info = build(write_json_lines(tmp_path / "a.jsonl", make_rows(9)), heldout_fraction=0.0)
    assert info.heldout_sequences == 0
    assert open_corpus(info).heldout["input_ids"].shape == (0, 128)


def test_a_large_vocabulary_is_stored_in_int32(tmp_path: Path, trained_tokenizer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_tokenizer)
    tokenizer.add_tokens([f"q{number}q" for number in range(70_000)])
    tokenizer.save_pretrained(tmp_path / "large")
    source = write_json_lines(tmp_path / "a.jsonl", [{"text": "river q69999q city " * 9}] * 9)
    info = build_corpus(
        [source], tmp_path / "out", tokenizer=str(tmp_path / "large"), workers=1, heldout_fraction=0
    )
    corpus = open_corpus(info)
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert corpus.tokens.dtype == corpus.sequences["input_ids"].dtype == np.int32
    assert corpus.tokens.max() == len(tokenizer) - 1


def test_progress_counts_documents_and_draws_a_bar(tmp_path: Path, build: Build) -> None:
    reports: list[BuildProgress] = []
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(50))
    build(source, documents_per_chunk=20, tokenizer="train:256", progress=reports.append)
    encoding = [report for report in reports if report.stage == "encoding"]
    assert [report.done for report in encoding] == [20, 40, 50]
    assert {report.total for report in encoding} == {50}
    assert [report.done for report in reports if report.stage == "writing"] == [1, 2, 3]
    with (tmp_path / "bar").open("w") as stream, ProgressBar(stream) as bar:
        for report in reports:
            bar(report)
    assert "50/50" in (tmp_path / "bar").read_text()


def test_encoding_processes_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import trainer.corpus.encode, trainer.corpus.assemble, trainer.corpus.pool\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 2}, "sequence_length=2 is not allowed; give 3 to"),
        ({"entry_tokens": 1}, "entry_tokens=1 is not allowed; give 2 to"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction=1\.0 is not allowed"),
        ({"documents_per_chunk": 0}, "documents_per_chunk=0"),
        ({"limit_documents": 0}, "limit_documents=0"),
        ({"minimum_sequence_tokens": 200}, "exceeds the 126 tokens"),
        ({"workers": 0}, "workers=0"),
        ({"text_field": ""}, "must not be empty"),
        ({"tokenizer": ""}, "tokenizer is empty"),
        ({"tokenizer": "train:lots"}, "train:SIZE takes"),
        ({"tokenizer": "/no/such/place"}, "no tokenizer at /no/such/place"),
        ({"text_field": "body"}, "no field 'body'; the fields are text, title"),
    ],
)
def test_impossible_arguments_are_refused(
    tmp_path: Path, build: Build, arguments: dict[str, object], message: str
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(5))
    with pytest.raises(CorpusError, match=message):
        build(source, **arguments)
    assert build(source).documents == 5  # an attempt that came to nothing does not stand in the way


def test_a_corpus_without_text_is_refused(tmp_path: Path, build: Build) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    for tokenizer in ({}, {"tokenizer": "train:256"}):
        with pytest.raises(CorpusError, match=r"a\.jsonl: no document holds any text"):
            build(source, **tokenizer)
    short = write_json_lines(tmp_path / "b.jsonl", [{"text": "river"}] * 3)
    with pytest.raises(CorpusError, match=r"no training sequence: of 3 documents.*fewer than 8"):
        build(short, overwrite=True)


def test_opening_what_is_no_corpus_says_what_it_is(tmp_path: Path, build: Build) -> None:
    with pytest.raises(CorpusError, match=r"no corpus at .*missing; .*pluglm corpus build"):
        load_corpus_info(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="is empty"):
        load_corpus_info(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="is a file"):
        load_corpus_info(tmp_path / "file")
    info = build(write_json_lines(tmp_path / "a.jsonl", make_rows(9)), heldout_fraction=0.0)
    with pytest.raises(CorpusError, match=r"is no corpus \(it has no corpus.json\)"):
        load_corpus_info(info.memory_path)
    manifest = info.path / "corpus.json"
    whole = manifest.read_text()
    values = json.loads(whole)
    for change, message in (
        ({"format": "pluglm-corpus-99"}, "of the format 'pluglm-corpus-99'"),
        ({"entries": "many"}, "damaged"),
        ({"files": None}, "does not say what it was built from"),
    ):
        manifest.write_text(json.dumps(values | change))
        with pytest.raises(CorpusError, match=message):
            load_corpus_info(info.path)
    manifest.write_text(whole[:-30])
    with pytest.raises(CorpusError, match="damaged"):
        load_corpus_info(info.path)
    manifest.write_text(whole)
    info.token_counts_path.unlink()
    with pytest.raises(CorpusError, match=r"damaged \(token_counts.npy is missing\)"):
        load_corpus_info(info.path)
