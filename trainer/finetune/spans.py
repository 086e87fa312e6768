"""Named spans in BIO tags, and how well predicted spans agree with the file's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int, str]
"""First word, word behind the last, type."""


def is_bio(tags: Iterable[str]) -> bool:
    """Whether all tags are "O", "B-..." or "I-...", and some begin a span."""
    names = set(tags)
    return any(name.startswith("B-") for name in names) and all(
        name == "O" or name.startswith(("B-", "I-")) for name in names
    )


def bio_spans(tags: Sequence[str]) -> set[Span]:
    """The spans of one row.

    "B-x" begins a span of type x, "I-x" goes on with one of its type. An "I-x" that follows
    anything else begins a span, as the CoNLL shared tasks' scorer reads it.
    """
    spans = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix == "I" and name == kind
        if kind and not goes_on:
            spans.add((start, place, kind))
        if not goes_on:
            start, kind = place, name if prefix in ("B", "I") else ""
    return spans


def span_scores(
    predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of exact spans, counted over all rows (micro).

    A span counts as found when first word, last word and type are all right. Without any span
    on one side its share is 0; without any on both, all three are 0.
    """
    right = named = wanted = 0
    for row_predicted, row_gold in zip(predicted, gold, strict=True):
        found, true = bio_spans(row_predicted), bio_spans(row_gold)
        right += len(found & true)
        named += len(found)
        wanted += len(true)
    return {
        "span_f1": 2 * right / max(named + wanted, 1),
        "span_precision": right / max(named, 1),
        "span_recall": right / max(wanted, 1),
    }
