"""Line charts as inline SVG: axes with units, a band for the spread, a read-out under the pointer.

Everything is static markup; the cross-hair is CSS (``:hover``) and each point also carries a
``<title>``. Colours come from the page's variables, so one chart serves light, dark and paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from trainer.report.figures import number, plural, tick_labels, ticks
from trainer.report.markup import Html, tag

WIDTH, HEIGHT = 560, 244
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 42
MAX_POINTS = 140  # more cannot be told apart at this width


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its name and its (step, value) pairs; None is a value that was not finite."""

    name: str
    points: Sequence[tuple[int, float | None]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What to draw. ``marks`` are (step, what happened) pairs, drawn as vertical lines."""

    title: str
    unit: str
    series: Sequence[Series]
    about: str = ""
    marks: Sequence[tuple[int, str]] = field(default=())
    mark_name: str = ""
    from_zero: bool = True
    show: Callable[[float], str] = number


@dataclass(frozen=True, kw_only=True)
class Point:
    """The steps first..last of one series drawn as one point; mean is None without a number."""

    first: int
    last: int
    mean: float | None
    low: float
    high: float


def condense(points: Sequence[tuple[int, float | None]], steps: Sequence[int]) -> list[Point]:
    """Average a line over at most MAX_POINTS equal stretches of the sorted ``steps``.

    Stretches are cut by step, so the series of one chart share them; a stretch in which the
    series has no point at all is left out.
    """
    low, high = steps[0], steps[-1]
    exact = len(steps) <= MAX_POINTS
    width = (high - low) / MAX_POINTS or 1.0
    stretches: dict[int, list[tuple[int, float | None]]] = {}
    for step, value in sorted(points, key=lambda pair: pair[0]):
        key = step if exact else min(MAX_POINTS - 1, int((step - low) / width))
        stretches.setdefault(key, []).append((step, value))
    condensed = []
    for _, pairs in sorted(stretches.items()):
        values = [value for _, value in pairs if value is not None]
        condensed.append(
            Point(
                first=pairs[0][0],
                last=pairs[-1][0],
                mean=fmean(values) if values else None,
                low=min(values, default=0.0),
                high=max(values, default=0.0),
            )
        )
    return condensed


def line_chart(chart: Chart) -> Html:
    """Draw a chart as a figure; a chart without a single number says so instead."""
    numbers = [v for s in chart.series for _, v in s.points if v is not None]
    if not numbers:
        return tag(
            "figure",
            tag("figcaption", tag("h3", chart.title)),
            tag("p", "No such numbers were recorded.", class_="absent"),
            class_="chart",
        )
    steps = sorted({step for s in chart.series for step, _ in s.points})
    lines = [condense(s.points, steps) for s in chart.series]
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("h3", chart.title),
            _legend(chart),
            tag("p", chart.about) if chart.about else None,
        ),
        _Plot(chart, lines, steps, numbers).draw(),
        class_="chart",
    )


def summary(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    parts = []
    for series in chart.series:
        found = [(step, value) for step, value in series.points if value is not None]
        if found:
            (first, start), (last, end) = found[0], found[-1]
            values = [value for _, value in found]
            parts.append(
                f"{series.name}: {chart.show(start)} at step {first:,}, {chart.show(end)} at step "
                f"{last:,}, lowest {chart.show(min(values))}, highest {chart.show(max(values))}"
            )
    marks = f" {plural(len(chart.marks), chart.mark_name)}." if chart.marks else ""
    return f"Line chart of {chart.title} ({chart.unit}) by step. {'; '.join(parts)}.{marks}"


def _legend(chart: Chart) -> Html | None:
    keys = [
        tag("li", tag("span", class_=f"key tone{i}"), series.name)
        for i, series in enumerate(chart.series)
        if len(chart.series) > 1
    ]
    if chart.marks:
        keys.append(tag("li", tag("span", class_="key mark"), chart.mark_name))
    return tag("ul", *keys, class_="legend") if keys else None


class _Plot:
    """The drawing of one chart: scales first, then back to front."""

    def __init__(
        self,
        chart: Chart,
        lines: Sequence[Sequence[Point]],
        steps: Sequence[int],
        numbers: Sequence[float],
    ) -> None:
        self.chart = chart
        self.lines = lines
        low, high = min(numbers), max(numbers)
        self.y_ticks = ticks(min(0.0, low) if chart.from_zero else low, high, 4)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]
        self.x_low, self.x_high = steps[0], max(steps[-1], steps[0] + 1)
        self.x_ticks = [t for t in ticks(self.x_low, self.x_high, 6) if t == int(t)]
        self.x_ticks = [t for t in self.x_ticks if self.x_low <= t <= self.x_high]

    def x(self, step: float) -> float:
        share = (step - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def draw(self) -> Html:
        marks = [self._mark(step, what) for step, what in self.chart.marks]
        drawn = [part for i, line in enumerate(self.lines) for part in self._line(i, line)]
        return tag(
            "svg",
            *self._axes(),
            *marks,
            *drawn,
            *self._hits(),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=summary(self.chart),
        )

    def _axes(self) -> list[Html]:
        parts = [
            tag("text", self.chart.unit, x=2, y=14, class_="unit"),
            tag(
                "text",
                "optimizer step",
                x=(LEFT + WIDTH - RIGHT) / 2,
                y=HEIGHT - 6,
                class_="unit middle",
            ),
        ]
        for value, label in zip(self.y_ticks, tick_labels(self.y_ticks), strict=True):
            y = self.y(value)
            kind = "axis" if value == self.y_low else "grid"
            parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_=kind))
            parts.append(tag("text", label, x=LEFT - 8, y=y + 4, class_="tick end"))
        if self.x_ticks:
            for value, label in zip(self.x_ticks, tick_labels(self.x_ticks), strict=True):
                x, y = self.x(value), HEIGHT - BOTTOM
                parts.append(tag("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"))
                parts.append(tag("text", label, x=x, y=y + 17, class_="tick middle"))
        return parts

    def _mark(self, step: int, what: str) -> Html:
        x, bottom = self.x(min(max(step, self.x_low), self.x_high)), HEIGHT - BOTTOM
        return tag(
            "g",
            tag("line", x1=x, x2=x, y1=TOP, y2=bottom),
            tag("path", d=f"M{x - 4},{TOP - 5}h8l-4,6z"),
            tag("title", what),
            class_="mark",
        )

    def _line(self, tone: int, line: Sequence[Point]) -> list[Html]:
        parts = []
        for run in _runs(line):
            means = [f"{self.x(_middle(p))},{self.y(p.mean or 0.0)}" for p in run]
            if any(p.high > p.low for p in run):
                top = [f"{self.x(_middle(p))},{self.y(p.high)}" for p in run]
                foot = [f"{self.x(_middle(p))},{self.y(p.low)}" for p in reversed(run)]
                parts.append(tag("path", d=f"M{'L'.join(top + foot)}z", class_=f"band tone{tone}"))
            if len(run) > 1:
                parts.append(tag("path", d=f"M{'L'.join(means)}", class_=f"line tone{tone}"))
            if len(line) <= 12 or len(run) == 1:
                dots = (mean.split(",") for mean in means)
                parts += [tag("circle", cx=x, cy=y, r=3, class_=f"dot tone{tone}") for x, y in dots]
        return parts

    def _hits(self) -> list[Html]:
        """Invisible columns, one a stretch of steps, that show their numbers under the pointer."""
        at: dict[int, list[tuple[int, Point]]] = {}
        for tone, line in enumerate(self.lines):
            for point in line:
                at.setdefault(point.first, []).append((tone, point))
        firsts = sorted(at)
        hits = []
        for i, first in enumerate(firsts):
            x = self.x(_middle(at[first][0][1]))
            before = self.x(_middle(at[firsts[i - 1]][0][1])) if i else LEFT
            after = self.x(_middle(at[firsts[i + 1]][0][1])) if i + 1 < len(firsts) else None
            left = (before + x) / 2 if i else LEFT
            right = (x + after) / 2 if after is not None else WIDTH - RIGHT
            said = self._said(at[first])
            hits.append(
                tag(
                    "g",
                    tag(
                        "rect",
                        x=round(left, 1),
                        y=TOP,
                        width=round(max(right - left, 0.5), 1),
                        height=HEIGHT - TOP - BOTTOM,
                    ),
                    tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM),
                    *(
                        tag("circle", cx=x, cy=self.y(p.mean), r=4, class_=f"dot tone{tone}")
                        for tone, p in at[first]
                        if p.mean is not None
                    ),
                    tag("text", said, x=WIDTH - RIGHT, y=14, class_="end"),
                    tag("title", said),
                    class_="hit",
                )
            )
        return hits

    def _said(self, found: Sequence[tuple[int, Point]]) -> str:
        point = found[0][1]
        where = f"step {point.first:,}"
        if point.last > point.first:
            where = f"steps {point.first:,} to {point.last:,}"
        values = []
        for tone, p in found:
            shown = "not a number" if p.mean is None else self.chart.show(p.mean)
            name = f"{self.chart.series[tone].name} " if len(self.chart.series) > 1 else ""
            values.append(f"{name}{shown}")
        return f"{where}: {', '.join(values)}"


def _middle(point: Point) -> float:
    return (point.first + point.last) / 2


def _runs(line: Sequence[Point]) -> list[list[Point]]:
    """The stretches of the line between the points that are no numbers."""
    runs: list[list[Point]] = [[]]
    for point in line:
        if point.mean is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]
