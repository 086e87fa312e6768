"""Tokenizers: trained the same every time, loaded with clear errors, told apart by fingerprint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from tests.trainer.corpus.samples import Build, make_rows, write_json_lines
from trainer.corpus.errors import CorpusError
from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.corpus.wordpiece import wanted_size


def test_training_gives_the_same_tokenizer_in_another_process(tmp_path: Path, build: Build) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(60, seed=2))
    info = build(source, tokenizer="train:300")
    code = (
        "import sys; from trainer.corpus.build import build_corpus\n"
        "print(build_corpus([sys.argv[1]], sys.argv[2], tokenizer='train:300', workers=1,"
        " heldout_fraction=0.2).tokenizer_fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "again")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [info.tokenizer_fingerprint]


def test_a_trained_tokenizer_is_uncased_bert_for_transformers(trained_tokenizer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_tokenizer)
    assert tokenizer.is_fast
    assert len(tokenizer) <= 256
    ids = tokenizer("Café, river")["input_ids"]
    assert ids == tokenizer("CAFE, RIVER")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cafe, river"
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]


def test_the_fingerprint_survives_saving_and_ignores_padding(
    trained_tokenizer: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(trained_tokenizer)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == before
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tokenizer.backend_tokenizer) == before


@pytest.mark.parametrize("change", ["vocabulary", "normalizer", "added"])
def test_the_fingerprint_changes_with_what_changes_ids(trained_tokenizer: str, change: str) -> None:
    whole = json.loads((Path(trained_tokenizer) / "tokenizer.json").read_text())
    before = tokenizer_fingerprint(Tokenizer.from_str(json.dumps(whole)))
    if change == "vocabulary":
        vocabulary = whole["model"]["vocab"]
        last, other = sorted(vocabulary, key=lambda token: -int(vocabulary[token]))[:2]
        vocabulary[last], vocabulary[other] = vocabulary[other], vocabulary[last]
    elif change == "normalizer":
        whole["normalizer"]["lowercase"] = False
    after = Tokenizer.from_str(json.dumps(whole))
    if change == "added":
        after.add_tokens(["brandnew"])
    assert tokenizer_fingerprint(after) != before


@pytest.mark.parametrize("text", ["train:", "train:many", "train:10", "train:-300", "train:9e9"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CorpusError, match=r"train:SIZE takes .* from 256 to 1048576"):
        wanted_size(text)


def test_a_tokenizer_beside_any_model_is_loaded_without_advice(
    trained_tokenizer: str, tmp_path: Path
) -> None:
    place = shutil.copytree(trained_tokenizer, tmp_path / "model")
    (place / "config.json").write_text('{"model_type": "pluglm"}')
    load = f"from trainer.corpus.tokenizer import load_tokenizer; load_tokenizer({str(place)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert "model of type" not in done.stderr


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no tokenizer at .*missing"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"cannot load a tokenizer .*train:SIZE"):
        load_tokenizer(tmp_path / "empty")
    bare = tmp_path / "bare"
    bare.mkdir()
    Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(
        str(bare / "tokenizer.json")
    )
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CorpusError, match="has no pad, unk, cls, sep, mask token"):
        load_tokenizer(bare)
    with pytest.raises(CorpusError, match="no fast tokenizer"):
        tokenizer_fingerprint("bert")
