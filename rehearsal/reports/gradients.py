"""The plots of single groups' gradients: by objective, and by how much the rewards of a group vary.

Groups are cut into quantiles of reward variance, from 1 (least) up. What rewards pull by should grow with the variance;
what pulls as hard where rewards do not vary, KL and entropy terms, takes over there (RAGEN-2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from rehearsal.reports.data import ReportData
from rehearsal.reports.plots import Chart, Series
from rehearsal.reports.scales import spell

_NAME = re.compile(r"gradient/(?P<objective>.+)/(?P<figure>norm|signal|snr)(?:/q(?P<quantile>\d+))?")
_VARIANCE = re.compile(r"gradient/variance/q(?P<quantile>\d+)")
_WORDS = {"policy": "rewards", "kl": "KL", "entropy": "entropy"}
_MOST_LINES = 5
_ORDINALS = {1: "1st", 2: "2nd", 3: "3rd"}

Objectives = dict[str, dict[tuple[str, int], str]]
"""By objective: the metric of a figure in a quantile, 0 for all groups together."""


def gradient_charts(data: ReportData) -> list[Chart]:
    """What one should look at, most telling first; without those that have no values."""
    objectives = _objectives(data)
    charts = [
        _by_objective(
            data, objectives, "norm", "Gradient",
            "Norm of the gradient of a single group, by what pulls. Above that of the rewards, something else moves "
            "the weights.",
        ),
        _profile(
            data, objectives, "norm", "Gradient by variance",
            "The same{when}. That of the rewards should rise to the right; where it lies below the others, they take "
            "over.",
        ),
        _by_objective(
            data, objectives, "snr", "Agreement of groups",
            "What groups' gradients have in common over what they differ by (signal to noise). A step of P groups has "
            "the square root of P times as much.",
        ),
        _profile(
            data, objectives, "snr", "Agreement by variance",
            "The same{when}. Low throughout: noise moves the weights.",
        ),
    ]  # fmt: skip
    for objective, word in _named(objectives):
        charts.append(
            _over_time(data, objectives[objective], "norm", f"Gradient by variance: {word}", "Norm, over the steps.")
        )
        charts.append(
            _over_time(
                data, objectives[objective], "snr", f"Agreement by variance: {word}", "Signal to noise, over the steps."
            )
        )
    return [chart for chart in charts if not chart.empty]


def more_gradient_charts(data: ReportData) -> list[Chart]:
    """The figures that the others are made of."""
    objectives = _objectives(data)
    charts = [
        _by_objective(
            data, objectives, "signal", "What groups have in common",
            "Norm of the mean gradient of groups, as estimated; 0 where noise hides it.",
        )
    ]  # fmt: skip
    for objective, word in _named(objectives):
        charts.append(
            _over_time(data, objectives[objective], "signal", f"In common by variance: {word}", "Over the steps.")
        )
    variances = {("variance", quantile): name for quantile, name in _variances(data).items()}
    charts.append(
        _over_time(
            data, variances, "variance", "Variance of the probed groups", "Mean variance of rewards by quantile."
        )
    )
    return [chart for chart in charts if not chart.empty]


def _objectives(data: ReportData) -> Objectives:
    found: Objectives = {}
    for name in data.metric_names:
        match = _NAME.fullmatch(name)
        if match:
            key = (match["figure"], int(match["quantile"] or 0))
            found.setdefault(match["objective"], {})[key] = name
    order = list(_WORDS)
    return dict(sorted(found.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))


def _named(objectives: Objectives) -> Iterator[tuple[str, str]]:
    for objective in objectives:
        yield objective, _WORDS.get(objective, objective.replace("_", " "))


def _variances(data: ReportData) -> dict[int, str]:
    matches = (_VARIANCE.fullmatch(name) for name in data.metric_names)
    return dict(sorted((int(match["quantile"]), match[0]) for match in matches if match))


def _known(data: ReportData, name: str) -> tuple[list[int], list[float]]:
    known = [(step, value) for step, value in zip(data.steps, data.series(name), strict=True) if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _by_objective(data: ReportData, objectives: Objectives, figure: str, title: str, note: str) -> Chart:
    series: list[Series] = []
    metrics = []
    for objective, word in list(_named(objectives))[:_MOST_LINES]:
        name = objectives[objective].get((figure, 0))
        if name:
            series.append(Series(word, *_known(data, name), colour=len(series), smooth=True))
            metrics.append(name)
    return Chart(title, note, series, metrics=metrics)


def _over_time(data: ReportData, names: dict[tuple[str, int], str], figure: str, title: str, note: str) -> Chart:
    quantiles = sorted(quantile for of, quantile in names if of == figure and quantile)
    count = max((quantile for _, quantile in names), default=0)
    series, metrics = [], []
    for quantile in [one for one in quantiles if one <= _MOST_LINES]:
        name = names[figure, quantile]
        word = _ordinal(quantile, count)
        series.append(Series(word, *_known(data, name), colour=quantile - 1, smooth=True))
        metrics.append(name)
    return Chart(title, note, series, metrics=metrics)


def _profile(data: ReportData, objectives: Objectives, figure: str, title: str, note: str) -> Chart:
    """Medians over the last third of the measurements, with their middle half as a band."""
    variances = _variances(data)
    count = max([*variances, *(quantile for names in objectives.values() for _, quantile in names)], default=0)
    measured = sorted({step for name in variances.values() for step in _known(data, name)[0]})
    late = measured[-max(1, math.ceil(len(measured) / 3)) :]
    series: list[Series] = []
    for objective, word in list(_named(objectives))[:_MOST_LINES]:
        parts = [
            _late_values(data, objectives[objective].get((figure, quantile)), late) for quantile in range(1, count + 1)
        ]
        if any(parts):
            series.append(
                Series(
                    word,
                    range(1, count + 1),
                    [_middle(part) for part in parts],
                    [_middle(part, 0.25) for part in parts] if len(late) > 2 else (),
                    [_middle(part, 0.75) for part in parts] if len(late) > 2 else (),
                    colour=len(series),
                    markers=True,
                )
            )
    places, below = [], []
    for quantile in range(1, count + 1):
        values = _late_values(data, variances.get(quantile), late)
        places.append(_ordinal(quantile, count))
        below.append(spell(_middle(values)))
    return Chart(
        title, note.format(when=_when(late)), series, places=places, below=below,
        across="groups by the variance of their rewards",
    )  # fmt: skip


def _late_values(data: ReportData, name: str | None, steps: Sequence[int]) -> list[float]:
    if name is None:
        return []
    wanted = set(steps)
    return [value for step, value in zip(*_known(data, name), strict=True) if step in wanted]


def _when(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    if len(steps) == 1:
        return f", at step {steps[0]:,}"
    band = ", bands their middle half" if len(steps) > 2 else ""
    return f", medians of the last {len(steps)} measurements (from step {steps[0]:,}){band}"


def _ordinal(quantile: int, count: int) -> str:
    if quantile == 1:
        return "least"
    return "most" if quantile == count else _ORDINALS.get(quantile, f"{quantile}th")


def _middle(values: Sequence[float], share: float = 0.5) -> float | None:
    """The value below which this share of them lies."""
    return float(np.quantile(values, share)) if values else None
