"""Do the verdicts see a collapse coming? Runs pushed into collapse and healthy ones, judged as by a detector.

    python experiments/collapse.py [--seeds 12] [--workers 2] [--threads 1] [--quick]

Four ways to ruin a run, and as many kinds of healthy ones, each with several seeds:

- ``regularised``: an entropy bonus that is too strong for tasks with little reward variance left;
- ``noisy``: FrozenLake where four moves of five slip, at a high learning rate;
- ``deaf``: after a good beginning the reward is a coin, thrown at the first action, that does not know what the agent
  did;
- ``too_fast``: four times the learning rate.

A run has collapsed when its success in training (a mean over five steps) has fallen by a fifth from its best, and by
more than chance; a pushed run that has not is counted apart. A collapse is called when any rule but ``success_fell``
gives a verdict before that, or no later than at that step; the lead is in steps. A false alarm is any verdict on a
healthy run.

Thresholds are chosen on the first half of the seeds of every arm and judged on the other half (``judged``). Chosen are
the quietest ones that reach the goals: from a detector that hardly ever speaks, one threshold after the other is made
sharper until it does. (To choose those with the longest lead instead was tried first, on three seeds in halves: it took
thresholds so sharp that half of the healthy runs of the other half were called.) ``shipped`` are the thresholds that
come with the package, on the second half too. Rules and thresholds were changed with the first half known, and fixed
before anybody looked at what they say of the second half; ``known`` is what they say of that first half, which shows
nothing more than that they fit it.

What the arms are and are not: ``noisy`` has 6.7 times the healthy rate besides, because slips alone ruin no run of this
length, so it shows no effect of noise by itself; and the coin of ``deaf`` knows neither thought nor action. A call at
the very step of the fall counts, with a lead of 0. A healthy run that falls all the same, and is not called, counts as
healthy.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.policies import origin, train_cell
from rehearsal.diagnostics import RULES, Series, Thresholds, judge
from rehearsal.environments.frozenlake import FrozenLake

SEEDS = 12
STEPS = 60
COMMON: dict[str, Any] = {
    "training.steps": STEPS, "training.groups": 16, "evaluation.every": 0, "evaluation.episodes": 0,
    "engine.processes": 1, "diagnostics.every": 2, "diagnostics.gradients_every": 5, "training.schedule": "constant",
    "training.learning_rate": 3e-4,
}  # fmt: skip
PUSHED: dict[str, dict[str, Any]] = {
    "regularised": {
        "algorithm.options.entropy_coefficient": 0.04, "environment.params.size": 3, "environment.params.frozen": 0.95,
    },
    "noisy": {"environment.params.slip": 0.8, "training.learning_rate": 2e-3},
    "deaf": {"environment.name": "experiments.collapse:CoinLake", "training.learning_rate": 4e-4},
    "too_fast": {"training.learning_rate": 1.2e-3},
}  # fmt: skip
WELL = {"deaf": 20}
"""Steps of an arm that are played as they should be, before the push: without success there is nothing to fall."""
HEALTHY: dict[str, dict[str, Any]] = {
    "plain": {},
    "slip": {"environment.params.slip": 0.2},
    "slow": {"training.learning_rate": 1e-4},
    "filtered": {"filter.name": "top_p"},
}
KEPT = ("train/", "policy/", "signal/", "behaviour/", "information/first/sequence/", "gradient/")
"""What a cell stores of each step, by the beginnings of names: whatever a rule may read, so that new rules and other
thresholds can be judged on it too."""
CANDIDATES: dict[str, Sequence[float]] = {
    "large_step": (0.04, 0.02, 0.01, 0.007, 0.005, 0.003),
    "unpaid": (0.04, 0.08, 0.16, 0.32),
    "entropy_rise": (3.0, 2.5, 2.0, 1.75),
    "dead": (0.95, 0.85, 0.75),
    "information_fall": (0.5, 0.7, 0.85),
    "information_low": (0.25, 0.5, 0.75),
    "entropy_fall": (0.05, 0.075, 0.1, 0.15),
    "spread_fall": (0.35, 0.5, 0.65),
    "reward_fall": (0.4, 0.2),
    "longer": (1.75, 1.3),
    "invalid": (0.25, 0.15, 0.1, 0.05),
}
"""What may be chosen, from quiet to sharp."""
CALLED, LEAD, FALSE_ALARMS = 0.9, 10.0, 0.05
"""The goals."""
FALL = 0.2


class CoinLake(FrozenLake):
    """FrozenLake whose reward is a coin thrown at the first action. Success is told as it is."""

    def _draw(self, split: str) -> str:
        self._thrown = False
        return super()._draw(split)

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        _, over, success, moved = super()._act(action)
        reward = 0.0 if self._thrown else float(self.np_random.random() < 0.5)
        self._thrown = True
        return reward, over, success, moved


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One training run, with the metrics that rules read."""
    rows: list[Mapping[str, float]] = []
    figures: dict[str, Any] = {}
    policy = None
    for number, part in enumerate(settings["parts"]):
        # Each part has tasks of its own.
        trainer, found = train_cell(
            {**settings, "seed": settings["seed"] + 1000 * number, "overrides": part}, policy=policy
        )
        policy = trainer.policy
        rows += trainer.history
        figures = {name: figures.get(name, 0.0) + found[name] for name in ("seconds", "updates", "episodes")}
    # A line of text for each step: as many numbers in lines of their own would be nobody's to read.
    figures["metrics"] = [
        json.dumps({"step": i + 1, **{k: float(f"{value:.4g}") for k, value in row.items() if k.startswith(KEPT)}})
        for i, row in enumerate(rows)
    ]
    return figures


def completed(row: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics with what rules read and cells that were played earlier hold in parts only."""
    found: dict[str, float] = {}
    kinds = [
        ("behaviour/thought_tokens", "behaviour/entropy_thought"),
        ("behaviour/answer_tokens", "behaviour/entropy_action"),
    ]
    told = [(row[tokens], row[entropy]) for tokens, entropy in kinds if entropy in row]
    if told:
        found["behaviour/entropy"] = sum(a * b for a, b in told) / sum(a for a, _ in told)
    if row.get("policy/updates", 0.0) > 1 and "policy/kl_sampling" in row:
        found["policy/moved"] = row["policy/kl_sampling"]
    return {**found, **row}


def parts_of(arm: str, changes: Mapping[str, Any], quick: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of an arm's run: of all its steps, or of those before the push and those after it."""
    whole = {**COMMON, **changes, **quick}
    if arm not in WELL:
        return [whole]
    return [
        {**COMMON, **quick, "training.steps": WELL[arm]},
        {**whole, "training.steps": whole["training.steps"] - WELL[arm]},
    ]


def fall_of(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The first step at which success has fallen by a fifth from its best, by more than chance; None if it never
    has."""
    whole = Series(rows)
    for count in range(5, len(rows) + 1):
        series = whole.until(count)
        fallen = series.recent("train/success") < (1 - FALL) * series.best("train/success")
        if fallen and series.fall("train/success") > Thresholds().certain:
            return series.step
    return None


def called_at(rows: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> tuple[int, str] | None:
    """Step and name of the first verdict that is not the fall itself."""
    found = [v for v in judge(rows, thresholds) if v.rule.name != "success_fell"]
    return min(((v.called, v.rule.name) for v in found), default=None)


class Calls(NamedTuple):
    """What a detector said of some runs.

    Attributes:
        leads: for each pushed run that fell, the steps from the call to the fall; None where it was not called in time.
        alarms: for each healthy run, whether anything was called.
    """

    leads: list[int | None]
    alarms: list[bool]

    def figures(self) -> dict[str, float]:
        """The detector's figures; NaN where there is nothing to judge."""
        leads = [lead for lead in self.leads if lead is not None]
        return {
            "collapses": float(len(self.leads)),
            "called": len(leads) / len(self.leads) if self.leads else math.nan,
            "median_lead": statistics.median(leads) if leads else math.nan,
            "healthy": float(len(self.alarms)),
            "false_alarms": sum(self.alarms) / len(self.alarms) if self.alarms else math.nan,
        }


def calls_of(
    pushed: Sequence[Sequence[Mapping[str, Any]]], healthy: Sequence[Sequence[Mapping[str, Any]]], limits: Thresholds
) -> Calls:
    """What the verdicts say of some runs with some thresholds."""
    leads: list[int | None] = []
    for rows in pushed:
        if (fall := fall_of(rows)) is not None:
            call = called_at(rows, limits)
            leads.append(fall - call[0] if call is not None and call[0] <= fall else None)
    return Calls(leads, [called_at(rows, limits) is not None for rows in healthy])


def choose(pushed: Sequence[Any], healthy: Sequence[Any]) -> Thresholds:
    """The quietest thresholds that reach the goals on these runs, or come as near to them as it goes."""

    def worth(limits: Thresholds) -> tuple[float, float, float]:
        found = calls_of(pushed, healthy, limits).figures()
        called = 0.0 if math.isnan(found["called"]) else found["called"]
        lead = 0.0 if math.isnan(found["median_lead"]) else found["median_lead"]
        return -max(0.0, found["false_alarms"] - FALSE_ALARMS), called, min(lead, LEAD)

    best = replace(Thresholds(), **{name: values[0] for name, values in CANDIDATES.items()})
    while True:
        held = worth(best)
        if held[1] >= CALLED and held[2] >= LEAD:
            return best
        sharper = []
        for name, values in CANDIDATES.items():
            later = values[values.index(getattr(best, name)) + 1 :]
            sharper += [(replace(best, **{name: value}), notches) for notches, value in enumerate(later, start=1)]
        # Of equally good ones the one that is changed least.
        found = max(sharper, key=lambda one: (worth(one[0]), -one[1]), default=None)
        if found is None or worth(found[0]) <= held:
            return best
        best = found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="the first half chooses, the second judges")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="eight short runs, stored nowhere")
    options = parser.parse_args()
    seeds = 2 if options.quick else options.seeds
    quick = {"training.steps": 6, "training.groups": 4, "evaluation.episodes": 0} if options.quick else {}
    arms = {"plain": HEALTHY["plain"], "too_fast": PUSHED["too_fast"]} if options.quick else {**HEALTHY, **PUSHED}
    cells = {
        f"{arm}-{seed}": {
            "recipe": "frozenlake", "seed": seed, "threads": options.threads, **origin("frozenlake"),
            "parts": parts_of(arm, changes, quick),
        }
        for seed in range(seeds)
        for arm, changes in arms.items()
    }  # fmt: skip
    played = run_cells("collapse", cells, play, None if options.quick else RESULTS, options.workers)
    rows = {name: [completed(json.loads(line)) for line in figures["metrics"]] for name, figures in played.items()}

    def some(kinds: Mapping[str, Any], which: Sequence[int]) -> list[Any]:
        return [rows[f"{arm}-{seed}"] for arm in kinds if arm in arms for seed in which]

    first, second = range(seeds // 2), range(seeds // 2, seeds)
    chosen = choose(some(PUSHED, first), some(HEALTHY, first))
    looks = {"judged": (second, chosen), "shipped": (second, Thresholds()), "known": (first, Thresholds())}
    figures: dict[str, Any] = {f"threshold_{name}": getattr(chosen, name) for name in CANDIDATES}
    for name, (which, limits) in looks.items():
        found = calls_of(some(PUSHED, which), some(HEALTHY, which), limits).figures()
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    for arm in arms:
        runs = [rows[f"{arm}-{seed}"] for seed in range(seeds)]
        figures[f"{arm}_fell"] = sum(fall_of(run) is not None for run in runs)
        verdicts = [called_at(run, Thresholds()) for run in runs]
        figures[f"{arm}_called"] = sum(verdict is not None for verdict in verdicts)
        for rule in RULES:
            begun = sum(verdict is not None and verdict[1] == rule.name for verdict in verdicts)
            if begun:
                figures[f"{arm}_first_{rule.name}"] = begun
        figures[f"{arm}_success_at_the_end"] = statistics.mean(Series(run).recent("train/success") for run in runs)
    bounds = {"called": f">= {CALLED}", "median_lead": f">= {LEAD}", "false_alarms": f"<= {FALSE_ALARMS}"}
    goals = {f"judged_{name}": bound for name, bound in bounds.items()}
    partial = options.quick or seeds < SEEDS
    result = report("collapse", figures, {} if options.quick else goals, list(range(seeds)), partial)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
