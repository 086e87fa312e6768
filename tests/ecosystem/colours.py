"""A world of a dozen sentences: a tokenizer, a store of facts, and models that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer

import model as pluglm
from memory_server.local import LocalMemory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMConfig
from trainer.corpus.tokenizer import tokenizer_fingerprint

FACTS = {
    "apple": "red", "sky": "blue", "grass": "green", "snow": "white", "coal": "black",
    "sun": "yellow", "rose": "pink", "earth": "brown",
}  # fmt: skip
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "is", "colour", "good", "bad",
         "not", "?", "what", *FACTS, *FACTS.values())  # fmt: skip
ENTRY_TOKENS, KEY_SIZE = 10, 32
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "key_size": KEY_SIZE,
    "memory_ffn_size": 16,
    "value_pooling": "tokens",
    "query_norm": "layer",
    "memory_init": "copy",
    "top_k": 3,
}


@dataclass(frozen=True)
class Found:
    """What a lookup answers."""

    ids: torch.Tensor
    tokens: torch.Tensor
    doc_ids: torch.Tensor


def make_tokenizer() -> Any:
    return BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}, model_max_length=16)


def fact(noun: str, colour: str) -> str:
    return f"the colour of {noun} is {colour}"


def make_model(head: str = "MaskedLM", *, dropout: float = 0.0, **settings: Any) -> Any:
    """A model of this world in eval mode, the same one every time."""
    torch.manual_seed(0)
    config = PlugLMConfig(
        **(SIZES | settings),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        tokenizer_fingerprint=tokenizer_fingerprint(make_tokenizer()),
    )
    name = f"PlugLMFor{head}" if head else "PlugLMModel"
    return getattr(pluglm, name)(config).eval()


def write_facts(store: Store, name: str, facts: Mapping[str, str], first_id: int = 0) -> Path:
    """A segment of one entry per fact."""
    tokenizer = make_tokenizer()
    texts = [fact(*pair) for pair in facts.items()]
    tokens = tokenizer(texts, padding="max_length", max_length=ENTRY_TOKENS)["input_ids"]
    path = store.incoming / f"{name}.arrow"
    write_segment(
        path,
        ids=[first_id + n for n in range(len(texts))],
        doc_ids=[first_id + n for n in range(len(texts))],
        tokens_NS=np.array(tokens),
        texts=texts,
        titles=list(facts),
        sources=["colours"] * len(texts),
        meta=store.meta,
    )
    return path


def make_store(path: Path) -> Store:
    store = Store.create(
        path,
        tokenizer_fingerprint=tokenizer_fingerprint(make_tokenizer()),
        entry_tokens=ENTRY_TOKENS,
        vocab_size=len(WORDS),
        pad_token_id=0,
    )
    store.commit(add_segments=[write_facts(store, "facts", FACTS)], message="facts")
    return store


def make_memory(store: Store, model: Any) -> LocalMemory:
    encoder = KeyEncoderFactory(model.config.to_dict())
    return LocalMemory(store, encoder=encoder, weights=model.key_weights())


def encode(*texts: str, pair: list[str] | None = None) -> dict[str, torch.Tensor]:
    return dict(make_tokenizer()(list(texts), pair, padding=True, return_tensors="pt"))


def train_to_read(model: Any, steps: int = 150) -> None:
    """Teach a masked-LM model to find a noun's fact and to copy its colour.

    The facts are drawn anew at every step, so that no weight can know them.
    """
    nouns, colours = list(FACTS), list(FACTS.values())
    tokenizer = make_tokenizer()
    asked = encode(*(fact(noun, "[MASK]") for noun in nouns))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mask_BT = asked["input_ids"] == tokenizer.mask_token_id
    rows_B = torch.arange(len(nouns))
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(colours), (len(nouns),)).tolist()
        texts = [fact(noun, colours[c]) for noun, c in zip(nouns, drawn, strict=True)]
        tokens_NS = tokenizer(
            texts, padding="max_length", max_length=ENTRY_TOKENS, return_tensors="pt"
        )["input_ids"]
        labels = torch.full_like(asked["input_ids"], -100)
        labels[mask_BT] = torch.tensor(tokenizer.convert_tokens_to_ids([colours[c] for c in drawn]))
        with torch.no_grad():
            keys_NQ = model.base_model.entry_keys(tokens_NS)

        def lookup(
            queries_BQ: torch.Tensor,
            keys_NQ: torch.Tensor = keys_NQ,
            tokens_NS: torch.Tensor = tokens_NS,
        ) -> Found:
            ids_BK = (queries_BQ @ keys_NQ.T).topk(3).indices
            return Found(ids=ids_BK, tokens=tokens_NS[ids_BK], doc_ids=ids_BK)

        loss = model(
            **asked,
            labels=labels,
            lookup=lookup,
            positive_tokens=tokens_NS,
            positive_ids=rows_B,
            doc_ids=rows_B,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
