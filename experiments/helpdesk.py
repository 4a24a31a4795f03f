"""How many calls does an agent need before it serves a new company well, learning from rewards or from what it hears?

    python experiments/helpdesk.py [--only dual] [--seeds 5] [--workers 2] [--threads 1] [--quick]

A company says what it wants only when it has been called without it. An agent that learns from rewards alone sees a
failure like any other; one that learns from the words is told the solution. Every arm plays the same episodes, as many
in every phase:

1. lead-in: companies that all arms get to know, so that the policy learns to act on what it expects. How often a matter
   is settled for which all that is wanted was gathered is the ceiling that execution sets;
2. new: companies that nobody has called before, one episode each in a step, with tests between the steps;
3. many: two hundred more companies in lots, as the months go by; afterwards the companies of phase 2, which nobody has
   called since, are tested again (forgetting);
4. changed: those companies in a new revision in which most of them want something else, counted as in phase 2.

A test is a matter of each kind, each on another day, played without chance (temperature 0). A company is served once
80% of its matters are settled in two tests running; counted are the calls before the first of them. Tests are far apart
after many calls, so what an arm is compared with counts with one call more than at the last test that it failed. The
main figure is the median over companies, since one stubborn company decides a mean. Companies that somebody serves who
brings the same three facts everywhere, or whom an arm or the person serves before the first call, tell nothing about
learning and count for no arm.

Arms: rewards alone; one set of parameters for both (ECHO); an adapter each (dual); dual with rehearsal; rehearsal with
rewards alone (rehearse_only); dual with rehearsal on answers that were dealt out among episodes (placebo). What follows
from what the agent was shown ("Ready: PIN.") is nobody's target. Dual with rehearsal and without replay (no_replay), as
many updates on what was heard in the step, is the control of forgetting: what the companies of phase 2 lose in phase 3.
With one seed besides: rewards alone with the rank that the policy has in dual; and a world adapter that is trained and
not used, which must leave the same policy bit for bit. The measure of what can be done is a scripted person who
remembers what was said once.

Every call of a company is on a matter of its own, so rewards are not compared within groups: the policy learns by
REINFORCE++, whose baseline is that of the step. Companies whose names the base has met in another world are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.helpdesk_companies import (
    CHANGED,
    LEAD_IN,
    LOT,
    MANY,
    NEW,
    SERVED,
    TESTED,
    matters_of,
    task_of,
    training_companies,
    world_digest,
)
from experiments.helpdesk_figures import figures_of
from experiments.policies import base_fingerprint, resolved
from rehearsal.environments import make
from rehearsal.environments.helpdesk_words import FACTS, GATHER, MATTERS, REACH
from rehearsal.generation.sampling import SamplingParams
from rehearsal.models.adapters import POLICY, adapter_parameters
from rehearsal.rollout import Task
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import resolve_recipe
from rehearsal.trajectory import Group, Trajectory

STEPS = {"lead_in": 4, "new": 60, "many": 3, "changed": 20}
"""Steps of a phase, in phase 3 of each lot. Those of ``new`` and ``changed`` are in ``TESTED``; a company that is not
served by then counts with them, so that a ratio to an arm that serves few is a bound from above."""
WITHOUT_CHANCE = SamplingParams(temperature=0.0)

COMMON: dict[str, Any] = {
    "environment.name": "helpdesk", "agent.max_tokens_per_turn": 64, "agent.max_context": 1024,
    "algorithm.name": "reinforce_pp", "sampling.temperature": 0.7,
    "training.group_size": 1, "training.learning_rate": 1e-3, "training.beta2": 0.999,
    "training.max_grad_norm": 0.5, "training.pack_tokens": 2048, "training.steps": 1000,
    "evaluation.episodes": 0, "evaluation.every": 0, "diagnostics.every": 0, "diagnostics.gradients_every": 0,
    "engine.processes": 1, "adapters.policy_rank": 32, "adapters.world_rank": 32,
}  # fmt: skip
HEARD = {"world.foreseeable": False}
ALONE = {"adapters.policy_rank": 64, "adapters.world_rank": 0}
REHEARSE: dict[str, Any] = {
    "agent.rehearse": True, "world.horizon": 8, "world.replay": 8, "world.updates": 24,
    "world.learning_rate_ratio": 2.0,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "policy_only": {"world.mode": "policy_only", **ALONE},
    "shared": {"world.mode": "shared", **ALONE, **HEARD},
    "dual": {"world.mode": "dual", **HEARD},
    "dual_rehearse": {"world.mode": "dual", **REHEARSE, **HEARD},
    "rehearse_only": {"world.mode": "policy_only", "agent.rehearse": True, **ALONE},
    "placebo": {"world.mode": "placebo", **REHEARSE, **HEARD},
    "policy_only_32": {"world.mode": "policy_only", "adapters.world_rank": 0},
    "no_replay": {"world.mode": "dual", **REHEARSE, **HEARD, "world.replay": 0},
    "inactive": {"world.mode": "inactive", **HEARD},
}
ALL_SEEDS = 5
SEEDS = {"policy_only_32": 1, "inactive": 1}
"""Arms that are played with fewer seeds than the others."""
ENDS_AFTER_NEW = ("inactive",)
"""By then a policy that is not that of ``policy_only_32`` has shown it."""


@dataclass(frozen=True)
class Outcome:
    """What became of an episode: whether the matter was settled, whether all that was wanted had been gathered, and
    whether the facts that the agent said it would hear were just those; None where it foretold nothing."""

    settled: bool
    gathered: bool
    foretold: bool | None


def outcome_of(trajectory: Trajectory, wanted: Sequence[str]) -> Outcome:
    """What became of an episode with a company that wants these facts."""
    done = {action for turn in trajectory.turns for action in turn.executed}
    reaching = set(REACH.values())
    told = [p.text for turn in trajectory.turns for p in turn.predictions if reaching & set(p.actions)]
    # Whatever the words, a fact's own name is among them.
    foretold = facts_in(told[0]) == set(wanted) if told else None
    return Outcome(bool(trajectory.success), {GATHER[fact] for fact in wanted} <= done, foretold)


def facts_in(text: str) -> set[str]:
    """The facts that a text names."""
    return set(re.findall(rf"\b(?:{'|'.join(FACTS)})\b", text.casefold()))


class Desk(Trainer):
    """A trainer that is told which companies to call.

    Attributes:
        foretold: for each step the share of its episodes whose wanted facts were foretold, None where nobody foretells.
    """

    foretold: tuple[float | None, ...] = ()

    def learn(self, companies: Sequence[int]) -> None:
        """One step: every company once."""
        self.recipe.training.groups = len(companies)
        number = self.steps_done
        tasks = [task_of(company, f"step {number}", self.recipe.seed) for company in companies]
        groups = self.player.play(tasks, 1, step=number)
        self.history.append(
            self.learner.step(groups, number, situations=self.memory.situations(groups, number)) | self.memory.figures
        )
        self.steps_done += 1
        self.foretold += (_foretold(self._outcomes(tasks, groups)),)

    def test(self, companies: Sequence[int]) -> tuple[list[float], list[Outcome]]:
        """Share of test matters settled, for each company, and all outcomes; the same matters whenever it is asked."""
        if not companies:
            return [], []
        tasks = [task for company in companies for task in matters_of(company)]
        found = self._outcomes(tasks, self.player.play(tasks, 1, step=-1, sampling=WITHOUT_CHANCE))
        each = len(MATTERS)
        settled = [one.settled for one in found]
        return [sum(settled[i : i + each]) / each for i in range(0, len(settled), each)], found

    def _outcomes(self, tasks: Sequence[Task], groups: Sequence[Group]) -> list[Outcome]:
        env: Any = make(self.recipe.environment.name, **self.recipe.environment.params)
        found = []
        for task, group in zip(tasks, groups, strict=True):
            env.reset(seed=task.seed, options=dict(task.options))
            found.append(outcome_of(group.trajectories[0], env.wanted))
        return found


def _foretold(outcomes: Sequence[Outcome]) -> float | None:
    """Share of the outcomes that were foretold; None where nobody foretells."""
    if all(one.foretold is None for one in outcomes):
        return None
    return round(sum(bool(one.foretold) for one in outcomes) / len(outcomes), 3)


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All phases with one arm and one seed."""
    import torch

    torch.set_num_threads(int(settings["threads"]))
    began = time.process_time()
    desk = Desk(resolve_recipe(None, {"seed": settings["seed"], **settings["overrides"]}))
    steps: Mapping[str, int] = settings["steps"]
    new, lead_in = training_companies(range(*settings["new"])), training_companies(range(*settings["lead_in"]))
    figures: dict[str, Any] = {}

    def note(name: str, by: Desk, companies: Sequence[int]) -> list[Outcome]:
        shares, outcomes = by.test(companies)
        figures[name] = statistics.mean(shares)
        return outcomes

    for _ in range(steps["lead_in"]):
        desk.learn(lead_in)
    prepared = [one.settled for one in note("lead_in", desk, lead_in) if one.gathered]
    figures["ceiling"] = statistics.mean(prepared) if prepared else None
    figures["prepared"] = len(prepared)
    figures["new"] = meet(desk, new, steps["new"])
    figures["before"] = statistics.mean(figures["new"]["start"])
    prepared = [one.settled for one in note("new_at_the_end", desk, new) if one.gathered]
    figures["ceiling_at_the_end"] = statistics.mean(prepared) if prepared else None
    figures["policy"] = _digest_of_policy(desk)
    if not settings["ends_after_new"]:
        first, last = settings["many"]
        for lot in range(first, last, LOT):
            for _ in range(steps["many"]):
                desk.learn(training_companies(range(lot, min(lot + LOT, last))))
        note("remembered", desk, new)
        note("last_lot", desk, training_companies(range(last - LOT, last))[: len(new)])
        desk.close()
        changed = {f"environment.params.{name}": value for name, value in CHANGED.items()}
        later = Desk(resolve_recipe(desk.recipe, changed), policy=desk.policy)
        later.learner, later.memory, later.steps_done = desk.learner, desk.memory, desk.steps_done
        figures["changed"] = meet(later, new, steps["changed"])
        figures["changed_before"] = statistics.mean(figures["changed"]["start"])
        note("changed_at_the_end", later, new)
        later.close()
    desk.close()
    figures["cpu_seconds"] = round(time.process_time() - began, 1)
    return figures


def _digest_of_policy(desk: Desk) -> str:
    assert desk.policy is not None
    each = adapter_parameters(desk.policy.model, POLICY)
    return hashlib.blake2b(
        b"".join(each[name].detach().numpy().tobytes() for name in sorted(each)), digest_size=8
    ).hexdigest()


def meet(desk: Desk, companies: Sequence[int], steps: int) -> dict[str, list[Any]]:
    """Play companies for a number of steps, and test those that are not served yet on the way.

    Returns:
        ``calls``: what each company took until it was served, None where so many steps did not do; ``failed``: the
        calls before the last test that it failed, None where it failed none; ``start``: share of
        its matters settled before the first call; ``foretold``: for each step the share of its episodes whose wanted
        facts were foretold, so the first one is of companies that were never called.
    """
    record = Record(companies)
    start: list[float] = []
    for step in range(steps + 1):
        if step:
            desk.learn(companies)
        if step in TESTED:
            shares, _ = desk.test(record.unserved)
            record.add(step, shares)
            start = start or shares
    return {"calls": record.calls, "failed": record.failed, "start": start, "foretold": list(desk.foretold[-steps:])}


class Record:
    """Which companies are served since when. Two tests running have to say it; the first of them is the date."""

    def __init__(self, companies: Sequence[int]) -> None:
        self.companies = list(companies)
        self._since: dict[int, int] = {}
        self._failed: dict[int, int] = {}
        self._served: set[int] = set()

    @property
    def unserved(self) -> list[int]:
        """Companies that are still to be tested."""
        return [company for company in self.companies if company not in self._served]

    @property
    def calls(self) -> list[int | None]:
        """Calls until each company was served; None for those that are not."""
        return [self._since[company] if company in self._served else None for company in self.companies]

    @property
    def failed(self) -> list[int | None]:
        """Calls before the last test that each company failed; None for those that failed none."""
        return [self._failed.get(company) for company in self.companies]

    def add(self, calls: int, shares: Sequence[float]) -> None:
        """The shares of matters settled of the companies that are not served yet, after so many calls."""
        for company, share in zip(self.unserved, shares, strict=True):
            if share < SERVED:
                self._since.pop(company, None)
                self._failed[company] = calls
            elif company in self._since:
                self._served.add(company)
            else:
                self._since[company] = calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(ARMS), action="append", help="arms; all if left out")
    parser.add_argument("--seeds", type=int, default=ALL_SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="one seed, few companies and steps, stored nowhere")
    options = parser.parse_args()
    names = options.only or (["policy_only", "dual_rehearse"] if options.quick else list(ARMS))
    arms = {arm: 1 if options.quick else min(options.seeds, SEEDS.get(arm, options.seeds)) for arm in names}
    steps = {"lead_in": 1, "new": 2, "many": 1, "changed": 1} if options.quick else STEPS
    spans = {"lead_in": LEAD_IN, "new": NEW, "many": MANY}
    if options.quick:
        spans = {"lead_in": range(0, 10), "new": range(400, 410), "many": range(75, 85)}
    common = {
        "threads": options.threads, "base": base_fingerprint(), "steps": steps, "world": world_digest(),
        "served": SERVED, "tested": TESTED, "lot": LOT, "changed": CHANGED,
        **{name: [span.start, span.stop] for name, span in spans.items()},
    }  # fmt: skip
    cells = {
        f"{arm}-{seed}": {
            **common, "seed": seed, "ends_after_new": arm in ENDS_AFTER_NEW, "overrides": {**COMMON, **ARMS[arm]},
            "resolved": resolved(None, {**COMMON, **ARMS[arm]}),
        }
        for seed in range(max(arms.values()))
        for arm in arms
        if seed < arms[arm]
    }  # fmt: skip
    played = run_cells("helpdesk", cells, play, None if options.quick else RESULTS, options.workers)

    figures = figures_of(played, arms, training_companies(spans["new"]), steps)
    goals: dict[str, str] = {}
    if {"inactive", "policy_only_32"} <= set(arms):
        same = played["inactive-0"]["policy"] == played["policy_only_32-0"]["policy"]
        figures["inactive_is_policy_only_32"] = float(same)
        goals["inactive_is_policy_only_32"] = ">= 1"
    if {"dual_rehearse", "policy_only", "placebo"} <= set(arms):
        ours = figures["dual_rehearse_new_calls"]
        figures["calls_over_policy_only"] = ours / figures["policy_only_new_calls_at_least"]
        figures["calls_over_person"] = ours / figures["person_new_calls"]
        placebo = figures["placebo_new_calls_at_least"]
        figures["placebo_calls_over_policy_only"] = placebo / figures["policy_only_new_calls"]
        figures["placebo_calls_over_person"] = placebo / figures["person_new_calls"]
        goals |= {
            "calls_over_policy_only": "<= 0.1", "calls_over_person": "<= 3.0",
            "placebo_calls_over_policy_only": ">= 0.1", "placebo_calls_over_person": ">= 3.0",
            "placebo_minus_dual_rehearse_new_mean_calls_low": ">= 0.01",
        }  # fmt: skip
    partial = bool(options.only) or options.seeds < ALL_SEEDS
    seeds = list(range(max(arms.values())))
    result = report("helpdesk", figures, {} if options.quick else goals, seeds, options.quick or partial)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
