"""How the memory was used on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.figures import fixed, number, percent
from trainer.report.markup import Html, tag
from trainer.report.run_data import RunData, finite
from trainer.report.tables import absent, bar, scrollable, section
from trainer.report.training_usage import while_training


def usage(run: RunData) -> Html:
    """Which entries were read, how evenly, and which are alike."""
    title = "How the memory is used"
    found = run.usage
    training = while_training(run)
    if not found or not found.get("layers"):
        missing = "The use of the memory on held-out text has not been measured yet."
        return section("usage", title, absent(missing), *training)
    return section(
        "usage",
        title,
        *training,
        tag("h3", "On held-out text") if training else None,
        tag(
            "p",
            f"{_count(found, 'sequences')} held-out sequences read {_count(found, 'k')} entries "
            f"each, of {_count(found, 'entries')}. An attention entropy of 1 means that all "
            "entries of a sequence are read alike, 0 that one is read alone.",
        ),
        scrollable(_layers(found), "Use by layer"),
        *_shares(found, "by_domain", "Reading by domain"),
        *_shares(found, "by_source", "Reading by source"),
        *_most_used(found),
        *_alike(found),
    )


def _count(found: Mapping[str, Any], name: str) -> str:
    return number(finite(found.get(name)))


def _layers(found: Mapping[str, Any]) -> Html:
    head = (
        "layer",
        "entries read",
        "never read",
        "reading of the most read hundredth",
        "attention entropy",
    )
    rows = [
        tag(
            "tr",
            tag("th", layer.get("layer"), scope="row"),
            tag("td", _count(layer, "used")),
            tag("td", percent(finite(layer.get("never_used_share")))),
            tag("td", percent(finite(layer.get("reading_of_most_used_hundredth")))),
            tag("td", fixed(finite(layer.get("attention_entropy")), 2)),
        )
        for layer in found["layers"]
        if isinstance(layer, Mapping)
    ]
    columns = tag("tr", *(tag("th", name, scope="col") for name in head))
    return tag("table", tag("thead", columns), tag("tbody", *rows), class_="plain")


def _shares(found: Mapping[str, Any], name: str, title: str) -> list[Html]:
    shares = found.get(name)
    if not isinstance(shares, Mapping) or len(shares) < 2:
        return []  # one domain or source takes all: there is nothing to compare
    rows = [
        tag(
            "tr",
            tag("th", key or "(none)", scope="row"),
            tag("td", bar(finite(share) or 0.0, percent(finite(share)))),
            tag("td", percent(finite(share))),
        )
        for key, share in shares.items()
    ]
    return [tag("h3", title), tag("table", tag("tbody", *rows), class_="shares")]


def _most_used(found: Mapping[str, Any]) -> list[Html]:
    used = [entry for entry in found.get("most_used") or [] if isinstance(entry, Mapping)]
    if not used:
        return []
    items = [
        tag(
            "li",
            tag("strong", entry.get("title") or "(no title)"),
            f" ({_count(entry, 'times')} times): ",
            entry.get("text"),
        )
        for entry in used
    ]
    return [tag("details", tag("summary", "The entries that are read most"), tag("ul", *items))]


def _alike(found: Mapping[str, Any]) -> list[Html]:
    pairs = [pair for pair in found.get("alike") or [] if isinstance(pair, Mapping)]
    items = [
        tag(
            "li",
            f"cosine {fixed(finite(pair.get('cosine')), 3)}: ",
            *(
                part
                for entry in pair.get("entries") or []
                for part in (tag("strong", entry.get("title")), f" {entry.get('text')} ")
            ),
        )
        for pair in pairs
    ]
    if not items:
        return []
    title = "Entries that are nearly the same, among those read most"
    return [tag("details", tag("summary", title), tag("ul", *items))]
