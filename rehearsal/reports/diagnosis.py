"""What the diagnostics say of a run folder, for the terminal and for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.diagnostics import Series, Verdict, judge, unheard
from rehearsal.diagnostics.tool_use import TOOL_FIGURES, tool_names
from rehearsal.errors import CheckpointError
from rehearsal.reports.verdict import number
from rehearsal.training.json_lines import read_json_lines


@dataclass(frozen=True)
class Diagnosis:
    """The verdicts on a run.

    Attributes:
        steps: how many steps they rest on.
        verdicts: in the order in which they were called.
        unjudged: names of the rules whose figures were never measured.
        too_early: names of those that have not spoken, and whose figures were measured too few times for all that
            they judge.
        steered: names of those that are not judged where the curriculum chooses tasks by success.
        figures: the figures that say most, as they were at the start and at the end, by name.
        ceiling: a sentence where information of thoughts is at the ceiling of its estimate; "" where it is not.
        damaged: lines of the metrics that could not be read.
    """

    steps: int
    verdicts: Sequence[Verdict]
    unjudged: Sequence[str]
    too_early: Sequence[str]
    steered: Sequence[str]
    figures: Mapping[str, tuple[float, float]]
    ceiling: str
    damaged: int

    def as_json(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {
            "steps": self.steps,
            "verdicts": [
                {
                    "name": one.rule.name, "began": one.began, "called": one.called, "ended": one.ended,
                    "evidence": one.evidence, "sentence": one.rule.sentence, "suggestion": one.rule.suggestion,
                }
                for one in self.verdicts
            ],
            "unjudged": list(self.unjudged),
            "too_early": list(self.too_early),
            "steered": list(self.steered),
            "figures": {name: {"start": start, "end": end} for name, (start, end) in self.figures.items()},
            "ceiling": self.ceiling,
            "damaged_lines": self.damaged,
        }  # fmt: skip


FIGURES = {
    "train/success": "success in training",
    "train/reward": "reward",
    "signal/dead_groups": "groups without reward variance",
    "signal/reward_std_in_group": "spread of rewards inside groups",
    "information/first/sequence/share": "what thoughts say of their prompt, over what they could",
    "information/first/sequence/conditional_entropy": "how varied thoughts are, nats",
    "behaviour/entropy": "entropy, nats a token",
    "behaviour/thought_tokens": "tokens of a thought",
    "behaviour/invalid_turns": "broken or illegal answers",
    "policy/effective_sample_share": "effective samples",
    "policy/mismatch_first": "engine against learner, nats a token",
}
"""The figures of :class:`Diagnosis`, with words for people."""

_ENDS = 3


def figure_words(name: str) -> str:
    """What a figure of :class:`Diagnosis` is, for people."""
    tool = next(iter(tool_names([name])), None)
    return FIGURES[name] if tool is None else f"episodes that call {tool}"


def diagnose(run_path: str | Path) -> Diagnosis:
    """Judge a run from its metrics, finished or not.

    Raises:
        CheckpointError: if the folder holds no metrics, or none of any step.
    """
    file = Path(run_path) / "metrics.jsonl"
    if not file.is_file():
        raise CheckpointError(f"{run_path} holds no metrics.jsonl, so there is nothing to judge; name a run folder.")
    lines = read_json_lines(file)
    rows = {row["step"]: row for row in lines.rows if isinstance(row.get("step"), int)}
    ordered = [rows[step] for step in sorted(rows)]
    if not ordered:
        raise CheckpointError(f"{file} tells of no step, so there is nothing to judge.")
    measured = {name for row in ordered for name in row}
    verdicts, unsaid = judge(ordered), unheard(Series(ordered))
    called = {one.rule.name for one in verdicts}
    figures = {}
    tools = [f"{TOOL_FIGURES}{name}/used" for name in sorted(tool_names(measured))]
    for name in (*FIGURES, *tools):
        values = [value for row in ordered if (value := number(row.get(name))) is not None]
        if values:
            first, last = values[:_ENDS], values[-_ENDS:]
            figures[name] = (sum(first) / len(first), sum(last) / len(last))
    return Diagnosis(
        len(ordered), verdicts, [rule.name for rule in unsaid.unmeasured],
        [rule.name for rule in unsaid.early if rule.name not in called], [rule.name for rule in unsaid.steered],
        figures, _ceiling_of(ordered),
        lines.damaged + len(lines.rows) - sum(isinstance(row.get("step"), int) for row in lines.rows),
    )  # fmt: skip


def ceiling_warning(saturated: int, measurements: int, prompts: int) -> str:
    """A sentence for people who take the ceiling of an estimate for a good mark.

    Args:
        saturated: measurements in which the estimate reached its ceiling.
        measurements: all of them.
        prompts: how many prompts the last one compared.

    Returns:
        "" where there are none, or most are below the ceiling.
    """
    if not measurements or saturated < measurements / 2:
        return ""
    return (
        f"In {saturated} of {measurements} measurements the estimate is at its ceiling: with {prompts} prompts it says "
        "that thoughts tell them apart, and no more. More prompts (diagnostics.prompts, or a larger "
        "diagnostics.max_share) raise the ceiling."
    )


def _ceiling_of(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = [row for row in rows if number(row.get("information/first/sequence/share")) is not None]
    prompts = number(measured[-1].get("information/first/prompts")) if measured else None
    saturated = sum(row.get("information/first/sequence/saturated") == 1.0 for row in measured)
    return ceiling_warning(saturated, len(measured), int(prompts or 0))
