"""An explanation as one page of HTML that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cluster.explain.explanation import Explanation
from cluster.explain.page_assets import PAGE_SCRIPT, SCRIPT, STYLE
from trainer.report.markup import Html, join, tag
from trainer.report.style import STYLE as HOUSE_STYLE


def write_page(explanation: Explanation, path: Path) -> None:
    """Write the page; the file is replaced by rename. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(render(explanation), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def render(explanation: Explanation) -> Html:
    """The whole page: the explanation as JSON, and a script that draws it."""
    script = SCRIPT + PAGE_SCRIPT
    entries = len(explanation.entries)
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "PlugLM · why this answer", class_="eyebrow"),
            tag("p", id="text", class_="text", dir="auto"),
            tag(
                "p",
                "Point at a word to see what it read. Point at an entry to see who read it. Switch "
                "an entry off to see the answer without it.",
                class_="hint",
            ),
        ),
        tag("main", *answer_parts()),
        tag(
            "footer",
            f"Model {explanation.model}; memory {explanation.memory}; {explanation.k} entries per "
            "layer. Measured when this page was written: the answers without each of the "
            f"{entries} entries (the memory then gives the next best one in its place), and "
            "without any memory; not without several at once. This page loads nothing.",
        ),
        tag("script", Html(_data(explanation)), type="application/json", id="data"),
        tag("script", Html(script)),
    )
    return document(f"Why? · {explanation.text}", body, script=script)


def document(
    title: str, body: Html, *, script: str, connects: bool = False, style: str = ""
) -> Html:
    """A whole page that runs this script and no other.

    Args:
        connects: whether the script may ask the server that the page came from.
        style: beside the house's own.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = "'self'" if connects else "'none'"
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        f"connect-src {source}; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(HOUSE_STYLE + STYLE + style)),
    )
    return join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"), Html("\n"))


def answer_parts() -> list[Html]:
    """What the script draws an explanation into, below its text."""
    return [
        tag("div", id="answers", class_="answers", aria_live="polite"),
        tag(
            "div",
            tag("label", "memory ", tag("select", id="layer")),
            tag("label", "attention of ", tag("select", id="head")),
            tag(
                "button",
                "switch the whole memory off",
                id="whole",
                class_="switch",
                type="button",
            ),
            class_="controls",
        ),
        tag("div", id="entries", class_="list"),
        tag("noscript", tag("p", "This page is drawn by its own script.", class_="warning")),
    ]


def with_written_ids(values: Any) -> Any:
    """Ids as text: a browser's numbers are not exact beyond 2**53."""
    if isinstance(values, dict):
        return {
            name: str(value)
            if name in ("id", "doc_id") and value is not None
            else with_written_ids(value)
            for name, value in values.items()
        }
    if isinstance(values, list | tuple):
        return [with_written_ids(value) for value in values]
    return values


def _data(explanation: Explanation) -> str:
    """JSON that cannot end its script element, whatever an entry's text says."""
    values = with_written_ids(explanation.as_json())
    text = json.dumps(values, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
