"""How a model uses its memory on a text: which entries it reads, how evenly, and what is alike."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memory_server.api import Entry, Memory, Retrieved
from model import PlugLMForMaskedLM
from trainer.data.stream import TrainBatch
from trainer.reads.shares import entry_shares

_MOST_USED = 10
_LOOKED_AT = 512  # the most used entries, whose nearest neighbours are searched
_PAIRS = 10
_ALIKE = 0.95  # cosine of two keys from which on a pair is told
_TEXT_CUT = 200

DomainsOf = Callable[[Sequence[int]], Mapping[int, str]]


@dataclass
class _Layer:
    """What one memory layer has read so far."""

    retrieved: Counter[int] = field(default_factory=Counter)
    attention: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    entropy: float = 0.0
    sequences: int = 0


@torch.no_grad()
def usage_report(
    model: PlugLMForMaskedLM,
    memory: Memory,
    batches: Iterator[TrainBatch],
    *,
    k: int,
    device: str = "cpu",
    domains_of: DomainsOf | None = None,
) -> dict[str, Any]:
    """Everything that `usage.json` holds.

    Args:
        model: in eval mode. memory: whose live epoch answers, with this model's keys.
        batches: the text, masked as in training.
        k: entries per sequence.
        domains_of: the domains of entries by id; None: they are not told.

    Returns:
        `entries`, `sequences`, `k`; for each of `layers` how many entries it read, the share that
        no sequence read, the share of the reading that the most read hundredth takes, and the mean
        entropy of the attention over the K entries (1: all alike, 0: one alone); of all layers
        `most_used`, `by_domain`, `by_source` (shares of the reading), `times_read` (how many
        entries were read so often), and `alike`: pairs of nearly equal keys.
    """
    model.train(False)
    layers: dict[int, _Layer] = {}
    for batch in batches:
        there = batch.to(device)
        output = model(
            there.input_ids,
            there.attention_mask,
            lookup=lambda queries_BQ: memory.search(queries_BQ, k),
            output_attention=True,
        )
        for retrieval in output.retrievals or ():
            layer = layers.setdefault(retrieval.layer, _Layer())
            _count(layer, retrieval.retrieved.ids, entry_shares(retrieval))
    info = memory.info()
    total: Counter[int] = Counter()
    for layer in layers.values():
        total.update(layer.retrieved)
    ids = [entry_id for entry_id, _ in total.most_common()]
    entries = {entry.id: entry for entry in _entries(memory, ids)}
    domains = domains_of(ids) if domains_of is not None else {}
    return {
        "entries": info.entries,
        "sequences": max((layer.sequences for layer in layers.values()), default=0),
        "k": k,
        "layers": [_layer(number, layer, info.entries) for number, layer in sorted(layers.items())],
        "times_read": _times(total),
        "most_used": [
            {**_told(entries[i]), "times": total[i], "domain": domains.get(i, "")}
            for i in ids[:_MOST_USED]
            if i in entries
        ],
        "by_domain": _by(total, lambda i: domains.get(i)),
        "by_source": _by(total, lambda i: entries[i].source if i in entries else None),
        "alike": _alike(model, memory, [entries[i] for i in ids[:_LOOKED_AT] if i in entries]),
    }


def _count(layer: _Layer, ids_BK: Tensor, shares_BK: Tensor) -> None:
    found_BK = ids_BK.cpu() >= 0
    shares_BK = shares_BK.cpu()
    log_BK = torch.where(shares_BK > 0, shares_BK.log(), 0.0)
    places_B = found_BK.sum(1)
    entropy_B = -(shares_BK * log_BK).sum(1)
    several_B = places_B > 1
    layer.entropy += float((entropy_B / places_B.clamp(min=2).log())[several_B].sum())
    layer.sequences += len(ids_BK)
    layer.retrieved.update(ids_BK.cpu()[found_BK].tolist())
    for entry_id, share in zip(
        ids_BK.cpu()[found_BK].tolist(), shares_BK[found_BK].tolist(), strict=True
    ):
        layer.attention[entry_id] += share


def _layer(number: int, layer: _Layer, entries: int) -> dict[str, Any]:
    counts = sorted(layer.retrieved.values(), reverse=True)
    most = max(1, round(entries / 100))
    return {
        "layer": number,
        "used": len(counts),
        "never_used_share": 1 - len(counts) / max(entries, 1),
        "reading_of_most_used_hundredth": sum(counts[:most]) / max(sum(counts), 1),
        "attention_entropy": layer.entropy / max(layer.sequences, 1),
        "most_attended": [
            {"id": entry_id, "share": share / max(layer.sequences, 1)}
            for entry_id, share in heapq.nlargest(
                _MOST_USED, layer.attention.items(), key=lambda pair: pair[1]
            )
        ],
    }


def _times(total: Counter[int]) -> list[dict[str, int]]:
    """How many entries were read 1, 2 to 3, 4 to 7, ... times."""
    bins = Counter(int(math.log2(count)) for count in total.values())
    return [
        {"from": 2**power, "to": 2 ** (power + 1) - 1, "entries": bins[power]}
        for power in sorted(bins)
    ]


def _by(total: Counter[int], of: Callable[[int], str | None]) -> dict[str, float]:
    """Shares of the reading by what `of` says of an entry; what it does not know is left out."""
    sums: Counter[str] = Counter()
    for entry_id, count in total.items():
        name = of(entry_id)
        if name is not None:
            sums[name] += count
    whole = max(sum(sums.values()), 1)
    return {name: count / whole for name, count in sums.most_common(_MOST_USED)}


def _entries(memory: Memory, ids: Sequence[int]) -> list[Entry]:
    found: list[Entry] = []
    for start in range(0, len(ids), _LOOKED_AT):
        found += memory.entries(list(ids[start : start + _LOOKED_AT]))
    return found


def _told(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "title": entry.title, "text": entry.text[:_TEXT_CUT]}


def _alike(
    model: PlugLMForMaskedLM, memory: Memory, entries: Sequence[Entry]
) -> list[dict[str, Any]]:
    """Pairs of entries whose keys are nearly the same, the nearest first."""
    if not entries:
        return []
    device = next(model.parameters()).device
    tokens_NS = torch.tensor([entry.tokens for entry in entries], device=device)
    keys_NQ = model.pluglm.entry_keys(tokens_NS).float()
    # Beside those among the most used: what the memory finds for their keys. The best by inner
    # product may be a long key, so the most alike of a few is looked for.
    found: Retrieved = memory.search(keys_NQ, 8)
    others_NKQ = model.pluglm.entry_keys(found.tokens.to(device).flatten(0, 1)).float()
    cosine_NK = F.cosine_similarity(
        keys_NQ.unsqueeze(1), others_NKQ.unflatten(0, found.ids.shape), dim=-1
    ).cpu()
    pairs: dict[tuple[int, int], float] = {}
    unit_NQ = F.normalize(keys_NQ, dim=-1)
    among_NN = torch.triu(unit_NQ @ unit_NQ.T, diagonal=1).cpu()
    for row, column in (among_NN >= _ALIKE).nonzero().tolist():
        one, other = sorted((entries[row].id, entries[column].id))
        pairs[one, other] = float(among_NN[row, column])
    for row, entry in enumerate(entries):
        for place, other in enumerate(found.ids[row].tolist()):
            likeness = float(cosine_NK[row, place])
            if other >= 0 and other != entry.id and likeness >= _ALIKE:
                pairs[min(entry.id, other), max(entry.id, other)] = likeness
    nearest = sorted(pairs.items(), key=lambda pair: -pair[1])[:_PAIRS]
    ids = sorted({i for pair, _ in nearest for i in pair})
    texts = {entry.id: entry for entry in _entries(memory, ids)}
    return [
        {"cosine": likeness, "entries": [_told(texts[a]), _told(texts[b])]}
        for (a, b), likeness in nearest
        if a in texts and b in texts
    ]
