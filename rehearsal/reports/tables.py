"""The numbers of a report as rows of ready-made text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rehearsal.reports.data import ReportData
from rehearsal.reports.scales import Unit, spell, spell_seconds
from rehearsal.reports.verdict import number
from rehearsal.trajectory import StopReason

STOP_WORDS: Mapping[str, str] = {
    StopReason.TERMINATED: "the environment reached a final state",
    StopReason.TRUNCATED: "the environment stopped the episode by a limit of its own",
    StopReason.TURN_LIMIT: "the agent used all its turns",
    StopReason.ACTION_LIMIT: "the agent used all its actions",
    StopReason.CONTEXT_LIMIT: "the context was full",
    StopReason.ERROR: "the environment raised or broke its contract; no reward",
    StopReason.TIMEOUT: "the environment did not answer in time; no reward",
}
"""Stop reasons for people."""

_SHARES = ("success", "errors", "illegal", "share", "dead_groups", "stop/")


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation as text; "–" where it holds no value."""

    step: int
    split: str
    episodes: str
    success: str
    interval: str
    reward: str
    turns: str
    response_tokens: str
    format_errors: str
    time: str


@dataclass(frozen=True)
class MetricRow:
    """One metric over the run: means over the first and the last tenth of its steps."""

    name: str
    start: str
    end: str
    least: str
    most: str


@dataclass(frozen=True)
class StopRow:
    """How often episodes ended for one reason.

    Attributes:
        name: the reason.
        words: the same in words.
        start: share of training episodes in the first tenth of the steps, or None.
        end: in the last tenth.
        counts: episodes of the first and last evaluation, in the order of their steps.
    """

    name: str
    words: str
    start: float | None
    end: float | None
    counts: Sequence[int]


def evaluation_rows(data: ReportData) -> list[EvaluationRow]:
    """All evaluations by step."""
    rows = []
    for split, evaluations in data.evaluations.items():
        for row in evaluations:
            value = {name: number(each) for name, each in row.items()}
            low, high, time = value.get("success_low"), value.get("success_high"), value.get("time")
            rows.append(
                EvaluationRow(
                    step=row["step"],
                    split=split,
                    episodes=spell(value.get("episodes")),
                    success=spell(value.get("success"), "share"),
                    interval="" if low is None or high is None else f"{spell(low, 'share')} to {spell(high, 'share')}",
                    reward=spell(value.get("reward")),
                    turns=spell(value.get("turns")),
                    response_tokens=spell(value.get("response_tokens")),
                    format_errors=spell(value.get("format_errors"), "share"),
                    time="–" if time is None else spell_seconds(time),
                )
            )
    return sorted(rows, key=lambda row: (row.step, row.split))


def metric_rows(data: ReportData) -> list[MetricRow]:
    """All metrics but the stop reasons, which have a table of their own."""
    rows = []
    for name in sorted(data.metric_names):
        if name.startswith("train/stop/"):
            continue
        values = data.series(name)
        known = [value for value in values if value is not None]
        start, end = tenths(values)
        unit: Unit = "share" if any(part in name for part in _SHARES) else "number"
        rows.append(MetricRow(name, *(spell(value, unit) for value in (start, end, min(known), max(known)))))
    return rows


def stop_rows(data: ReportData, shares: Mapping[str, Sequence[float | None]]) -> list[StopRow]:
    """The stop reasons that occurred, most frequent at the end first."""
    names = dict.fromkeys([*shares, *(name for counts in data.episodes.stops.values() for name in counts)])
    rows = []
    for name in names:
        start, end = tenths([value or 0.0 for value in shares[name]]) if name in shares else (None, None)
        counts = [counts.get(name, 0) for counts in data.episodes.stops.values()]
        if any(counts) or any(shares.get(name, ())):
            rows.append(StopRow(name.replace("_", " "), STOP_WORDS.get(name, ""), start, end, counts))
    return sorted(rows, key=lambda row: (-(row.end or 0.0), [-count for count in reversed(row.counts)]))


def tenths(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Means over the first and over the last tenth (at least one step), missing values left out."""
    size = max(1, len(values) // 10)
    return _mean(values[:size]), _mean(values[-size:])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
