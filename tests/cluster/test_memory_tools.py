"""The entries found for a sentence: the right ones, by the model's own query."""

from pathlib import Path

import pytest
import torch

from cluster.config import ConfigError
from cluster.memory_tools import chosen_device, nearest_entries, sentence_tokens
from cluster.trained_model import load_trained_model
from memory_server.errors import StoreNotFound, TokenizerMismatch
from memory_server.store.store import Store
from tests.cluster.tiny_run import TinyRun, save_tiny_model

SENTENCE = "the ancient king of the [MASK] river"


def test_hits_are_those_of_a_full_sort_with_the_last_layers_query(tiny_run: TinyRun) -> None:
    """Every entry scored plainly, the first memory layer's answer sorted out plainly as well."""
    trained = load_trained_model(tiny_run.model)
    store = Store.open(tiny_run.store)
    segments = [store.segment(ref) for ref in store.manifest().segments]
    ids = torch.cat([torch.tensor(s.ids) for s in segments])
    doc_ids = torch.cat([torch.tensor(s.doc_ids) for s in segments])
    tokens = torch.cat([torch.tensor(s.tokens.astype("int64")) for s in segments])
    encoder = trained.model.pluglm
    k, asked = 4, []

    class Found:
        def __init__(self, rows: torch.Tensor) -> None:
            self.ids, self.doc_ids, self.tokens = ids[rows], doc_ids[rows], tokens[rows]

    with torch.no_grad():
        keys = encoder.entry_keys(tokens)

        def lookup(queries_bq: torch.Tensor) -> Found:
            scores = queries_bq @ keys.T
            asked.append(scores[0])
            return Found(scores.argsort(dim=1, descending=True)[:, :k])

        trained.model(sentence_tokens(trained, SENTENCE), lookup=lookup)
    assert len(asked) == 2
    best = asked[-1].argsort(descending=True)[:k]

    hits = nearest_entries(tiny_run.store, tiny_run.model, SENTENCE, k=k)

    assert [hit.entry.id for hit in hits] == ids[best].tolist()
    assert [hit.score for hit in hits] == pytest.approx(asked[-1][best].tolist(), abs=1e-5)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert asked[0].argsort(descending=True)[:k].tolist() != best.tolist()


def test_an_excluded_documents_entries_are_replaced_by_the_next_best(tiny_run: TinyRun) -> None:
    first = nearest_entries(tiny_run.store, tiny_run.model, SENTENCE, k=5)
    document = first[0].entry.doc_id
    others = nearest_entries(
        tiny_run.store, tiny_run.model, SENTENCE, k=5, exclude_document=document
    )
    assert len(others) == 5
    assert document not in {hit.entry.doc_id for hit in others}


def test_a_document_without_entries_cannot_be_excluded(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="document 987654: no entry of it lives in the memory"):
        nearest_entries(tiny_run.store, tiny_run.model, SENTENCE, k=1, exclude_document=987654)
    with pytest.raises(ConfigError, match="ids are from 0"):
        nearest_entries(tiny_run.store, tiny_run.model, SENTENCE, k=1, exclude_document=-1)


def test_the_mask_is_one_token_between_cls_and_sep(tiny_run: TinyRun) -> None:
    trained = load_trained_model(tiny_run.model)
    tokens = sentence_tokens(trained, "king [MASK]")[0].tolist()
    tokenizer = trained.tokenizer
    assert tokens[0] == tokenizer.cls_token_id
    assert tokens[-2:] == [tokenizer.mask_token_id, tokenizer.sep_token_id]


@pytest.mark.parametrize(
    ("sentence", "said"),
    [("", "no tokens"), ("  ", "no tokens"), ("river " * 40, "at most 30; shorten it")],
)
def test_a_sentence_that_cannot_be_read_is_refused(
    tiny_run: TinyRun, sentence: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        nearest_entries(tiny_run.store, tiny_run.model, sentence, k=1)


@pytest.mark.parametrize("k", [0, 100_000])
def test_more_entries_than_the_memory_holds_are_refused(tiny_run: TinyRun, k: int) -> None:
    with pytest.raises(ConfigError, match=rf"k = {k}: must be from 1 to \d+"):
        nearest_entries(tiny_run.store, tiny_run.model, SENTENCE, k=k)


def test_another_tokenizers_model_is_refused(tiny_run: TinyRun, other_tokenizer: Path) -> None:
    with pytest.raises(TokenizerMismatch, match="another tokenizer"):
        nearest_entries(tiny_run.store, other_tokenizer, SENTENCE, k=2)


def test_entries_longer_than_the_model_reads_are_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    save_tiny_model(
        tmp_path / "short", tokenizer=tiny_run.corpus / "tokenizer", max_position_embeddings=12
    )
    with pytest.raises(ConfigError, match=r"entries of 16 tokens.*at most 12"):
        nearest_entries(tiny_run.store, tmp_path / "short", "king", k=2)


def test_no_store_is_said(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        nearest_entries(tmp_path, tiny_run.model, SENTENCE, k=2)


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        assert chosen_device("auto") == "cuda"
        return
    assert chosen_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        chosen_device("cuda")


def test_a_model_with_missing_weights_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Loaded leniently, they would be random, and every answer wrong without a word."""
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path / "model", tokenizer=tiny_run.corpus / "tokenizer")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["pluglm.entry_encoder.key_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of its weights.*key_proj"):
        load_trained_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", "is damaged"),
        ("config.json", b'{"model_type": "bert"}', "'bert' model"),
        ("config.json", b'{"model_type": "pluglm", "num_memory_layers": 0}', "no memory layer"),
        ("model.safetensors", b"cut off", "cannot be loaded"),
    ],
)
def test_a_damaged_or_foreign_model_is_refused(
    tiny_run: TinyRun, tmp_path: Path, file: str, content: bytes, said: str
) -> None:
    save_tiny_model(tmp_path / "model", tokenizer=tiny_run.corpus / "tokenizer")
    (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_trained_model(tmp_path / "model")
