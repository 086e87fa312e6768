"""Two corpora, a token budget, length buckets and phases: what is learned is no matter of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.integration.support_pretrain import make_corpus, pretraining, write_config
from trainer.corpus.build import build_corpus
from trainer.corpus.info import load_corpus_info

pytestmark = [pytest.mark.integration, pytest.mark.slow]

WORDS = [
    "data.weights=[1.0,3.0]",
    "data.length_buckets=true",
    "data.phase_lengths=[12,0]",
    "data.phase_steps=[4]",
    "optim.batch_tokens=300",
    "optim.batch_size=32",
    "optim.steps=8",
    "optim.retrieval_warmup_steps=0",
    "model.dropout=0.0",
    'model.query_norm="layer"',
    'memory.refresh="sync"',
]


def losses(config: Path, *words: str) -> list[dict[str, Any]]:
    with pretraining(config, *WORDS, *words) as run:
        ended = run.end()
    assert ended.code == 0, ended.stderr
    return run.lines("train")


def test_ranks_and_passes_do_not_change_what_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    first = load_corpus_info(make_corpus(tmp_path))
    text = tmp_path / "long.txt"
    towns = [f"the tea of town {i} is {'very ' * (i % 37)}good" for i in range(90)]
    text.write_text("\n\n".join(towns), encoding="utf-8")
    second = build_corpus(
        [text],
        tmp_path / "second",
        tokenizer=str(first.tokenizer_path),
        sequence_length=first.sequence_length - 5,
        entry_tokens=first.entry_tokens,
        heldout_fraction=0.1,
        workers=1,
    )
    more = f'data.more_corpora=["{second.path}"]'
    one = losses(
        write_config(tmp_path, first.path, name="one"),
        *(more, "runtime.trainers=1", "runtime.micro_batch_size=32"),
    )
    two = losses(
        write_config(tmp_path, first.path, name="two"),
        f"data.corpus=file://{first.path}",  # as if it lay on another filesystem
        *(more, "runtime.trainers=2", "runtime.micro_batch_size=8", "runtime.zero_stage=1"),
    )
    # Other commands find a corpus by its URL, too.
    for words in (["checkpoint", "verify"], ["memory", "info"], ["evaluate"]):
        assert main([*words, str(tmp_path / "two")]) == 0, words
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 9))
    for alone, together in zip(one, two, strict=True):
        assert math.isclose(alone["mlm_loss"], together["mlm_loss"], rel_tol=2e-4)
