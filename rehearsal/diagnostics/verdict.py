"""What is wrong with a run, in plain words: verdicts over its metrics, with hysteresis.

A rule (:mod:`rehearsal.diagnostics.rules`) says of a run, as it stood after a step, whether its condition holds, with
the figures that show it. A verdict begins when the condition has held for ``begins_after`` steps in a row in which it
could be judged, and ends when it has not held for ``ends_after``; so a figure that hovers around a threshold gives one
verdict and not ten. Rules look back only: what is said of a step stays said, and a run that is read from its files gets
the verdicts that it had live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rehearsal.diagnostics.rules import RULES, Rule, Thresholds
from rehearsal.diagnostics.series import Series


@dataclass(frozen=True)
class Verdict:
    """A rule that applied for a while.

    Attributes:
        rule: which.
        began: the first step of those whose condition held.
        called: the step at which it was said.
        ended: the last step at which it applied; None if it applies still.
        evidence: the figures when it was called.
    """

    rule: Rule
    began: int
    called: int
    evidence: str
    ended: int | None = None

    def text(self) -> str:
        """Everything in one paragraph."""
        return f"{self.rule.title}: {self.evidence} {self.rule.sentence} {self.rule.suggestion}"


@dataclass
class _Standing:
    hits: int = 0
    misses: int = 0
    first: int = 0
    current: int | None = None
    last: int = 0


class Watch:
    """Follows a run step by step.

    Args:
        thresholds: the numbers in the rules.
        rules: all of :data:`RULES` if None.
    """

    def __init__(self, thresholds: Thresholds | None = None, rules: Sequence[Rule] | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.rules = tuple(RULES if rules is None else rules)
        self.verdicts: list[Verdict] = []
        self._standing = {rule.name: _Standing() for rule in self.rules}

    def look(self, series: Series) -> list[Verdict]:
        """Judge the last step of a run whose earlier steps were judged before.

        Returns:
            the verdicts that are called now.
        """
        called = []
        for rule in self.rules:
            if not series.fresh(rule.needs) or (rule.unless and series.fresh(rule.unless)):
                continue
            evidence = rule.condition(series, self.thresholds)
            standing = self._standing[rule.name]
            if evidence is None:
                standing.hits = 0
                standing.misses += 1
                if standing.current is not None and standing.misses >= rule.ends_after:
                    verdict = self.verdicts[standing.current]
                    self.verdicts[standing.current] = replace(verdict, ended=standing.last)
                    standing.current = None
                continue
            standing.misses = 0
            standing.hits += 1
            standing.last = series.step
            if standing.hits == 1:
                standing.first = series.step
            if standing.current is None and standing.hits >= rule.begins_after:
                if series.in_later_stage:
                    evidence = f"{evidence} All figures are of the present stage."
                standing.current = len(self.verdicts)
                self.verdicts.append(Verdict(rule, standing.first, series.step, evidence))
                called.append(self.verdicts[-1])
        return called


class Unheard(NamedTuple):
    """Rules that had no say in a run.

    Attributes:
        unmeasured: their figure was never measured.
        early: it was measured too few times for all that they judge.
        steered: the curriculum decides what it is, see :attr:`Rule.unless`.
    """

    unmeasured: list[Rule]
    early: list[Rule]
    steered: list[Rule]


def unheard(series: Series, rules: Sequence[Rule] | None = None) -> Unheard:
    """The rules that cannot have said anything of a run, or not all that they are for."""
    found = Unheard([], [], [])
    for rule in RULES if rules is None else rules:
        measured = series.where(rule.needs)
        judged = measured & ~series.where(rule.unless) if rule.unless else measured
        if not measured.any():
            found.unmeasured.append(rule)
        elif not judged.any():
            found.steered.append(rule)
        elif judged.sum() < rule.first_call:
            found.early.append(rule)
    return found


def judge(
    rows: Sequence[Mapping[str, object]], thresholds: Thresholds | None = None, rules: Sequence[Rule] | None = None
) -> list[Verdict]:
    """The verdicts on a run from its metrics, in the order in which they were called.

    Args:
        rows: one mapping a step with "step" and metrics by name.
        thresholds: the numbers in the rules.
        rules: all of :data:`RULES` if None.
    """
    watch = Watch(thresholds, rules)
    whole = Series(rows)
    for count in range(1, len(rows) + 1):
        watch.look(whole.until(count))
    return watch.verdicts
