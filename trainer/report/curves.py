"""Which charts a run's metrics make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.charts import Chart, Series
from trainer.report.figures import byte_unit, number
from trainer.report.run_data import RunData, finite


def curves(run: RunData) -> list[Chart]:
    """The charts that the recorded numbers allow; those every run has come even when empty."""
    marks = [
        (
            int(line["step"]),
            f"step {line['step']:,}: memory epoch {line.get('epoch', '?')} went live",
        )
        for line in run.of_kind("refresh")
    ]
    charts = [
        Chart(
            title="Masked-LM loss",
            unit="nats per masked word piece",
            series=[run.series("mlm_loss" if run.values("mlm_loss") else "loss", "training")],
            from_zero=False,
        )
    ]
    held_out = _held_out(run)
    if held_out:
        charts.append(
            Chart(
                title="Held-out loss while training",
                unit="nats per masked word piece",
                series=held_out,
                from_zero=False,
            )
        )
    if run.values("retrieval_loss"):
        charts.append(
            Chart(
                title="Retrieval warm-up loss",
                unit="nats",
                about="Telling the entry of the sequence's own document from the batch's others.",
                series=[run.series("retrieval_loss", "retrieval")],
            )
        )
    for name, title, about in (
        ("right_entry_rate", "Right entry retrieved", "Share of sequences."),
        ("mlm_accuracy", "Masked word pieces predicted right", "Share of masks, while training."),
    ):
        if run.values(name):
            shares = run.series(name, title)
            points = [(s, None if v is None else 100 * v) for s, v in shares.points]
            series = [Series(name=title, points=points)]
            charts.append(Chart(title=title, unit="%", about=about, series=series))
    rate = run.series("sequences_per_s", "throughput")
    charts.append(Chart(title="Throughput", unit="sequences / s", series=[rate]))
    waits = run.series("retrieval_ms", "retrieval")
    charts.append(Chart(title="Retrieval latency", unit="ms / batch", series=[waits]))
    stale = run.series("staleness_steps", "staleness")
    charts.append(
        Chart(
            title="Staleness of the memory's keys",
            unit="steps",
            about="Optimizer steps since the weights that made the keys.",
            series=[stale],
            marks=marks,
            mark_name="memory refresh",
        )
    )
    rss = run.series("rss_gib", "trainer process")
    charts.append(Chart(title="Memory of the trainer process", unit="GiB", series=[rss]))
    charts.append(_memory_size(run))
    return charts


def _held_out(run: RunData) -> list[Series]:
    names = {"loss": "with its memory"}
    for line in run.of_kind("eval"):
        for key in line:
            if key.startswith("loss_") and finite(line[key]) is not None:
                names[key] = key.removeprefix("loss_").replace("_", " ")
    found = [run.series(key, label, kind="eval") for key, label in names.items()]
    return [series for series in found if any(v is not None for _, v in series.points)]


def _memory_size(run: RunData) -> Chart:
    """Bytes of the memory server; a line may hold one number or a number by part."""
    points: list[tuple[int, float | None]] = []
    parts: Mapping[str, Any] = {}
    for line in run.of_kind("train"):
        size = line.get("memory_bytes")
        if isinstance(size, Mapping):
            parts = size
            size = sum(finite(part) or 0.0 for part in size.values())
        if (total := finite(size)) is not None:
            points.append((int(line["step"]), total))
    unit, scale = byte_unit(max((v for _, v in points if v is not None), default=0.0))
    scaled = [(step, None if v is None else v / scale) for step, v in points]
    held = [f"{name} {number((finite(v) or 0.0) / scale)} {unit}" for name, v in parts.items()]
    return Chart(
        title="Size of the plug-in memory",
        unit=unit,
        about=f"At the end: {', '.join(held)}." if held else "",
        series=[Series(name="memory server", points=scaled)],
    )
