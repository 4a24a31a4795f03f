"""Plots are valid, keep values inside the frame, show gaps as gaps, and label what is there."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.reports.plots import MAX_POINTS, Chart, Series, bucketed, draw, running_mean
from rehearsal.reports.scales import spell, spell_seconds, ticks

VALUE = st.none() | st.floats(-1e9, 1e9)


@st.composite
def a_series(draw_: st.DrawFn) -> Series:
    y = draw_(st.lists(VALUE, min_size=1, max_size=40))
    low = [None if value is None else value - 1 for value in y] if draw_(st.booleans()) else []
    high = [None if value is None else value + 1 for value in y] if low else []
    text, flags = draw_(st.text(max_size=5)), (draw_(st.booleans()), draw_(st.booleans()))
    return Series(
        text.translate(dict.fromkeys(range(32))), range(len(y)), y, low, high, draw_(st.integers(0, 4)), *flags
    )


@given(st.lists(a_series(), min_size=1, max_size=3), st.sampled_from(["share", "number", "seconds"]), st.booleans())
def test_any_chart_is_valid_svg_inside_its_frame(series: list[Series], unit: str, zero: bool) -> None:
    chart = Chart("<T> & co", "", series, unit, zero)  # type: ignore[arg-type]
    svg = draw(chart, 400, 200)
    if chart.empty:
        assert svg == ""
        return
    characters = re.sub("[\ud800-\udfff\ufffe\uffff]", "", str(svg))
    root = ET.fromstring(characters)
    for path in root.iter("path"):
        for x, y in re.findall(r"([-\d.e+]+),([-\d.e+]+)", path.attrib["d"]):
            assert 46 <= float(x) <= 386
            assert 10 <= float(y) <= 176
    told = json.loads(root.attrib["data-hover"])
    assert len(told) == sum(not one.empty for one in series)
    for one, kept in zip(told, [one for one in series if not one.empty], strict=True):
        assert len(one["p"]) == sum(value is not None for value in kept.y)


def test_a_gap_is_a_gap() -> None:
    svg = draw(Chart("a", "", [Series("s", range(5), [1.0, 2.0, None, 2.0, 1.0])]))
    assert len(re.findall('<path class="line c0"', svg)) == 2
    alone = draw(Chart("a", "", [Series("s", range(3), [None, 2.0, None])]))
    assert len(re.findall('<circle class="dot c0"', alone)) == 1


def test_stacked_areas_fill_the_whole() -> None:
    parts = [Series("a", [1, 2], [1.0, 0.0]), Series("b", [1, 2], [3.0, 0.0], colour=1)]
    told = json.loads(ET.fromstring(draw(Chart("t", "", parts, "share", stacked=True))).attrib["data-hover"])
    assert [one["p"][0][3] for one in told] == ["25%", "75%"]
    assert len(told[0]["p"]) == 1  # a step whose parts are all zero has no shares


@given(st.integers(1, 3000), st.integers(0, 10**6))
def test_buckets_keep_the_mean_and_the_ends(count: int, seed: int) -> None:
    values = [float((place * 7919 + seed) % 101) for place in range(count)]
    small = bucketed(Series("s", range(count), values))
    assert len(small.x) == min(count, MAX_POINTS)
    assert small.x[-1] == count - 1
    assert len(small.y) == len(small.x)
    if count % MAX_POINTS == 0:
        assert sum(value or 0 for value in small.y) / len(small.y) == pytest.approx(sum(values) / count)


def test_the_running_mean_is_centred_and_skips_gaps() -> None:
    assert running_mean([0.0, 3.0, 6.0, None, 6.0], 3) == [1.5, 3.0, 4.5, 6.0, 6.0]
    assert running_mean([None, None], 3) == [None, None]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_inside_and_evenly_spaced(low: float, span: float, count: int) -> None:
    marks = ticks(low, low + span, count)
    assert len(marks) <= count + 1
    assert all(low - span / 100 <= mark <= low + span * 1.01 for mark in marks)
    gaps = [later - earlier for earlier, later in itertools.pairwise(marks)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-3, abs_tol=1e-9) for gap in gaps)


def test_neighbouring_ticks_have_different_labels() -> None:
    svg = draw(Chart("ratio", "", [Series("s", [0, 10], [0.991, 1.009])], zero=False))
    labels = [element.text for element in ET.fromstring(svg).iter("text")]
    assert labels[:5] == ["0.990", "0.995", "1.000", "1.005", "1.010"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.712, "share", "71%"),
        (0.0312, "share", "3.1%"),
        (1.0, "share", "100%"),
        (0.0, "number", "0"),
        (3e-5, "number", "3e-5"),
        (-0.25, "number", "-0.25"),
        (100.0, "number", "100"),
        (4120.0, "number", "4,120"),
        (2.5e6, "number", "2.5M"),
        (None, "number", "–"),
        (math.nan, "share", "–"),
    ],
)
def test_values_are_spelled_for_people(value: float | None, unit: str, text: str) -> None:
    assert spell(value, unit) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.82, "0.82 s"), (34, "34 s"), (700, "12 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")],
)
def test_durations_are_spelled_for_people(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text
