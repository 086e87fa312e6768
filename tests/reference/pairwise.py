"""Few combinations of many settings in which every two values of two settings meet."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Choice = dict[str, Any]
Pair = frozenset[tuple[str, Any]]


def pairs_of(choice: Mapping[str, Any]) -> set[Pair]:
    """Every two settings of a choice with their values."""
    return {frozenset(pair) for pair in itertools.combinations(choice.items(), 2)}


def possible_pairs(
    settings: Mapping[str, Sequence[Any]], forbidden: Collection[Pair]
) -> list[Pair]:
    """Every two values of two settings that can be together."""
    every = [
        frozenset({(first, a), (second, b)})
        for first, second in itertools.combinations(settings, 2)
        for a, b in itertools.product(settings[first], settings[second])
    ]
    return [pair for pair in every if pair not in forbidden]


def pairwise(
    settings: Mapping[str, Sequence[Any]], forbidden: Collection[Pair] = ()
) -> list[Choice]:
    """Choices that together hold every possible pair.

    Each starts from a pair that has not been, and takes, setting by setting, the value that meets
    most new ones.

    Args:
        settings: the values of each setting; hashable.
        forbidden: pairs that cannot be configured.
    """
    missing = dict.fromkeys(possible_pairs(settings, forbidden))
    choices: list[Choice] = []
    while missing:
        choice: Choice = dict(next(iter(missing)))
        for name in settings:
            if name in choice:
                continue
            candidates = [choice | {name: value} for value in settings[name]]
            allowed = [c for c in candidates if not pairs_of(c) & set(forbidden)]
            assert allowed, f"no value of {name} goes with {choice}"
            choice = max(allowed, key=lambda c: len(pairs_of(c) & missing.keys()))
        for pair in pairs_of(choice):
            missing.pop(pair, None)
        choices.append({name: choice[name] for name in settings})
    return choices
