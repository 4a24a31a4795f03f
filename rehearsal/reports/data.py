"""Reads a run folder, whatever state it is in, into what the report shows."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rehearsal.diagnostics import Verdict as Finding
from rehearsal.diagnostics import judge as diagnose
from rehearsal.errors import CheckpointError
from rehearsal.reports.episodes import EpisodeChoice, choose_episodes
from rehearsal.reports.group_archive import GroupArchive, pack_groups
from rehearsal.reports.verdict import Verdict, judge, number
from rehearsal.training.json_lines import read_json_lines
from rehearsal.training.runs import RunFolder, RunInfo
from rehearsal.usage import usage_words

_MODEL_KEYS = ("model.path", "model.name", "model.id", "model.model", "model")
_ENVIRONMENT_KEYS = ("environment.name", "environment.id", "environment.environment", "environment", "env")


@dataclass(frozen=True)
class ReportData:
    """Everything that the sections draw from.

    Attributes:
        path: the run folder.
        info: what ``run.json`` says.
        status: how the run stands, in words.
        recipe_text: ``recipe.toml`` as it is.
        recipe: the same parsed; empty if it cannot be.
        metrics: one row a training step, sorted by step, the last one where a step was recorded twice.
        evaluations: the same by split.
        verdict: whether held-out play got better.
        findings: what the diagnostics said was wrong, in the order in which they said it.
        episodes: the episodes that the report shows whole.
        archive: all groups of the training steps.
        problems: sentences about what is missing or damaged.
    """

    path: Path
    info: RunInfo
    status: str
    recipe_text: str
    recipe: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]]
    verdict: Verdict
    findings: Sequence[Finding]
    episodes: EpisodeChoice
    archive: GroupArchive
    problems: Sequence[str]

    @property
    def steps(self) -> list[int]:
        """The training steps that have metrics."""
        return [row["step"] for row in self.metrics]

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics that have at least one number, in the order of their first appearance."""
        names: dict[str, None] = {}
        for row in self.metrics:
            for name, value in row.items():
                if name not in ("step", "time") and number(value) is not None:
                    names[name] = None
        return list(names)

    def series(self, name: str) -> list[float | None]:
        """One metric over :attr:`steps`; None where a step has no finite value."""
        return [number(row.get(name)) for row in self.metrics]

    def evaluated(self, name: str) -> dict[int, float]:
        """A figure of the evaluations over their steps, whatever the split: for what is measured on the same tasks each
        time, as probes are."""
        rows = sorted((row for rows in self.evaluations.values() for row in rows), key=lambda row: row["step"])
        return {row["step"]: value for row in rows if (value := number(row.get(name))) is not None}

    @property
    def seconds(self) -> float | None:
        """Seconds of training, pauses left out; None if nothing was recorded."""
        rows = [*self.metrics, *(row for rows in self.evaluations.values() for row in rows)]
        return max((time for row in rows if (time := number(row.get("time"))) is not None), default=None)

    @property
    def usage_words(self) -> dict[str, str]:
        """What sandboxes and judges were asked to do, in words; empty where there were none or nothing is recorded."""
        told, used = self.info.facts, self.info.usage
        facts = {name: str(fact) for name, fact in told.items()} if isinstance(told, Mapping) else {}
        return usage_words(used if isinstance(used, Mapping) else {}, facts)

    @property
    def model(self) -> str:
        """What was trained, as the summary or the recipe names it; "" if neither does."""
        return str(self.info.summary.get("model") or _first(self.recipe, _MODEL_KEYS))

    @property
    def environment(self) -> str:
        """Where it was trained: the recipe's environment, or those of the episodes."""
        named = str(self.info.summary.get("environment") or _first(self.recipe, _ENVIRONMENT_KEYS))
        return named or ", ".join(self.episodes.environments)


def gather(run_path: str | Path) -> ReportData:
    """Read a run folder. Whatever is missing or damaged becomes a sentence in ``problems``, not an error.

    Raises:
        CheckpointError: if ``run_path`` is no run folder at all.
    """
    path = Path(run_path)
    problems: list[str] = []
    if not any((path / name).exists() for name in ("run.json", "metrics.jsonl", "evaluations.jsonl")):
        raise CheckpointError(f"{path} holds no run: there is nothing in it to report; check the name.")
    try:
        run = RunFolder.open(path)
    except CheckpointError as error:
        run = RunFolder(path, RunInfo(name=path.resolve().name))
        problems.append(f"What the run says about itself is lost: {error}")
        status = "unknown"
    else:
        status = _status(run, problems)
    metrics = _rows(path / "metrics.jsonl", problems)
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(path / "evaluations.jsonl", problems):
        evaluations.setdefault(str(row.get("split", "")), []).append(row)
    by_split = {split: _by_step(rows) for split, rows in sorted(evaluations.items())}
    if not metrics:
        problems.append("No training step was recorded: there are no learning curves.")
    recipe_text = run.recipe_text
    recipe = _parse(recipe_text, problems)
    episodes = choose_episodes(run, problems)
    archive = pack_groups(run, problems)
    problems.extend(run.info.warnings)
    return ReportData(
        path, run.info, status, recipe_text, recipe, _by_step(metrics), by_split, judge(by_split),
        diagnose(_by_step(metrics)), episodes, archive, list(dict.fromkeys(problems)),
    )  # fmt: skip


def _status(run: RunFolder, problems: list[str]) -> str:
    info = run.info
    if info.status == "failed":
        problems.append(f"The run failed: {info.error or 'no reason was recorded.'}")
    if info.status == "running" and not run.in_use:
        problems.append("The run never recorded its end and no process works on it: it was probably killed.")
        return "killed"
    return info.status


def _rows(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        lines = read_json_lines(file)
    except CheckpointError as error:
        problems.append(str(error))
        return []
    rows = [row for row in lines.rows if isinstance(row.get("step"), int)]
    damaged = lines.damaged + len(lines.rows) - len(rows)
    if damaged:
        what = "1 line" if damaged == 1 else f"{damaged} lines"
        were = "was" if damaged == 1 else "were"
        problems.append(f"{what} of {file.name} could not be read and {were} left out.")
    return rows


def _by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _parse(text: str, problems: list[str]) -> dict[str, Any]:
    if not text:
        problems.append("The recipe is missing.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.append(f"The recipe is no valid TOML ({error}); it is shown as it is.")
        return {}


def _first(recipe: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of the dotted ``keys`` that leads to a text (or to a list, whose texts are joined)."""
    for key in keys:
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return ", ".join(value)
    return ""


def moment(text: str | None) -> str:
    """An ISO time as "21 November 2026, 10:29 UTC"; the text itself if it is none."""
    try:
        when = datetime.fromisoformat(text or "")
    except ValueError:
        return text or ""
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".strip()
