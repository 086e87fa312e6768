"""An explanation as a terminal shows it."""

from __future__ import annotations

from cluster.cli.text import snippet, table
from cluster.explain.explanation import Explanation, Prediction

_BAR = "█"
_BAR_WIDTH = 10


def describe(explanation: Explanation, *, width: int = 120) -> str:
    """Predictions, and below them what each layer read and what it was worth."""
    parts = [_sentence(explanation)]
    alone = explanation.without[-1].predictions
    for number, prediction in enumerate(explanation.predictions):
        parts.append(_prediction(explanation, prediction, alone[number]))
    effects = {one.id: place for place, one in enumerate(explanation.without)}
    texts = {entry.id: entry for entry in explanation.entries}
    for reading in explanation.layers:
        rows = []
        for rank, read in enumerate(reading.entries, start=1):
            entry = texts[read.id]
            changes = [
                f"{-100 * explanation.change(effects[read.id], mask):+.1f}"
                for mask in range(len(explanation.predictions))
            ]
            rows.append(
                [
                    str(rank),
                    f"{read.score:.3f}",
                    _attention(explanation, read.attention),
                    " ".join(changes),
                    entry.title,
                    entry.domain or entry.source,
                    entry.text,
                ]
            )
        head = ("rank", "score", "attention", "without it", "title", "domain", "text")
        shown = table(
            head, rows, most=(4, 9, 18, 24, 24, 16, max(30, width - 100)), right=(0, 1, 3)
        )
        parts.append(f"memory layer {reading.layer}\n{shown}")
    parts.append(
        "attention: mean over heads at the [MASK]s; without it: change of the answer's "
        "probability, in points of percent,\nwhen the memory does not hold this entry and the next "
        "best one takes its place, per [MASK]"
    )
    return "\n\n".join(parts)


def _sentence(explanation: Explanation) -> str:
    return snippet(explanation.text, 400)


def _prediction(explanation: Explanation, prediction: Prediction, alone: Prediction) -> str:
    several = len(explanation.predictions) > 1
    where = f"[MASK] at token {prediction.position}" if several else "[MASK]"
    guesses = ", ".join(f"{g.token} {100 * g.probability:.1f} %" for g in prediction.guesses)
    given = prediction.asked or prediction.guesses[0]
    assert alone.asked is not None
    first = alone.guesses[0]
    lines = [f"{where}: {guesses}"]
    if prediction.asked is not None:
        lines.append(f"  the answer {given.token}: {100 * given.probability:.1f} %")
    lines.append(
        f"  without any memory: {first.token} {100 * first.probability:.1f} %; {given.token} "
        f"{100 * alone.asked.probability:.1f} %"
    )
    return "\n".join(lines)


def _attention(explanation: Explanation, attention: tuple[tuple[float, ...], ...]) -> str:
    """A bar and the share, at the masks where attention is each token's own."""
    positions = [prediction.position for prediction in explanation.predictions]
    shares = [
        head[position] if len(head) > 1 else head[0] for head in attention for position in positions
    ]
    share = sum(shares) / len(shares)
    bar = _BAR * round(_BAR_WIDTH * share)
    return f"{100 * share:5.1f} % {bar}"
