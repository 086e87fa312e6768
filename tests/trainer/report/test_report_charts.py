"""Charts: what is drawn is what was measured."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report.charts import MAX_POINTS, Chart, Series, condense, line_chart, summary
from trainer.report.figures import (
    DASH,
    byte_unit,
    number,
    percent,
    seconds,
    signed,
    tick_labels,
    ticks,
)
from trainer.report.tables import bar, sparse_table


def draw(*series: Series, **options: object) -> ElementTree.Element:
    chart = Chart(title="Loss & more", unit="nats", series=series, **options)  # type: ignore[arg-type]
    return ElementTree.fromstring(line_chart(chart))


def paths(figure: ElementTree.Element, kind: str) -> list[list[tuple[float, float]]]:
    found = [p.get("d", "") for p in figure.iter("path") if kind in p.get("class", "").split()]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path)] for path in found
    ]


def test_a_line_rises_with_its_values_and_spans_the_steps() -> None:
    figure = draw(Series(name="loss", points=[(0, 0.0), (50, 5.0), (100, 10.0)]))
    ((start, middle, end),) = paths(figure, "line")
    assert start[0] < middle[0] < end[0]
    assert middle == pytest.approx(((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), abs=0.1)
    assert end[1] < start[1]  # SVG counts downwards
    labels = [t.text for t in figure.iter("text") if "tick" in t.get("class", "")]
    assert {"0", "5", "10", "40", "100"} <= set(labels)
    assert "optimizer step" in [t.text for t in figure.iter("text")]


def test_a_number_that_is_missing_breaks_the_line() -> None:
    figure = draw(Series(name="loss", points=[(1, 1.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.0)]))
    assert [len(line) for line in paths(figure, "line")] == [2, 2]
    assert "step 3: not a number" in [t.text for t in figure.iter("title")]


def test_one_point_is_drawn_and_none_says_so() -> None:
    assert len(list(draw(Series(name="a", points=[(7, 1.0)])).iter("circle"))) == 2
    nothing = draw(Series(name="a", points=[(7, None)]))
    assert nothing.find("svg") is None
    assert "No such numbers were recorded." in "".join(nothing.itertext())


def test_marks_carry_what_happened() -> None:
    points = [(0, 1.0), (10, 2.0)]
    figure = draw(
        Series(name="a", points=points), marks=[(5, "epoch 2 <live>")], mark_name="refresh"
    )
    (mark,) = (g for g in figure.iter("g") if g.get("class") == "mark")
    assert [t.text for t in mark.iter("title")] == ["epoch 2 <live>"]


def test_two_series_have_a_legend_and_words_for_those_who_cannot_see() -> None:
    series = [
        Series(name="with", points=[(1, 4.0), (9, 2.0)]),
        Series(name="without", points=[(1, 4.5)]),
    ]
    chart = Chart(title="Loss", unit="nats", series=series)
    assert "with: 4 at step 1, 2 at step 9, lowest 2, highest 4" in summary(chart)
    figure = draw(*series)
    assert [i.text or "".join(i.itertext()) for i in figure.iter("li")] == ["with", "without"]
    (svg,) = figure.iter("svg")
    assert svg.get("role") == "img"
    assert "without" in svg.get("aria-label", "")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600))
def test_condensing_keeps_the_range_and_bounds_the_points(values: list[float]) -> None:
    points = [(step, value) for step, value in enumerate(values)]
    found = condense(points, range(len(values)))
    assert len(found) <= MAX_POINTS
    assert min(p.low for p in found) == min(values)
    assert max(p.high for p in found) == max(values)
    assert [p.first for p in found] == sorted({p.first for p in found})
    assert (found[0].first, found[-1].last) == (0, len(values) - 1)
    assert all(p.mean is not None and p.low - 1e-6 <= p.mean <= p.high + 1e-6 for p in found)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_cover_the_range_evenly_with_labels_that_differ(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return  # nearer together than a chart of floats can show
    found = ticks(low, high, 4)
    slack = 1e-6 * (high - low)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 7
    apart = found[1] - found[0]
    assert all(math.isclose(b - a, apart, rel_tol=1e-6) for a, b in pairwise(found))


def test_ticks_of_a_flat_line_and_their_labels() -> None:
    assert ticks(5.0, 5.0, 4)[0] < 5.0 < ticks(5.0, 5.0, 4)[-1]
    assert ticks(0.0, 0.0, 4)[0] < 0.0 < ticks(0.0, 0.0, 4)[-1]
    assert tick_labels([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert tick_labels([0.0, 2000.0]) == ["0", "2,000"]
    assert tick_labels([0.0, 2e6]) == ["0M", "2M"]


def test_numbers_as_people_read_them() -> None:
    assert [number(v) for v in (None, 0.0, 3.14159, 0.01234, 96.04, 1500.4, 1.2e-5, -2.5)] == [
        DASH, "0", "3.14", "0.0123", "96.0", "1,500", "1.2e\N{MINUS SIGN}05", "\N{MINUS SIGN}2.50",
    ]  # fmt: skip
    assert [seconds(v) for v in (None, 0.0495, 6.21, 540.0, 7260.0)] == [
        DASH, "50 ms", "6.2 s", "9 min", "2 h 01 min",
    ]  # fmt: skip
    assert (percent(0.913), percent(None), signed(0.5, 1)) == ("91 %", DASH, "+0.5")
    assert byte_unit(3 * 2**20) == ("MiB", 2.0**20)


def test_a_bar_stays_within_its_track_and_speaks() -> None:
    assert 'style="width:100.0%"' in bar(1.7, "loss 1.7")
    assert 'style="width:0.0%"' in bar(-1.0, "none")
    assert 'aria-label="loss 1.7"' in bar(1.7, "loss 1.7")


def test_the_table_of_a_long_run_keeps_its_ends() -> None:
    points = [(step, float(step)) for step in range(1, 1001)]
    table = ElementTree.fromstring(
        sparse_table([("loss", Series(name="l", points=points))], rows=5)
    )
    assert [th.text for th in table.iter("th")][2:] == ["1", "251", "501", "750", "1,000"]
