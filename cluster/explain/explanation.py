"""What an explanation consists of; plain values that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FORMAT = "pluglm-explanation-1"


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A token and its probability."""

    token: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says at one mask.

    Attributes:
        position: of the mask, in tokens.
        guesses: the most probable tokens, best first.
        asked: the probability of the answer that was asked for, if one was.
    """

    position: int
    guesses: tuple[Guess, ...]
    asked: Guess | None = None


@dataclass(frozen=True, kw_only=True)
class EntryRead:
    """How one layer read one entry.

    Attributes:
        id: of the entry.
        score: inner product of the layer's query and the entry's key, by which it was found.
        attention: share of this entry in the knowledge attention, for each head and for each token
            of the text; one row and one value for a model whose attention is one for all.
    """

    id: int
    score: float
    attention: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """What one memory layer read, best score first; `layer` is counted from 0."""

    layer: int
    entries: tuple[EntryRead, ...]


@dataclass(frozen=True, kw_only=True)
class EntryText:
    """An entry as a person knows it."""

    id: int
    doc_id: int
    domain: str
    title: str
    source: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Without:
    """The predictions of the same model when the memory does not hold this entry.

    Attributes:
        id: of the entry; None: the whole memory is unplugged.
        predictions: one per mask, in the order of the explanation's. `asked` is the probability of
            the answer asked for or, where none was, of the answer given with the entry.
    """

    id: int | None
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One text, what the model says, what it read, and what it would say without.

    Attributes:
        tokens: of the text, [CLS] and [SEP] included.
        k: entries that each layer asked for.
        predictions: one per mask.
        layers: one per memory layer.
        entries: every entry that a layer read, in the order in which it was first met.
        without: one per entry in the same order, and at last the one without any memory.
    """

    text: str
    model: str
    memory: str
    tokens: tuple[str, ...]
    k: int
    predictions: tuple[Prediction, ...]
    layers: tuple[LayerReading, ...]
    entries: tuple[EntryText, ...]
    without: tuple[Without, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, **asdict(self)}

    def change(self, number: int, mask: int) -> float:
        """How much a mask's answer loses in probability without the entry of this number; negative
        where it gains."""
        before = self.predictions[mask]
        given = before.asked or before.guesses[0]
        asked = self.without[number].predictions[mask].asked
        assert asked is not None
        return given.probability - asked.probability
