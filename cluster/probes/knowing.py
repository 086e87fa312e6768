"""Which entries of a memory can tell a fact: those that hold its subject and its object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from cluster.probes.reading import Fitted
from cluster.trained_model import TrainedModel
from memory_server.store.store import Store

Words = tuple[int, ...]


def stating_entries(trained: TrainedModel, store: Store, fitted: Fitted) -> list[tuple[int, ...]]:
    """The ids of the head's entries in which a probe's subject and object occur together.

    What counts is what the model reads: an entry's tokens, so a title only where entries begin
    with it. The object must stand beside the subject, not within it. One pass over all entries.

    Returns:
        For each probe its entries' ids, ascending; () where there is none.
    """
    begins_inside = _begins_inside(trained)
    asked: dict[Words, dict[int, list[int]]] = {}  # subject, object: places of the probes
    for place, (probe, answer) in enumerate(zip(fitted.probes, fitted.answers, strict=True)):
        for words in _spellings(trained, probe.subject):
            asked.setdefault(words, {}).setdefault(answer, []).append(place)
    # By their first two tokens, which few subjects share.
    starting: dict[Words, list[Words]] = {}
    for words in asked:
        starting.setdefault(words[:2], []).append(words)
    found: list[set[int]] = [set() for _ in fitted.probes]
    for entry, tokens in _entries(store):
        for start in range(len(tokens)):
            for length in (1, 2):
                for words in starting.get(tuple(tokens[start : start + length]), ()):
                    end = start + len(words)
                    if tuple(tokens[start:end]) != words or end - start < length:
                        continue
                    if end < len(tokens) and tokens[end] in begins_inside:
                        continue  # a longer word than the subject's
                    beside = _whole(tokens[:start], begins_inside, tokens[start])
                    beside |= _whole(tokens[end:], begins_inside, None)
                    for answer in asked[words].keys() & beside:
                        for place in asked[words][answer]:
                            found[place].add(entry)
    return [tuple(sorted(ids)) for ids in found]


def knowing(fitted: Fitted, *stated: Sequence[Sequence[int]]) -> Fitted:
    """The probes, each with whether the memory can know it: whether any of `stated` has an entry.

    Args:
        stated: as `stating_entries` returns it, for one content of the memory or several.
    """
    can = [any(entries) for entries in zip(*stated, strict=True)]
    probes = [replace(probe, known=yes) for probe, yes in zip(fitted.probes, can, strict=True)]
    return replace(fitted, probes=tuple(probes))


def _spellings(trained: TrainedModel, subject: str) -> set[Words]:
    """A subject's tokens as within a sentence and as at its start; most tokenizers make one."""
    made = (
        tuple(trained.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        for text in (subject, f" {subject}")
    )
    return {words for words in made if words}


def _begins_inside(trained: TrainedModel) -> frozenset[int]:
    """The tokens that go on with a word (WordPiece's ##...); none for tokenizers without such."""
    backend = getattr(trained.tokenizer, "backend_tokenizer", None)
    prefix = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)
    if not prefix:
        return frozenset()
    vocabulary = trained.tokenizer.get_vocab()
    return frozenset(number for token, number in vocabulary.items() if token.startswith(prefix))


def _whole(tokens: Sequence[int], inside: frozenset[int], following: int | None) -> set[int]:
    """The tokens that are words of their own."""
    after: Iterable[int | None] = (*tokens[1:], following)
    return {token for token, then in zip(tokens, after, strict=False) if then not in inside}


def _entries(store: Store) -> Iterator[tuple[int, list[int]]]:
    """The head's live entries: id and tokens, without what pads them."""
    pad = store.meta.pad_token_id
    for ref in store.manifest().segments:
        segment = store.segment(ref)
        for row in store.live_rows(ref):
            tokens = np.asarray(segment.tokens[row])
            yield int(segment.ids[row]), tokens[tokens != pad].tolist()
