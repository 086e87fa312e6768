"""Measuring an explanation: one pass for what is read, one for every entry that is left out.

An entry is left out of the memory, not only of the attention: every layer asks for one entry more
and loses this one, so that the answer is the one that a memory without the entry gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.editing.lookup import entries_by_id
from cluster.explain.explanation import (
    EntryRead,
    EntryText,
    Explanation,
    Guess,
    LayerReading,
    Prediction,
    Without,
)
from cluster.memory_tools import sentence_tokens
from cluster.trained_model import TrainedModel
from memory_server.api import Memory, Retrieved
from memory_server.requests import MAX_TOP_K
from memory_server.store.store import Store

NOTHING = -1  # no entry has this id


class LookupWithout:
    """A memory's answer to a batch in which every row does without one entry."""

    def __init__(
        self, memory: Memory, k: int, left_out_B: Tensor, exclude: int | None = None
    ) -> None:
        """Ask nothing yet.

        Args:
            left_out_B: int64 [B], an entry's id for each row; `NOTHING` for none.
            exclude: a document that no row may read.
        """
        self._memory, self._k, self._left_out_B = memory, k, left_out_B.cpu()
        self._exclude_B = None if exclude is None else torch.full_like(self._left_out_B, exclude)

    def __call__(self, queries_BQ: Tensor) -> Retrieved:
        """See `model.retrieval.Lookup`."""
        found = self._memory.search(
            queries_BQ, self._k + 1, exclude_doc_ids=_on(self._exclude_B, queries_BQ)
        )
        ids_BK = found.ids
        out_BK = ids_BK == self._left_out_B.to(ids_BK.device).unsqueeze(1)
        # A stable sort keeps the order of those that stay; what is out goes behind them.
        places_Bk = out_BK.to(torch.int8).argsort(dim=1, stable=True)[:, : self._k]
        keys, values = found.keys, found.values
        return replace(
            found,
            ids=_gathered(ids_BK, places_Bk),
            scores=_gathered(found.scores, places_Bk),
            doc_ids=_gathered(found.doc_ids, places_Bk),
            tokens=_gathered(found.tokens, places_Bk),
            keys=None if keys is None else _gathered(keys, places_Bk),
            values=None if values is None else _gathered(values, places_Bk),
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text that can be explained.

    Attributes:
        tokens_1T: int64 [1,T], with [CLS] and [SEP].
        positions: of the masks, at least one.
        answer: the token whose probability is followed; None: the model's own first guess.
    """

    tokens_1T: Tensor
    positions: Sequence[int]
    answer: int | None


def check_question(
    trained: TrainedModel, text: str, *, k: int, entries: int, answer: str | None, guesses: int
) -> Question:
    """What `explain` is asked, before any key is made.

    Args:
        entries: how many the memory holds. The others are as of `explain`.

    Raises:
        ConfigError: it cannot be explained; says why.
    """
    most = min(entries, MAX_TOP_K - 1)
    if not entries:
        raise ConfigError(
            "the memory holds no entry, so none can explain an answer; add text to it, or plug a "
            "domain in"
        )
    if not 1 <= k <= most:
        raise ConfigError(f"k = {k}: must be from 1 to {most} (the memory holds {entries} entries)")
    vocabulary = int(trained.model.config.vocab_size)
    if not 1 <= guesses <= vocabulary:
        raise ConfigError(
            f"guesses = {guesses}: must be from 1 to {vocabulary}, the model's vocabulary"
        )
    tokens_1T = sentence_tokens(trained, text)
    positions = (tokens_1T[0] == trained.tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not positions:
        raise ConfigError(
            f"the text {text!r} has no [MASK]: put [MASK] where the model is to answer, "
            'such as "The capital of Portugal is [MASK]."'
        )
    asked = None if answer is None else answer_token(trained, answer)
    return Question(tokens_1T=tokens_1T, positions=positions, answer=asked)


def explain(
    trained: TrainedModel,
    memory: Memory,
    text: str,
    *,
    k: int,
    store: Store | None = None,
    answer: str | None = None,
    exclude: int | None = None,
    guesses: int = 5,
    model_name: str = "",
    memory_name: str = "",
) -> Explanation:
    """Explain what a model says at the masks of a text.

    Args:
        trained: the model with its tokenizer.
        memory: with this model's keys.
        text: with [MASK] where the model is to answer.
        k: entries that each layer reads.
        store: what the memory serves, which knows the entries' domains; None: they are not told.
        answer: one token whose probability is followed; None: the model's own first guess.
        exclude: id of a document whose entries are not read.
        guesses: how many tokens are told for each mask.
        model_name, memory_name: what a person calls them.

    Raises:
        ConfigError: there is nothing to explain; says why.
    """
    asked_for = check_question(
        trained, text, k=k, entries=memory.info().entries, answer=answer, guesses=guesses
    )
    positions, asked = asked_for.positions, asked_for.answer
    tokens_1T = asked_for.tokens_1T.to(trained.device)
    lookup = LookupWithout(memory, k, torch.tensor([NOTHING]), exclude)
    output = _forward(trained, tokens_1T, lookup)
    layers = tuple(_reading(retrieval) for retrieval in output.retrievals)
    ids = list(dict.fromkeys(read.id for layer in layers for read in layer.entries))
    if not ids:
        raise ConfigError(
            "the memory found no entry for this text: it is empty, or every entry is excluded"
        )
    told = _probabilities(trained, output.logits, positions)[0]
    first_guesses = [asked if asked is not None else int(row.argmax()) for row in told]
    predictions = _predictions(trained, told, positions, [asked] * len(positions), guesses)
    left_out = torch.tensor(ids)
    without = _forward(
        trained,
        tokens_1T.expand(len(ids), -1),
        LookupWithout(memory, k, left_out, exclude),
    )
    told_without = _probabilities(trained, without.logits, positions)
    alone = _probabilities(trained, _forward(trained, tokens_1T, None).logits, positions)[0]
    effects = [
        Without(id=i, predictions=_predictions(trained, row, positions, first_guesses, guesses))
        for i, row in zip([*ids, None], [*told_without, alone], strict=True)
    ]
    return Explanation(
        text=text,
        model=model_name or str(trained.path),
        memory=memory_name,
        tokens=tuple(trained.tokenizer.convert_ids_to_tokens(tokens_1T[0].tolist())),
        k=k,
        predictions=predictions,
        layers=layers,
        entries=_texts(memory, store, ids),
        without=tuple(effects),
    )


def answer_token(trained: TrainedModel, answer: str) -> int:
    """The id of an answer. Raises ConfigError: it is not exactly one token that the model knows."""
    ids = trained.tokenizer(answer, add_special_tokens=False, verbose=False).input_ids
    if len(ids) != 1:
        pieces = trained.tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(
            f"the answer {answer!r} has {len(ids)} tokens for this model ({', '.join(pieces)}), "
            "and a [MASK] stands for one; give a word that is one token"
        )
    if ids[0] == trained.tokenizer.unk_token_id and answer != trained.tokenizer.unk_token:
        raise ConfigError(
            f"the answer {answer!r} is not in this model's vocabulary; give a word that is one of "
            "its tokens"
        )
    return int(ids[0])


@torch.no_grad()
def _forward(trained: TrainedModel, tokens_BT: Tensor, lookup: LookupWithout | None) -> Any:
    if lookup is None:
        trained.model.attach(None)  # says that it is meant so
    return trained.model(tokens_BT, lookup=lookup, output_attention=lookup is not None)


def _probabilities(
    trained: TrainedModel, logits_BTV: Tensor, positions: Sequence[int]
) -> list[Tensor]:
    """For each row the probabilities at the masks, float32 [m,V]."""
    return list(torch.softmax(logits_BTV[:, list(positions)].float(), -1).cpu())


def _predictions(
    trained: TrainedModel,
    told_mV: Tensor,
    positions: Sequence[int],
    asked: Sequence[int | None],
    guesses: int,
) -> tuple[Prediction, ...]:
    def guess(row_V: Tensor, token: int) -> Guess:
        name: str = trained.tokenizer.convert_ids_to_tokens(token)
        return Guess(token=name, probability=float(row_V[token]))

    return tuple(
        Prediction(
            position=position,
            guesses=tuple(guess(row_V, int(t)) for t in row_V.topk(guesses).indices),
            asked=None if wanted is None else guess(row_V, wanted),
        )
        for position, row_V, wanted in zip(positions, told_mV, asked, strict=True)
    )


def _reading(retrieval: Any) -> LayerReading:
    found = retrieval.retrieved
    attention_ATK = retrieval.attention_BATK[0]
    return LayerReading(
        layer=retrieval.layer,
        entries=tuple(
            EntryRead(
                id=int(entry_id),
                score=float(found.scores[0, place]),
                attention=tuple(tuple(head) for head in attention_ATK[:, :, place].tolist()),
            )
            for place, entry_id in enumerate(found.ids[0].tolist())
            if entry_id >= 0
        ),
    )


def _texts(memory: Memory, store: Store | None, ids: Sequence[int]) -> tuple[EntryText, ...]:
    domains: dict[int, str] = {}
    if store is not None:
        manifest = store.manifest(memory.info().content_version)
        domains = {i: found.domain for i, found in entries_by_id(store, manifest, ids).items()}
    return tuple(
        EntryText(
            id=entry.id,
            doc_id=entry.doc_id,
            domain=domains.get(entry.id, ""),
            title=entry.title,
            source=entry.source,
            text=entry.text,
        )
        for entry in memory.entries(list(ids))
    )


def _on(values_B: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values_B is None else values_B.to(like.device)


def _gathered(of_BK: Tensor, places_Bk: Tensor) -> Tensor:
    index = places_Bk.to(of_BK.device)
    for _ in range(of_BK.ndim - 2):
        index = index.unsqueeze(-1)
    return of_BK.gather(1, index.expand(-1, -1, *of_BK.shape[2:]))
