"""How many calls does an agent need before it serves a new company well, learning from rewards or from what it hears?

    python experiments/helpdesk.py [--only dual] [--seeds 5] [--workers 2] [--threads 1] [--quick]

A company says what it wants only when it has been called without it. An agent that learns from rewards alone sees a
failure like any other; one that learns from the words is told the solution. Every arm plays the same episodes:

1. lead-in: companies that all arms get to know, so that the policy learns to act on what it expects;
2. new: companies that nobody has called before, one episode each in a step, with tests on other matters of theirs
   between the steps. A company is served once it is settled in 80% of its test matters; counted are the episodes that
   were played with it before;
3. many: two hundred more companies in lots, as the months go by; afterwards the companies of phase 2, which nobody has
   called since, are tested again (forgetting);
4. changed: those companies in a new revision in which most of them want something else, counted as in phase 2.

Arms: rewards alone; one set of parameters for both (ECHO); an adapter each (dual); dual with rehearsal; a world adapter
that is trained and not used; dual with rehearsal on answers that were dealt out among episodes (placebo). The measure
of what can be done is a scripted person who remembers what was said once.

Every call of a company is on a matter of its own, so rewards are not compared within groups: the policy learns by
REINFORCE++, whose baseline is that of the step. Companies whose names the base has met in another world are left out.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.policies import base_fingerprint
from rehearsal.environments import make
from rehearsal.environments.helpdesk import company_names
from rehearsal.environments.helpdesk_memory import RememberingOracle
from rehearsal.evaluation.statistics import mean_interval
from rehearsal.generation.sampling import stream_key
from rehearsal.rollout import Task
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import resolve_recipe

LEAD_IN = range(0, 50)
NEW = range(50, 75)
MANY = range(75, 325)
"""Indices of companies; of ten that follow each other eight are in the training split, and only those are called."""
LOT = 50
"""Indices of one lot of phase 3."""
WORLD_OF_THE_BASE, MET = 1, 100
"""The companies that the base was trained with."""
MATTERS = 10
"""Matters that a company is tested with."""
SERVED = 0.8
TESTED = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 60, 80, 120, 160, 200)
"""Episodes with each company after which it is tested."""
CHANGED = {"revision": 1, "changed": 1.0}
STEPS = {"lead_in": 40, "new": 200, "many": 10, "changed": 40}
"""Steps of a phase, in phase 3 of each lot."""

COMMON: dict[str, Any] = {
    "environment.name": "helpdesk", "agent.max_tokens_per_turn": 64, "agent.max_context": 1024,
    "algorithm.name": "reinforce_pp",
    "training.group_size": 1, "training.learning_rate": 1e-3, "training.beta2": 0.95,
    "training.max_grad_norm": 0.5, "training.pack_tokens": 2048, "training.steps": 1000,
    "evaluation.episodes": 0, "evaluation.every": 0, "diagnostics.every": 0, "diagnostics.gradients_every": 0,
    "engine.processes": 1, "adapters.policy_rank": 32, "adapters.world_rank": 32,
}  # fmt: skip
REHEARSE: dict[str, Any] = {"agent.rehearse": True, "world.horizon": 8, "world.replay": 64}
ARMS: dict[str, dict[str, Any]] = {
    "policy_only": {"world.mode": "policy_only", "adapters.policy_rank": 64, "adapters.world_rank": 0},
    "shared": {"world.mode": "shared", "adapters.policy_rank": 64, "adapters.world_rank": 0},
    "dual": {"world.mode": "dual"},
    "dual_rehearse": {"world.mode": "dual", **REHEARSE},
    "inactive": {"world.mode": "inactive"},
    "placebo": {"world.mode": "placebo", **REHEARSE},
}


class Desk(Trainer):
    """A trainer that is told which companies to call."""

    def learn(self, companies: Sequence[int]) -> None:
        """One step: every company once."""
        self.recipe.training.groups = len(companies)
        number = self.steps_done
        tasks = [_task(company, f"step {number}", self.recipe.seed) for company in companies]
        groups = self.player.play(tasks, 1, step=number)
        self.history.append(
            self.learner.step(groups, number, situations=self.memory.situations(groups, number)) | self.memory.figures
        )
        self.steps_done += 1

    def test(self, companies: Sequence[int]) -> list[float]:
        """Share of test matters settled, for each company; the same matters whenever it is asked."""
        tasks = [_task(company, f"test {i}", 0) for company in companies for i in range(MATTERS)]
        groups = self.player.play(tasks, 1, step=-1)
        settled = [float(bool(group.trajectories[0].success)) for group in groups]
        return [sum(settled[i : i + MATTERS]) / MATTERS for i in range(0, len(settled), MATTERS)]


def _task(company: int, matter: str, seed: int) -> Task:
    return Task(stream_key(seed, "helpdesk", company, matter) % 2**31, options={"company": company})


def training_companies(indices: range) -> list[int]:
    """Those of the training split whose names the base has not met."""
    met = set(company_names(WORLD_OF_THE_BASE)[:MET])
    return [index for index in indices if index % 10 < 8 and company_names(0)[index] not in met]


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All phases with one arm and one seed."""
    import torch

    torch.set_num_threads(int(settings["threads"]))
    desk = Desk(resolve_recipe(None, {"seed": settings["seed"], **settings["overrides"]}))
    steps: Mapping[str, int] = settings["steps"]
    new = training_companies(range(*settings["new"]))
    figures: dict[str, Any] = {}
    for _ in range(steps["lead_in"]):
        desk.learn(training_companies(range(*settings["lead_in"])))
    figures["before"] = statistics.mean(desk.test(new))
    figures["new"] = meet(desk, new, steps["new"])
    figures["new_at_the_end"] = statistics.mean(desk.test(new))
    first, last = settings["many"]
    for lot in range(first, last, LOT):
        for _ in range(steps["many"]):
            desk.learn(training_companies(range(lot, min(lot + LOT, last))))
    figures["remembered"] = statistics.mean(desk.test(new))
    figures["last_lot"] = statistics.mean(desk.test(training_companies(range(last - LOT, last))))
    desk.close()
    changed = {f"environment.params.{name}": value for name, value in CHANGED.items()}
    later = Desk(resolve_recipe(desk.recipe, changed), policy=desk.policy)
    later.learner, later.memory, later.steps_done = desk.learner, desk.memory, desk.steps_done
    figures["changed_before"] = statistics.mean(later.test(new))
    figures["changed"] = meet(later, new, steps["changed"])
    figures["changed_at_the_end"] = statistics.mean(later.test(new))
    later.close()
    figures["foretold"] = [round(row.get("rehearse/foretold", math.nan), 3) for row in desk.history]
    return figures


def meet(desk: Desk, companies: Sequence[int], steps: int) -> list[float | None]:
    """Play companies until each is served; the episodes that each took, None if that many steps did not do."""
    took: dict[int, float] = {}
    for step in range(steps + 1):
        if step:
            desk.learn(companies)
        if step in TESTED:
            for company, share in zip(companies, desk.test(companies), strict=True):
                if share >= SERVED:
                    took.setdefault(company, float(step))
        if len(took) == len(companies):
            break
    return [took.get(company) for company in companies]


def person(companies: Sequence[int], seed: int) -> tuple[list[float], list[float]]:
    """The same episodes with a person who remembers what was said: episodes until served, before and after the
    change."""
    player = RememberingOracle()
    took: list[list[float]] = []
    for env in (make("helpdesk"), make("helpdesk", **CHANGED)):
        took.append([])
        for company in companies:
            tests = [_task(company, f"test {i}", 0) for i in range(MATTERS)]
            count = 0
            # What a test teaches is forgotten again.
            while sum(_settled(env, copy.deepcopy(player), test) for test in tests) < SERVED * MATTERS:
                _settled(env, player, _task(company, f"person {count}", seed))
                count += 1
            took[-1].append(float(count))
    return took[0], took[1]


def _settled(env: Any, player: RememberingOracle, task: Task) -> bool:
    observation, info = env.reset(seed=task.seed, options=dict(task.options))
    over = False
    while not over:
        observation, _, terminated, truncated, info = env.step(player.act(observation))
        over = terminated or truncated
    return bool(info["success"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(ARMS), action="append", help="arms; all if left out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="one seed, few companies and steps, stored nowhere")
    options = parser.parse_args()
    arms = ["dual_rehearse"] if options.quick else options.only or list(ARMS)
    seeds = 1 if options.quick else options.seeds
    steps = dict.fromkeys(STEPS, 2) if options.quick else STEPS
    spans = {"lead_in": LEAD_IN, "new": NEW, "many": range(75, 125) if options.quick else MANY}
    cells = {
        f"{arm}-{seed}": {
            "seed": seed, "threads": options.threads, "base": base_fingerprint(), "steps": steps,
            **{name: [span.start, span.stop] for name, span in spans.items()},
            "overrides": {**COMMON, **ARMS[arm]},
        }
        for seed in range(seeds)
        for arm in arms
    }  # fmt: skip
    played = run_cells("helpdesk", cells, play, None if options.quick else RESULTS, options.workers)

    figures: dict[str, Any] = {}
    people = [person(training_companies(NEW), seed) for seed in range(seeds)]
    for phase, number in (("new", 0), ("changed", 1)):
        figures[f"person_{phase}_calls"] = statistics.mean(statistics.mean(one[number]) for one in people)
        for arm in arms:
            runs = [played[f"{arm}-{seed}"][phase] for seed in range(seeds)]
            # Those that were not served in time count with the most that was tried: a bound from below.
            most = float(steps[phase])
            means = [statistics.mean(most if took is None else took for took in run) for run in runs]
            mean, low, high = mean_interval(means)
            figures |= {f"{arm}_{phase}_calls": mean, f"{arm}_{phase}_low": low, f"{arm}_{phase}_high": high}
            figures[f"{arm}_{phase}_served"] = statistics.mean(
                statistics.mean(took is not None for took in run) for run in runs
            )
    for arm in arms:
        for name in ("before", "new_at_the_end", "remembered", "last_lot", "changed_before", "changed_at_the_end"):
            mean, low, high = mean_interval([played[f"{arm}-{seed}"][name] for seed in range(seeds)])
            figures |= {f"{arm}_{name}": mean, f"{arm}_{name}_low": low, f"{arm}_{name}_high": high}
    goals: dict[str, str] = {}
    if {"dual_rehearse", "policy_only", "placebo"} <= set(arms):
        ours = figures["dual_rehearse_new_calls"]
        figures["calls_over_policy_only"] = ours / figures["policy_only_new_calls"]
        figures["calls_over_person"] = ours / figures["person_new_calls"]
        figures["placebo_calls_over_policy_only"] = figures["placebo_new_calls"] / figures["policy_only_new_calls"]
        goals = {
            "calls_over_policy_only": "<= 0.1", "calls_over_person": "<= 3.0",
            "placebo_calls_over_policy_only": ">= 0.1",
        }  # fmt: skip
    result = report("helpdesk", figures, {} if options.quick else goals, list(range(seeds)), options.quick)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
