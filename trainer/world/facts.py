"""Worlds of facts, each a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.data import rng
from trainer.world.words import GIVERS, RECEIVERS, THINGS, VERBS

FACTS_PER_WORLD = 500
IDS_PER_WORLD = 1000
"""Ids that belong to one world; those that its facts leave free are for edits."""
SOURCE = "synthetic world"

_SUBJECTS = len(GIVERS) * len(VERBS) * len(RECEIVERS)


class Purpose(IntEnum):
    """What a draw is for; apart from those of `trainer.data.rng`, so that none share numbers."""

    SUBJECT = 1001
    THING = 1002
    QUESTION = 1003


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact: "mira sold tobar honey". Its entry in the memory has the same id."""

    id: int
    giver: str
    verb: str
    receiver: str
    thing: str

    @property
    def words(self) -> tuple[str, str, str, str]:
        """The fact's tokens, one per role."""
        return self.giver, self.verb, self.receiver, self.thing

    @property
    def text(self) -> str:
        """The fact as a sentence."""
        return " ".join(self.words)

    @property
    def question(self) -> str:
        """The sentence with the thing left out."""
        return f"{self.giver} {self.verb} {self.receiver} [MASK]"

    def with_thing(self, thing: str, *, id: int | None = None) -> Fact:
        """The same fact about another thing.

        Raises:
            ValueError: there is no such thing in the world.
        """
        if thing not in THINGS:
            raise ValueError(
                f"{thing!r} is no thing of the synthetic world; take one of {', '.join(THINGS)}"
            )
        return replace(self, thing=thing, id=self.id if id is None else id)


@dataclass(frozen=True)
class World:
    """Facts drawn from nothing but (seed, index), so no world tells anything about another.

    No two facts of a world share giver, verb and receiver; the thing of each is drawn evenly.

    Args:
        seed: of all worlds of a run.
        index: which of them.
        size: facts, at most `IDS_PER_WORLD`.
    """

    seed: int
    index: int
    size: int = FACTS_PER_WORLD

    def __post_init__(self) -> None:
        if self.index < 0 or not 1 <= self.size <= IDS_PER_WORLD:
            raise ValueError(
                f"world index={self.index}, size={self.size}: the index must be at least 0 and the "
                f"size from 1 to {IDS_PER_WORLD}"
            )

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The facts; ids are `index` * `IDS_PER_WORLD` + 0, 1, 2, ..."""
        order = rng.bits(self._key(Purpose.SUBJECT), np.arange(_SUBJECTS))
        subjects = np.argsort(order, kind="stable")[: self.size]
        things = draw_below(len(THINGS), self._key(Purpose.THING), self.size)
        verbs, rest = np.divmod(subjects, len(GIVERS) * len(RECEIVERS))
        givers, receivers = np.divmod(rest, len(RECEIVERS))
        return tuple(
            Fact(
                id=self.index * IDS_PER_WORLD + n,
                giver=GIVERS[givers[n]],
                verb=VERBS[verbs[n]],
                receiver=RECEIVERS[receivers[n]],
                thing=THINGS[things[n]],
            )
            for n in range(self.size)
        )

    def questions(self, step: int, count: int) -> NDArray[np.int64]:
        """Which facts the batch of a step asks for: int64 [count], drawn with replacement."""
        key = rng.derive_key(self.seed, step, Purpose.QUESTION)
        return draw_below(self.size, key, count)

    def _key(self, purpose: Purpose) -> rng.UInt64Array:
        return rng.derive_key(self.seed, self.index, purpose)


def draw_below(limit: int, key: rng.UInt64Array, count: int) -> NDArray[np.int64]:
    """Draw `count` integers of [0, limit), int64, evenly and with replacement."""
    return (rng.uniform(key, np.arange(count)) * limit).astype(np.int64)


def another_thing(fact: Fact, avoid: Sequence[str] = ()) -> str:
    """A thing that is neither the fact's own nor among those to avoid; always the same one.

    Raises:
        ValueError: nothing is left.
    """
    start = THINGS.index(fact.thing)
    for thing in (*THINGS[start + 1 :], *THINGS[:start]):
        if thing not in avoid:
            return thing
    raise ValueError(f"every thing but {fact.thing!r} is to be avoided; avoid fewer")
