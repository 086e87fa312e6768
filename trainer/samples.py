"""Held-out sentences for the report: what was masked, what was predicted, what was read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memory_server.api import Memory, Retrieved
from model import LayerRetrieval, PlugLMForMaskedLM
from trainer.data.stream import TrainBatch

_SHOWN_PREDICTIONS = 3


@torch.no_grad()
def make_samples(
    model: PlugLMForMaskedLM,
    memory: Memory,
    tokenizer: Any,
    batch: TrainBatch,
    *,
    k: int,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Describe each sequence of a batch as `samples.json` holds it.

    Args:
        model: the trained model with whole weights.
        memory: whose live epoch answers.
        tokenizer: to spell tokens.
        batch: masked held-out sequences.
        k: entries per sequence.
        device: of the model.
    """
    model.train(False)
    there = batch.to(device)

    def search(queries_BQ: Tensor) -> Retrieved:
        return memory.search(queries_BQ, k)

    inputs = (there.input_ids, there.attention_mask)
    # Without labels every position is computed, so logits line up with the text.
    with_memory = model(*inputs, lookup=search, output_attention=True)
    without = model(*inputs)
    samples = []
    for row in range(len(batch.doc_ids)):
        length = int(batch.attention_mask[row].sum())
        truth_T = torch.where(batch.labels[row] >= 0, batch.labels[row], batch.input_ids[row])[
            :length
        ]
        positions = [t for t in range(length) if int(batch.labels[row, t]) >= 0]
        masked = [
            {
                "position": t,
                "truth": tokenizer.convert_ids_to_tokens(int(batch.labels[row, t])),
                "predictions": _best(with_memory.logits[row, t], tokenizer),
                "predictions_without_memory": _best(without.logits[row, t], tokenizer),
            }
            for t in positions
        ]
        own_document = int(batch.doc_ids[row])
        samples.append(
            {
                "text": tokenizer.decode(truth_T.tolist(), skip_special_tokens=True),
                "tokens": tokenizer.convert_ids_to_tokens(truth_T.tolist()),
                "masked": masked,
                "layers": [
                    _layer(retrieval, row, positions, own_document, memory)
                    for retrieval in with_memory.retrievals
                ],
            }
        )
    return samples


def _best(logits_V: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    probabilities, ids = torch.softmax(logits_V.float(), -1).topk(_SHOWN_PREDICTIONS)
    return [
        {"token": tokenizer.convert_ids_to_tokens(int(i)), "probability": float(p)}
        for p, i in zip(probabilities, ids, strict=True)
    ]


def _layer(
    retrieval: LayerRetrieval, row: int, positions: list[int], own_document: int, memory: Memory
) -> dict[str, Any]:
    """A memory layer's entries; the weight is the mean attention of the masked positions."""
    found: Any = retrieval.retrieved
    attention_BATK = retrieval.attention_BATK
    assert attention_BATK is not None
    attention_TK = attention_BATK[row].mean(0)
    # Sentence-level attention is one weight for all positions.
    chosen = attention_TK[positions] if len(attention_TK) > 1 else attention_TK
    weights_K = chosen.mean(0)
    places = [j for j in range(found.ids.shape[1]) if int(found.ids[row, j]) >= 0]
    entries = memory.entries([int(found.ids[row, j]) for j in places])
    return {
        "layer": retrieval.layer,
        "entries": [
            {
                "id": entry.id,
                "title": entry.title,
                "source": entry.source,
                "text": entry.text,
                "score": float(found.scores[row, j]),
                "weight": float(weights_K[j]),
                "own_document": int(found.doc_ids[row, j]) == own_document,
            }
            for j, entry in zip(places, entries, strict=True)
        ],
    }
