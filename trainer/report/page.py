"""Putting the report's page together and writing it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from trainer.report.edits import edits
from trainer.report.evaluation import evaluation, verdict
from trainer.report.markup import Html, join, tag
from trainer.report.run_data import RunData, read_run
from trainer.report.samples import samples
from trainer.report.sections import configuration, glance, text_source, training
from trainer.report.style import STYLE
from trainer.report.usage import usage

REPORT_FILE = "report.html"
# The browser itself then refuses scripts and every request, whatever an entry's text says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PLACES = (
    ("glance", "At a glance"),
    ("evaluation", "The memory's worth"),
    ("sentences", "Sentences"),
    ("edits", "Edits"),
    ("usage", "The memory's use"),
    ("training", "Training"),
    ("config", "Configuration"),
    ("text", "The text"),
)


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` from what the run directory holds.

    Parts that are missing or damaged are named in the report. The file is replaced by rename,
    so a reader never sees half of it.

    Args:
        run_dir: a run directory, finished or not.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: there is no such directory.
        OSError: the report cannot be written.
    """
    directory = Path(run_dir)
    path = directory / REPORT_FILE
    draft = directory / f".{REPORT_FILE}.{os.getpid()}.tmp"
    page = render(read_run(directory), written=datetime.now(UTC))
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def render(run: RunData, *, written: datetime) -> Html:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{run.name} · PlugLM run report"),
        tag("style", Html(STYLE)),
    )
    links = [tag("a", name, href=f"#{anchor}") for anchor, name in PLACES]
    remarks = [tag("p", remark, class_="warning", role="alert") for remark in run.remarks]
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "PlugLM · run report", class_="eyebrow"),
            tag("h1", run.name),
            tag("p", verdict(run), class_="verdict"),
            tag("nav", *links, aria_label="Sections"),
        ),
        tag(
            "main",
            *remarks,
            glance(run),
            evaluation(run),
            samples(run),
            edits(run),
            usage(run),
            training(run),
            configuration(run),
            text_source(run),
        ),
        tag("footer", f"Written {written:%Y-%m-%d %H:%M} UTC. This page loads nothing."),
    )
    return join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"), Html("\n"))
