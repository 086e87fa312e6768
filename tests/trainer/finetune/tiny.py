"""Tiny tasks, a tokenizer that knows their words, and tiny models, for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from trainer.corpus.tokenizer import tokenizer_fingerprint
from trainer.finetune.settings import (
    EvaluateSettings,
    FinetuneSettings,
    MemorySettings,
    ModelSettings,
    RunSettings,
    TaskSettings,
    TrainSettings,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PETS = ["cat", "dog", "fish", "bird"]
FRUIT = ["apple", "pear", "plum", "fig"]
FILLER = ["the", "a", "is", "here", "where", "who", "in", "and", "##s"]
PLACES = ["rome", "oslo", "lima", "bern"]
WORDS = [*SPECIAL, *PETS, *FRUIT, *FILLER, *PLACES]


def make_tokenizer() -> Any:
    """A BERT tokenizer over `WORDS`, with `[CLS] a [SEP] b [SEP]`."""
    from transformers import BertTokenizer

    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIAL)
    return BertTokenizer(tokenizer_object=tokenizer)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same_rows(path: Path, other: Path) -> Path:
    """The rows of a JSON Lines file in a file that is no copy of it."""
    other.write_bytes(path.read_bytes() + b"\n")
    return other


def task(kind: str, train: Path, **options: Any) -> TaskSettings:
    """Settings of a task whose dev is its train, unless told otherwise."""
    given = {"kind": kind, "train": str(train), "dev": str(train), "max_length": 16} | options
    return TaskSettings(**given)


def pet_or_fruit(count: int) -> list[dict[str, Any]]:
    """Sentences of four words; the label is the kind of the one noun in it."""
    rows = []
    for number in range(count):
        label, nouns = (("pet", PETS), ("fruit", FRUIT))[number % 2]
        noun = nouns[number // 2 % 4]
        first = ("the", "a")[number // 8 % 2]
        words = [first, noun, "is", "here"] if number // 16 % 2 else ["here", "is", first, noun]
        rows.append({"text": " ".join(words), "label": label})
    return rows


SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def save_pluglm(path: Path, **options: Any) -> Path:
    """A PlugLM as pre-training exports it: with its masked-LM head and its tokenizer."""
    from model import PlugLMConfig, PlugLMForMaskedLM

    memory = {"num_memory_layers": 1, "memory_ffn_size": 16, "key_size": 8, "query_norm": "layer"}
    torch.manual_seed(5)
    model = PlugLMForMaskedLM(PlugLMConfig(**(SIZES | memory | options)))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def save_bert(path: Path) -> Path:
    """A plain BERT with its masked-LM head, in transformers' own classes."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(5)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_store(path: Path, *, fingerprint: str | None = None, entry_tokens: int = 6) -> Path:
    """A memory of sentences about every noun."""
    tokenizer = make_tokenizer()
    texts = [
        f"{noun} is {kind}" for kind, names in (("here", PETS), ("in", FRUIT)) for noun in names
    ]
    store = Store.create(
        path,
        tokenizer_fingerprint=fingerprint or tokenizer_fingerprint(tokenizer),
        entry_tokens=entry_tokens,
        vocab_size=len(WORDS),
        pad_token_id=0,
    )
    encoded = tokenizer(texts, padding="max_length", max_length=entry_tokens)["input_ids"]
    write_segment(
        store.incoming / "a.arrow",
        ids=range(len(texts)),
        doc_ids=range(len(texts)),
        tokens_NS=np.array(encoded),
        texts=texts,
        titles=texts,
        sources=["tiny"] * len(texts),
        meta=store.meta,
    )
    store.commit(add_segments=[store.incoming / "a.arrow"], message="nouns")
    return path


def settings(
    task_settings: TaskSettings, model: Path, home: Path, **sections: Mapping[str, Any]
) -> FinetuneSettings:
    """Settings of a short run; `sections` are keyword arguments of memory, train and evaluate.

    Where the task is measured on its training file, it is on a file of the same rows instead: what
    is tested here is that they are learned.
    """
    path = Path(task_settings.train)
    twins = {
        split: str(same_rows(path, path.with_name(f"{split}-{path.name}")))
        for split in ("dev", "test")
        if getattr(task_settings, split) == str(path)
    }
    train = {"epochs": 2, "batch_size": 8, "lr": 0.005, "seeds": (0,), "warmup_ratio": 0.0}
    return FinetuneSettings(
        task=replace(task_settings, **twins),
        model=ModelSettings(path=str(model)),
        memory=MemorySettings(**sections.get("memory", {})),
        train=TrainSettings(**(train | dict(sections.get("train", {})))),
        evaluate=EvaluateSettings(**sections.get("evaluate", {})),
        run=RunSettings(dir=str(home)),
    )
