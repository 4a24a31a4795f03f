"""Measures the learning signal of a run as it goes, within a budget, and says when something is wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rehearsal.diagnostics import (
    CrossTable,
    Series,
    SmoothedDeviation,
    Tags,
    Verdict,
    Watch,
    any_turn_table,
    behaviour_metrics,
    first_turn_table,
    measure,
    signal_metrics,
)
from rehearsal.models.chat import ChatRenderer
from rehearsal.training.choices import check_verdicts
from rehearsal.training.learner import Learner
from rehearsal.training.options import DiagnosticsOptions
from rehearsal.trajectory import Group, all_trajectories

_LEARNING_PASSES = 3.0
"""A token that is learned from costs about as much as three that are read: one pass forward, two back."""

_DRIFT = 0.25
"""The part of a measurement's tokens that the distance from the start reads."""


class Monitor:
    """What a trainer asks about its signal.

    Args:
        options: of the recipe.
        learner: the policy that played is scored with it, before it learns.
        renderer: of the policy; tells the tags around its thoughts.
        seed: draws samples.
    """

    def __init__(
        self, options: DiagnosticsOptions, learner: Learner, renderer: ChatRenderer, seed: int, thinking: bool = True
    ) -> None:
        check_verdicts(options)
        self.options = options
        self.watch = Watch()
        self._learner = learner
        self._seed = seed
        self._thinking = thinking
        self._tags = Tags(tuple(renderer.encode("<think>").tolist()), tuple(renderer.encode("</think>").tolist()))
        self._series = Series(())
        self._deviations: dict[str, SmoothedDeviation] = {}

    # Figures

    def measure(self, groups: Sequence[Group], step: int, families: Sequence[int] | None = None) -> dict[str, float]:
        """Everything about a batch that needs no gradient.

        Args:
            groups: all that were played.
            step: number of the step, from 0.
            families: for each group the environment that it was played in; one for all if None. Whether thoughts
                depend on their prompts is asked within each of them: that they tell environments apart is no answer.
        """
        began = time.perf_counter()
        figures = {**signal_metrics(groups), **behaviour_metrics(groups)}
        every = self.options.every
        if self._due(every, step) and self._thinking:
            figures |= self._information(groups, step, families)
        # Half-way between two looks at the thoughts, so that no step pays for both.
        if self._due(every, step + every // 2):
            figures |= self._learner.drift(groups, self._budget(groups, _DRIFT), self._rng(step, 2, 0))
        figures["time/diagnostics"] = time.perf_counter() - began
        return figures

    def probe_groups(self, step: int) -> int:
        """Groups of each quartile whose gradients are to be taken apart in a step."""
        return self.options.gradient_groups if self._due(self.options.gradients_every, step) else 0

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _information(
        self, groups: Sequence[Group], step: int, families: Sequence[int] | None
    ) -> dict[str, float]:  # fmt: skip
        """The figures of each environment by itself, and their means over the environments."""
        kinds = [0] * len(groups) if families is None else list(families)
        budget = self._budget(groups, (1 - _DRIFT if self.options.every == 1 else 1) / 2)
        found = [
            self._information_in(
                [group for group, kind in zip(groups, kinds, strict=True) if kind == family], step, family,
                budget // len(set(kinds)),
            )
            for family in sorted(set(kinds))
        ]  # fmt: skip
        names = dict.fromkeys(name for figures in found for name in figures)
        told = {name: [figures[name] for figures in found if name in figures] for name in names}
        return {
            name: sum(values) if name.endswith("/tokens") else sum(values) / len(values)
            for name, values in told.items()
        }

    def _budget(self, groups: Sequence[Group], part: float) -> int:
        """Tokens that a part of a measurement may read: its part of a share of what the step reads.

        In tokens and not in seconds, so a run on a busy machine measures the same. What is played is read once, and
        what is learned from (as in the step before: dead groups and common prompts are left out) three times over.
        """
        played = sum(trajectory.n_tokens for trajectory in all_trajectories(groups) if not trajectory.failed)
        learned = self._series.last("speed/learner_tokens")
        if math.isnan(learned):
            learned = played / 2
        return int(self.options.max_share * (played + _LEARNING_PASSES * learned) * part)

    def _information_in(self, groups: Sequence[Group], step: int, family: int, budget: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        most = self.options.prompts
        tables: dict[str, CrossTable | None] = {
            "first": first_turn_table(groups, self._tags, self._rng(step, 0, family), budget, most),
            "all": any_turn_table(groups, self._tags, self._rng(step, 1, family), budget, most),
        }
        for name, table in tables.items():
            if table is None:
                continue
            found = measure(table, self._learner.score)
            figures |= found.sequence.sample_figures(f"information/{name}")
            figures |= found.sequence.figures(f"information/{name}/sequence")
            figures |= found.per_token.figures(f"information/{name}/per_token")
            figures[f"information/{name}/empty"] = found.empty
            figures[f"information/{name}/tokens"] = float(found.cost)
            for definition, estimate in (("sequence", found.sequence), ("per_token", found.per_token)):
                key = f"{name}/{definition}"
                own = f"{family}/{key}" if family else key
                smoothed = self._deviations.setdefault(own, SmoothedDeviation()).update(estimate.marginal_deviation)
                figures[f"information/{key}/z_score_smoothed"] = estimate.smoothed_z_score(smoothed)
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _rng(self, step: int, which: int, family: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, step, 7, which, *([family] if family else [])])

    # Verdicts

    def judge(self, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        """Take in the metrics of a step; returns the verdicts that are called now."""
        self._series.append({"step": step, **metrics})
        return self.watch.look(self._series)

    def end_of(self, called: Sequence[Verdict]) -> Verdict | None:
        """The first of these verdicts that the recipe ends the run on."""
        ending = {*self.options.stop_on, *self.options.go_back_on}
        return next((verdict for verdict in called if verdict.rule.name in ending), None)

    # State

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know; the verdicts follow from the metrics."""
        return {name: deviation.value for name, deviation in self._deviations.items()}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self._deviations = {name: SmoothedDeviation(value=value) for name, value in state.items()}

    def replay(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Judge the steps of a run that is resumed."""
        self._series, self.watch = Series(()), Watch()
        for row in rows:
            self._series.append(row)
            self.watch.look(self._series)
