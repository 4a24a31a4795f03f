"""Nothing that was recorded is without a curve, and verdicts on curves can be told apart."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.diagnostics import RULES
from rehearsal.reports import write_report
from rehearsal.reports.charts import (
    chart_groups,
    finding_spans,
    other_charts,
    signal_groups,
    spread_chart,
    success_chart,
)
from rehearsal.reports.data import ReportData, gather
from rehearsal.reports.labels import Box, Room
from rehearsal.reports.plots import Chart, Series, draw
from rehearsal.reports.spans import Mark, Span, ground, lay_out
from rehearsal.reports.tool_use import tool_use
from rehearsal.training.runs import RunFolder

QUARTILES = {
    f"gradient/{objective}/{figure}/q{quantile}": value * quantile
    for objective, value in (("policy", 0.1), ("kl", 0.2), ("entropy", 0.3))
    for figure in ("norm", "signal", "snr")
    for quantile in range(1, 5)
}


def run_of(path: Path, rows: list[dict[str, float]]) -> ReportData:
    with RunFolder.create(path, "", "rehearsal train", device="cpu") as run:
        for step, row in enumerate(rows, start=1):
            run.append_metrics(step, row)
    return gather(path)


def all_charts(data: ReportData) -> list[Chart]:
    groups, tools = [*signal_groups(data), *chart_groups(data)], tool_use(data)
    charts = [success_chart(data), spread_chart(data), *(tools.charts if tools else ())]
    charts += [chart for group in groups for chart in group.charts]
    return [*charts, *other_charts(data, charts, tools.tabled if tools else ()).charts]


@pytest.mark.parametrize("needs", sorted({rule.needs for rule in RULES}))
def test_every_figure_that_a_rule_judges_has_a_curve_of_its_own(needs: str, tmp_path: Path) -> None:
    needs = needs.replace("*", "")
    beside = {"train/tools/search/calls": 0.5, "train/tools/search/used": 0.5} if "tools" in needs else {}
    data = run_of(tmp_path / "run", [{needs: 0.5 + step / 10, **beside} for step in range(4)])
    charts = [chart for chart in all_charts(data) if needs in chart.metrics and chart.title != needs]
    assert charts, "a plan, and not only a place among the others"
    values = [list(line.y) for chart in charts for line in chart.series]
    assert [0.5, 0.6, 0.7, 0.8] in values


def test_nothing_that_was_recorded_is_left_out(tmp_path: Path) -> None:
    names = [
        *QUARTILES, "gradient/variance/q1", "gradient/policy/norm", "gradient/new_objective/snr", "signal/new",
        "signal/dead_groups_equal", "signal/success_correlation", "signal/self_certainty", "signal/variance_mean",
        "signal/variance_spread", "information/first/sequence/z_score", "information/all/per_token/z_score_smoothed",
        "information/first/empty", "information/new", "behaviour/new", "probe/forward/accuracy", "probe/forward/low",
        "probe/reward/count", "time/diagnostics_share", "time/new", "train/tools/search/used", "train/tools/cost",
        "train/tools/surplus", "train/reward_std", "train/episodes", "mine/own",
    ]  # fmt: skip
    data = run_of(tmp_path / "run", [dict.fromkeys(names, 1.0 + step) for step in range(3)])
    tools = tool_use(data)
    assert tools is not None
    shown = {name for chart in all_charts(data) for name in chart.metrics} | set(tools.tabled)
    assert set(names) - shown == set()
    page = write_report(data.path).read_text(encoding="utf-8")
    for name in ("signal/new", "information/new", "behaviour/new", "time/new", "mine/own"):
        assert f"<b>{name}</b>" in page, "what nobody planned for comes last"
    assert "<b>signal/self_certainty</b>" not in page


@pytest.mark.parametrize("lead", ["probe/", "probe/frozenlake/", "probe/package.module:Class/"])
def test_probes_are_drawn_from_before_the_first_step_to_after_the_last(lead: str, tmp_path: Path) -> None:
    def probed(value: float) -> dict[str, float]:
        names = [*(f"forward/{name}" for name in ("accuracy", "low", "high", "chance", "exact", "count")),
                 "inverse/accuracy", "perplexity", "symbols"]  # fmt: skip
        return {f"{lead}{name}": value for name in names}

    with RunFolder.create(tmp_path / "run", "", "rehearsal train", device="cpu") as run:
        run.append_evaluation(0, "test", {"success": 0.1, **probed(0.1)})
        for step in range(1, 5):
            # With each step the probe of the evaluation before it is told.
            run.append_metrics(step, {"train/reward": 0.5, **(probed(0.1) if step == 1 else {}),
                                      **(probed(0.2) if step == 3 else {})})  # fmt: skip
            if step == 2:
                run.append_evaluation(2, "validation", {"success": 0.1, **probed(0.2)})
        run.append_evaluation(4, "test", {"success": 0.1, **probed(0.3)})
    data = gather(tmp_path / "run")
    charts = {chart.title: chart for chart in all_charts(data)}
    where = f" ({lead.removeprefix('probe/').rstrip('/')})" if lead != "probe/" else ""
    for title in ("Gaps filled", "Perplexity of answers", "Gaps: forward", "Gaps asked"):
        for line in [line for line in charts[f"{title}{where}"].series[:2] if not line.empty]:
            assert list(line.x) == [0, 2, 4], title
            assert list(line.y) == [0.1, 0.2, 0.3], title
    assert len({line.colour for line in charts[f"Gaps filled{where}"].series}) == 2
    assert list(charts[f"Gaps: forward{where}"].series[0].low) == [0.1, 0.2, 0.3]
    shown = {name for chart in charts.values() for name in chart.metrics}
    assert set(probed(0.0)) <= shown
    assert not [title for title in charts if title.startswith("probe/")], "each has a plot that was planned"
    page = write_report(data.path).read_text(encoding="utf-8")
    assert f"Gaps filled{where}" in page


def test_probes_of_a_run_whose_evaluations_are_lost_are_those_of_its_steps(tmp_path: Path) -> None:
    rows = [{"probe/perplexity": 3.0, "probe/symbols": 9.0}, {"train/reward": 0.5}, {"probe/perplexity": 2.0}]
    charts = {chart.title: chart for chart in all_charts(run_of(tmp_path / "run", rows))}
    lines = charts["Perplexity of answers"].series
    assert [(list(line.x), list(line.y)) for line in lines] == [([1, 3], [3.0, 2.0]), ([1], [9.0])]


def test_a_world_that_is_foreign_is_marked_in_its_own_plot(tmp_path: Path) -> None:
    rows = [{"probe/lake/perplexity": 30.0, "probe/lake/symbols": 9.0, "probe/bandit/perplexity": 2.0,
             "probe/bandit/symbols": 9.0} for _ in range(3)]  # fmt: skip
    data = run_of(tmp_path / "run", rows)
    (finding,) = data.findings
    assert finding.evidence == "The perplexity of what lake answers is 30, and it has 9 symbols."
    charts = {chart.title: chart for chart in all_charts(data)}
    assert [span.label for span in charts["Perplexity of answers (lake)"].spans] == ["Foreign world"]


def test_gradients_by_quantile_of_variance(tmp_path: Path) -> None:
    variances = {f"gradient/variance/q{quantile}": (quantile - 1) / 10 for quantile in range(1, 5)}
    late = {name: 3 * value for name, value in QUARTILES.items()}
    late.pop("gradient/policy/snr/q1")  # groups whose rewards are all equal have no gradient to compare
    data = run_of(tmp_path / "run", [{**QUARTILES, **variances}] * 4 + [{}] + [{**late, **variances}] * 2)
    charts = {chart.title: chart for group in signal_groups(data) for chart in group.charts}
    profile = charts["Gradient by variance"]
    assert [line.name for line in profile.series] == ["rewards", "KL", "entropy"]
    assert list(profile.series[0].y) == pytest.approx([0.3, 0.6, 0.9, 1.2]), "of the last third of the measurements"
    assert list(profile.series[2].y) == pytest.approx([0.9, 1.8, 2.7, 3.6])
    assert list(profile.places) == ["least", "2nd", "3rd", "most"]
    assert list(profile.below) == ["0", "0.1", "0.2", "0.3"]
    assert "medians of the last 2 measurements (from step 6)" in profile.note
    ratio = charts["Agreement by variance"].series[0]
    assert ratio.y[0] is None
    assert list(ratio.y[1:]) == pytest.approx([0.6, 0.9, 1.2])
    over_time = charts["Gradient by variance: KL"]
    assert [line.name for line in over_time.series] == ["least", "2nd", "3rd", "most"]
    assert list(over_time.series[3].x) == [1, 2, 3, 4, 6, 7]
    drawing = str(draw(profile, 300, 170))
    assert "groups by the variance of their rewards" in drawing
    assert "at most" in drawing, "people who cannot see it are told places and not steps"


def test_the_bands_of_variance_have_legends_of_their_own(tmp_path: Path) -> None:
    row = {f"signal/variance_q{name}": name / 100 for name in (10, 25, 50, 75, 90)}
    data = run_of(tmp_path / "run", [row, row])
    chart = spread_chart(data)
    told = [(line.name, line.layers) for line in chart.series if not line.empty]
    assert told == [("middle group", 0), ("half of all groups", 2), ("four fifths of all", 1)]
    page = write_report(data.path).read_text(encoding="utf-8")
    assert "Variance inside groups" in page, "also where information was never measured"
    legend = page[page.index("Variance inside groups") :]
    legend = legend[: legend.index('class="plot"')]
    keys = re.findall(r'<span class="key"><svg[^>]*>(.*?)</svg>', legend)
    assert len(keys) == len(set(keys)) == 3


SPANS = st.lists(
    st.tuples(
        st.integers(0, 99), st.integers(0, 60), st.sampled_from(["Too hard", "Generation and learning disagree"])
    ),
    max_size=14,
)


def marks_of(spans: list[tuple[int, int, str]], width: int, most: int) -> list[Mark]:
    told = [Span(begin, begin + long, name, place) for place, (begin, long, name) in enumerate(spans, start=1)]
    return lay_out(told, lambda step: 46 + step / 100 * (width - 60), (0, 100), most)


@given(SPANS, st.sampled_from([300, 700]), st.integers(1, 20))
def test_names_of_verdicts_never_touch(spans: list[tuple[int, int, str]], width: int, most: int) -> None:
    marks = marks_of(spans, width, most)
    assert sorted(mark.span.number for mark in marks) == list(range(1, len(spans) + 1)), "each of them is there"
    for one, other in itertools.combinations(marks, 2):
        if one.lane == other.lane:
            (low, high), (begin, end) = one.reach, other.reach
            assert high < begin or end < low
    if any(mark.text is not None for mark in marks):
        assert max(mark.lane for mark in marks) < most
    for mark in marks:
        assert mark.reach[0] >= 0
        assert mark.reach[1] <= width
    for (_, end), (begin, _) in itertools.pairwise(ground(marks)):
        assert end < begin, "the ground is nowhere drawn twice"


def test_verdicts_are_numbered_named_and_drawn_once() -> None:
    spans = [Span(20, 100, "Template collapse", 1), Span(30, 60, "Too <hard>", 2, over=True), Span(20, 100, "Echo", 3)]
    svg = str(draw(Chart("t", "", [Series("s", range(101), [0.5] * 101)], spans=spans), 400, 190))
    assert svg.count('class="span"') == 1
    assert svg.count('class="span-edge"') == 2, "two begin at the same step"
    assert svg.count('class="span-edge span-end"') == 1
    for number, name in ((1, "Template collapse"), (2, "Too &lt;hard&gt;"), (3, "Echo")):
        assert re.search(rf'class="span-number"[^>]*>{number}</text>.*?class="span-name"[^>]*>{name}</text>', svg)
    assert "2 Too &lt;hard&gt; from step 30 to step 60" in svg


def test_a_verdict_has_the_same_number_everywhere(tmp_path: Path) -> None:
    rows = [
        {"signal/dead_groups": 0.1 if step < 20 else 1.0, "signal/dead_groups_failed": 0.1 if step < 20 else 1.0,
         "policy/moved": 0.1, "train/success": 0.5}
        for step in range(40)
    ]  # fmt: skip
    data = run_of(tmp_path / "run", rows)
    assert [(span.number, span.label) for span in finding_spans(data)] == [(1, "Steps too large"), (2, "Too hard")]
    assert [span.number for span in finding_spans(data, ["signal/dead_groups"])] == [2]
    page = write_report(data.path).read_text(encoding="utf-8")
    assert '<span class="number">2</span>Too hard' in page
    assert "Not judged, because their figures were not measured: template collapse" in page, "a verdict hides it not"


@given(st.lists(st.tuples(st.floats(60, 440), st.floats(20, 280)), min_size=1, max_size=60))
def test_words_keep_off_points_where_there_is_room(points: list[tuple[float, float]]) -> None:
    frame = Box(52, 8, 444, 290)
    room = Room(frame, points)
    boxes = [room.around(points[0], "start"), room.around(points[-1], "end")]
    assert not boxes[0].meets(boxes[1])
    for box in boxes:
        assert frame.left <= box.left <= box.right <= frame.right
        assert frame.top <= box.top <= box.bottom <= frame.bottom


def test_words_keep_off_a_cloud_of_points() -> None:
    cloud = [(200.0 + 4 * i, 100.0 + 4 * j) for i in range(8) for j in range(8)]
    room = Room(Box(0, 0, 460, 330), cloud)
    box = room.around(cloud[27], "end")
    assert not any(box.holds(point) for point in cloud)
