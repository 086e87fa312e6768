"""Held-out sentences: what was masked, what the model said, and which entries it read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.figures import fixed, percent
from trainer.report.markup import Html, join, tag
from trainer.report.run_data import RunData, finite
from trainer.report.tables import absent, bar, section

FRAME = frozenset({"[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<pad>"})
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
TIGHT_BEFORE = frozenset(f".,;:!?)]}}%'{APOSTROPHE}-/")
TIGHT_AFTER = frozenset(f"([{{'{APOSTROPHE}-/$#")
SHOWN_PREDICTIONS = 3
SHORTEST_HIGHLIGHT = 3  # a shorter word is in every text


def samples(run: RunData) -> Html:
    """All samples, one card each."""
    title = "Held-out sentences"
    found = [s for s in run.samples or [] if isinstance(s, Mapping)]
    if not found:
        return section("sentences", title, absent("No sentences were sampled in this run."))
    return section(
        "sentences",
        title,
        tag(
            "p",
            "The numbered words were hidden from the model, which had to tell them from the rest "
            "of the sentence and from the entries it read: ",
            tag("span", "solid green", class_="masked told"),
            " is a first guess that is right, ",
            tag("span", "dotted red", class_="masked missed"),
            " one that is not; ",
            tag("span", "✓", class_="yes"),
            " is the true word among the guesses. In the entries the hidden words are ",
            tag("mark", "marked"),
            " for the reader only.",
        ),
        tag("p", helped(found)),
        *(_card(sample, place) for place, sample in enumerate(found, 1)),
    )


def helped(found: Sequence[Mapping[str, Any]]) -> str:
    """How many of the hidden words are guessed right, with the memory and without."""
    masks = [m for sample in found for m in sample.get("masked", []) if isinstance(m, Mapping)]
    right, plain = (
        sum(first_guess(m, key) == str(m.get("truth")) for m in masks)
        for key in ("predictions", "predictions_without_memory")
    )
    return (
        f"Of the {len(masks)} hidden word pieces below, the first guess is right for {right} with "
        f"the memory and for {plain} without."
    )


def _card(sample: Mapping[str, Any], place: int) -> Html:
    masked = [m for m in sample.get("masked", []) if isinstance(m, Mapping)]
    masked.sort(key=lambda mask: finite(mask.get("position")) or 0.0)
    words = hidden_words(sample.get("tokens", []), masked)
    return tag(
        "article",
        tag("h3", f"Sentence {place}"),
        tag("p", sentence(sample, masked), class_="sentence"),
        _predictions(masked),
        *_layers(sample, words),
        class_="sample",
        id=f"sentence-{place}",
    )


def sentence(sample: Mapping[str, Any], masked: Sequence[Mapping[str, Any]]) -> Html:
    """The tokens as running text, with each masked one in its place, numbered."""
    numbers = {m.get("position"): i for i, m in enumerate(masked, 1)}
    parts: list[Html] = []
    before = ""
    for position, token in enumerate(sample.get("tokens", [])):
        mask = numbers.get(position)
        piece = str(masked[mask - 1].get("truth", token)) if mask else str(token)
        if piece in FRAME and not mask:
            continue
        glued = piece.startswith("##") and len(piece) > len("##")
        shown = piece[2:] if glued else piece
        tight = glued or shown[:1] in TIGHT_BEFORE or before[-1:] in TIGHT_AFTER
        if before and not tight:
            parts.append(join(" "))
        if mask:
            right = first_guess(masked[mask - 1]) == piece
            parts.append(
                tag(
                    "span",
                    shown,
                    tag("sup", mask),
                    class_=f"masked {'told' if right else 'missed'}",
                )
            )
        else:
            parts.append(join(shown))
        before = shown
    return join(*parts) if parts else join(sample.get("text", ""))


def first_guess(mask: Mapping[str, Any], key: str = "predictions") -> str | None:
    """The most probable token, or None when no prediction was recorded."""
    guesses = [g for g in mask.get(key) or [] if isinstance(g, Mapping)]
    best = max(guesses, key=lambda g: finite(g.get("probability")) or 0.0, default=None)
    return None if best is None else str(best.get("token"))


def hidden_words(tokens: Sequence[object], masked: Sequence[Mapping[str, Any]]) -> list[str]:
    """The whole words that hold a masked piece, for finding them again in an entry."""
    truth = {m.get("position"): str(m.get("truth", "")) for m in masked}
    words: list[tuple[str, bool]] = []
    for position, token in enumerate(tokens):
        piece = truth.get(position, str(token))
        if piece.startswith("##") and words:
            word, hidden = words[-1]
            words[-1] = (word + piece[2:], hidden or position in truth)
        else:
            words.append((piece, position in truth))
    found = {word for word, hidden in words if hidden and len(word) >= SHORTEST_HIGHLIGHT}
    return sorted(found | {w for w, hidden in words if hidden and w.isdecimal()})


def highlight(text: str, words: Sequence[str]) -> Html:
    """The text with every whole-word occurrence of the words marked, in any case."""
    if not words:
        return join(text)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    pieces = pattern.split(text)
    return join(*(tag("mark", p) if i % 2 else p for i, p in enumerate(pieces)))


def _predictions(masked: Sequence[Mapping[str, Any]]) -> Html:
    if not masked:
        return absent("No word of this sentence was masked.")
    rows = [
        tag(
            "tr",
            tag("th", tag("sup", place), " ", _piece(mask.get("truth", "")), scope="row"),
            tag("td", _guesses(mask, "predictions", "tone0")),
            tag("td", _guesses(mask, "predictions_without_memory", "quiet")),
        )
        for place, mask in enumerate(masked, 1)
    ]
    names = ("Hidden word", "Guesses with the memory", "Guesses without")
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="guesses")


def _guesses(mask: Mapping[str, Any], key: str, tone: str) -> Html:
    guesses = [g for g in mask.get(key) or [] if isinstance(g, Mapping)]
    if not guesses:
        return tag("span", "not recorded", class_="absent")
    guesses.sort(key=lambda g: -(finite(g.get("probability")) or 0.0))
    items = []
    for guess in guesses[:SHOWN_PREDICTIONS]:
        token, share = str(guess.get("token")), finite(guess.get("probability")) or 0.0
        right = token == str(mask.get("truth"))
        items.append(
            tag(
                "li",
                tag("span", _piece(token), tag("span", " ✓", class_="yes") if right else None),
                bar(share, percent(share, 1), tone),
                tag("span", percent(share), class_="share"),
                class_="right" if right else None,
            )
        )
    return tag("ol", *items)


def _piece(token: object) -> Html:
    """A word piece; one that goes on a word begins with an ellipsis instead of ``##``."""
    piece = str(token)
    return join("…" + piece[2:] if piece.startswith("##") and len(piece) > len("##") else piece)


def _layers(sample: Mapping[str, Any], words: Sequence[str]) -> list[Html]:
    layers = [layer for layer in sample.get("layers", []) if isinstance(layer, Mapping)]
    if not layers:
        return [absent("No entry was read for this sentence.")]
    return [
        tag(
            "details",
            tag("summary", f"Entries read by layer {layer.get('layer', '?')}"),
            tag("ol", *(_entry(e, words) for e in layer.get("entries", [])), class_="entries"),
            open=place == 0,
        )
        for place, layer in enumerate(layers)
    ]


def _entry(entry: Mapping[str, Any], words: Sequence[str]) -> Html:
    weight, score = finite(entry.get("weight")), finite(entry.get("score"))
    own = bool(entry.get("own_document"))
    badge = tag("span", "own document", class_="badge")
    return tag(
        "li",
        tag(
            "div",
            tag("b", f"weight {percent(weight)}"),
            None if weight is None else bar(weight, f"attention weight {percent(weight, 1)}"),
            tag("span", f"score {fixed(score, 2)}"),
            class_="weight",
        ),
        tag(
            "div",
            tag("h4", entry.get("title") or "untitled", badge if own else None),
            tag("p", highlight(str(entry.get("text", "")), words)),
            tag("p", f"{entry.get('source') or 'no source'} · entry {entry.get('id', '?')}"),
        ),
    )
