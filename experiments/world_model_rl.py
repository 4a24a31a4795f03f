"""Does a world model make reinforcement learning need fewer episodes?

    python experiments/world_model_rl.py [--only lake] [--seeds 5] [--workers 2] [--threads 1] [--quick]

FrozenLake 4x4 where one move of five slips, and Sokoban 6x6 with one box, both with Left and Right exchanged
(:mod:`experiments.turned`): the base that ships has met the plain ones and foretells most of what they answer word for
word before any training, so they have little left to teach it. Every arm has low-rank adapters of 64 ranks in total
over that base, plays the same number of episodes with the same seeds of tasks and noise (``self_play`` has tasks of its
own in its second part), with the same limits of tokens whether it rehearses or not, and is judged before, on the way
and at the end on one set of held-out tasks.

Arms: rewards alone (``policy_only``; with the rank that the policy has in ``dual``, ``policy_only_32``); one adapter
for both (``shared``, ECHO); an adapter each (``dual``); the same with rehearsal of answers (``dual_rehearse``);
rehearsal with rewards alone (``rehearse_only``); ``placebo`` and ``placebo_rehearse``, which are ``dual`` and
``dual_rehearse`` with answers that are dealt out among episodes before they are learnt; ``self_play``, which learns
nothing but the answers for the first steps, eight times over, and nothing but rewards afterwards (SPA,
arXiv:2510.15047, found Sokoban 25.6 -> 59.8 and FrozenLake 22.1 -> 70.9 with 1.5B parameters); and
``self_play_placebo``, the same with answers dealt out. A world adapter that is trained and not used (``inactive``)
would be ``policy_only_32`` bit for bit, which tests show, so it is not played. Sokoban's levels are solved in four
moves or fewer, and an episode has four turns.

What counts is how many episodes an arm takes to a level: what ``policy_only`` starts at and most of what it gains. It
is reached where the mean curve over seeds stays at it from then on, so that no lucky point counts; seeds are drawn anew
for the interval. Where ``policy_only`` gains less than 15 points there is nothing to reach sooner, and no figure. The
placebos have the last word: where they do as well, the answers had nothing to do with it, so each arm that learns from
answers is also held against its own.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, digest, run_cells
from experiments.intervals import told
from experiments.policies import origin, resolved
from experiments.turned import TURNED
from rehearsal.diagnostics.world_model import PROBES
from rehearsal.environments import make
from rehearsal.evaluation.held_out import Evaluation
from rehearsal.training.loop import Trainer

COMMON: dict[str, Any] = {
    "training.steps": 16, "training.schedule": "constant", "training.learning_rate": 1.5e-3, "training.warmup_steps": 1,
    "evaluation.every": 4, "evaluation.episodes": 128, "evaluation.validation_episodes": 128,
    "diagnostics.every": 0, "diagnostics.gradients_every": 0, "engine.processes": 1,
    "adapters.policy_rank": 32, "adapters.world_rank": 32,
}  # fmt: skip
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "lake": {
        "recipe": "frozenlake", "first": 3,
        "overrides": {
            "training.groups": 32,
            "environment.name": "experiments.turned:TurnedLake", "environment.params.slip": 0.2,
            "agent.max_tokens_per_turn": 160, "agent.max_context": 1280,
        },
    },
    "sokoban": {
        "recipe": "sokoban", "first": 3,
        "overrides": {
            "training.groups": 16, "agent.max_turns": 4,
            "environment.name": "experiments.turned:TurnedSokoban", "environment.params.max_solution": 4,
            "agent.max_tokens_per_turn": 224, "agent.max_context": 1792,
        },
    },
}  # fmt: skip
"""Recipes, what differs from them, and the steps in which ``self_play`` learns the answers. Answers that rehearse are
three times as long; the limits are theirs in every arm."""
ALONE = {"adapters.policy_rank": 64, "adapters.world_rank": 0}
REHEARSE = {"agent.rehearse": True, "world.replay": 64}
ARMS: dict[str, dict[str, Any]] = {
    "policy_only": ALONE,
    "policy_only_32": {"adapters.world_rank": 0},
    "shared": {"world.mode": "shared", **ALONE},
    "dual": {"world.mode": "dual"},
    "dual_rehearse": {"world.mode": "dual", **REHEARSE},
    "rehearse_only": {"agent.rehearse": True, **ALONE},
    "placebo": {"world.mode": "placebo"},
    "placebo_rehearse": {"world.mode": "placebo", **REHEARSE},
    "self_play": {},
    "self_play_placebo": {},
}
PAIRS = (
    *((arm, "policy_only") for arm in ARMS if arm != "policy_only"),
    ("dual", "placebo"), ("dual_rehearse", "placebo_rehearse"), ("dual_rehearse", "rehearse_only"),
    ("dual", "policy_only_32"), ("self_play", "self_play_placebo"),
)  # fmt: skip
"""Arms that are compared seed by seed."""
SELF_PLAY = ("self_play", "self_play_placebo")
PLACEBOS = {"dual": "placebo", "dual_rehearse": "placebo_rehearse", "self_play": "self_play_placebo"}
EPOCHS = 8
"""Of ``self_play`` on its first episodes; they cost no more episodes."""
SHARE = 0.75
"""Of the gain of ``policy_only``, the part that makes the level."""
MEASURABLE = 0.15
RESAMPLES = 2000
SEEDS = 5

Curve = Sequence[Sequence[float]]
"""Episodes played, and success then."""


class Judged(Trainer):
    """A trainer that is judged by the same held-out tasks whenever it is judged.

    Attributes:
        goes_on: whether it goes on with a policy that has just been judged.
    """

    goes_on = False

    def evaluate(self, split: str, episodes: int) -> Evaluation | None:
        if self.goes_on and not self.steps_done:
            return None
        return super().evaluate("test", episodes)


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One arm and one seed: success on the held-out tasks by episodes played, and probes."""
    import torch

    from rehearsal.evaluation.probe import Prober
    from rehearsal.training.recipe import resolve_recipe

    torch.set_num_threads(int(settings["threads"]))
    began = time.process_time()
    recipe = resolve_recipe(settings["recipe"], {"seed": settings["seed"], **settings["overrides"]})
    steps, first = recipe.training.steps, int(settings["first"])
    phases: list[dict[str, Any]] = [{"training.steps": steps}]
    if first:
        phases = [
            {
                "world.mode": "world_only",
                "training.steps": first,
                "training.warmup_steps": 0,
                "training.epochs": EPOCHS,
            },
            {"world.mode": "policy_only", "training.steps": steps - first},
        ]
    policy = None
    done = 0
    curve: list[list[float]] = []
    figures: dict[str, Any] = {}
    rows: list[Mapping[str, float]] = []
    for number, changes in enumerate(phases):
        part = resolve_recipe(recipe, {**changes, "seed": settings["seed"] + 1000 * number})
        trainer = Judged(part, policy=policy)
        if settings["shuffled"] and trainer.learner.world is not None:
            trainer.learner.world = replace(trainer.learner.world, shuffled=True)
        trainer.goes_on = number > 0
        policy = trainer.policy
        assert policy is not None
        if not number:
            prober = Prober(part, policy.renderer, int(settings["probes"]))
            if settings["probes_before"]:
                figures["probes_before"] = prober.measure(policy.model)
        trainer.run()
        each = part.training.groups * part.training.group_size
        curve += [[float((done + step) * each), round(found["success"], 4)] for step, _, found in trainer.evaluations]
        done += part.training.steps
        last = trainer.evaluations[-1][2]
        rows += trainer.history
    figures |= {"before": curve[0][1], "after": curve[-1][1]}
    figures |= {"after_low": last["success_low"], "after_high": last["success_high"], "curve": curve}
    figures["cut_off"] = round(last.get("format_errors", 0.0), 4)
    figures["foretold"] = [round(row["rehearse/foretold"], 3) for row in rows if "rehearse/foretold" in row]
    figures["probes_after"] = prober.measure(policy.model)
    figures["cpu_seconds"] = round(time.process_time() - began, 1)
    return figures


def episodes_to(curve: Curve, level: float) -> float:
    """Episodes from which on a curve stays at a level or above it, by straight lines between its points.

    NaN if it ends below the level, and also if it is never below: then there was nothing to be learnt.
    """
    if curve[-1][1] < level:
        return math.nan
    after = curve[-1]
    for before in reversed(curve[:-1]):
        if before[1] < level:
            share = (level - before[1]) / (after[1] - before[1])
            return before[0] + share * (after[0] - before[0])
        after = before
    return math.nan


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The curves of several seeds, point by point; those of the same episodes are one point."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for episodes, success in run["curve"]:
            found.setdefault(episodes, []).append(success)
    return [[episodes, sum(each) / len(each)] for episodes, each in sorted(found.items())]


def area(curve: Curve) -> float:
    """Mean success over the episodes of a run: high for an arm that learns early, with no level to be chosen."""
    episodes, success = np.asarray(curve, dtype=float).T
    return float(np.trapezoid(success, episodes) / (episodes[-1] - episodes[0]))


def level_of(curve: Curve) -> float:
    """The level that other arms are to reach; NaN if the curve of ``policy_only`` gains too little."""
    gain = curve[-1][1] - curve[0][1]
    return curve[0][1] + SHARE * gain if gain >= MEASURABLE else math.nan


def episodes_over(runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> float:
    """Episodes that an arm takes to the level, over those of ``policy_only``; infinite if it does not get there, NaN if
    nothing is measurable."""
    own, other = mean_curve(runs), mean_curve(reference)
    level = level_of(other)
    if math.isnan(level) or own[0][1] >= level:
        return math.nan
    taken = episodes_to(own, level)
    return math.inf if math.isnan(taken) else taken / episodes_to(other, level)


def ratio_interval(
    runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> tuple[float, float, float, float]:
    """:func:`episodes_over` with its 95% bootstrap interval over seeds, which are drawn anew for both arms alike; with
    five seeds it is rather too narrow. Draws in which nothing is measurable are left out; their share comes last."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        seeds = rng.integers(0, len(runs), len(runs))
        drawn.append(episodes_over([runs[s] for s in seeds], [reference[s] for s in seeds]))
    found = [one for one in drawn if not math.isnan(one)]
    if not found:
        return math.nan, math.nan, math.nan, 1.0
    # One of the draws, since between a number and infinity there is no mean.
    low, high = (float(np.quantile(found, share, method="nearest")) for share in (0.025, 0.975))
    return episodes_over(runs, reference), low, high, 1 - len(found) / RESAMPLES


def figures_of(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """All figures of one environment from the runs of each arm, in order of seeds."""
    figures: dict[str, float] = {}
    curves = {arm: mean_curve(of_arm) for arm, of_arm in runs.items()}
    level = level_of(curves["policy_only"])
    figures["policy_only_gain"] = curves["policy_only"][-1][1] - curves["policy_only"][0][1]
    figures["level"] = level
    for arm, of_arm in runs.items():
        figures |= told(f"{arm}_before", [run["before"] for run in of_arm])
        figures |= told(f"{arm}_after", [run["after"] for run in of_arm])
        figures |= told(f"{arm}_area", [area(run["curve"]) for run in of_arm])
        figures[f"{arm}_episodes_to_level"] = episodes_to(curves[arm], level)
        if arm != "policy_only":
            names = (f"{arm}_over_policy_only{end}" for end in ("", "_low", "_high", "_unmeasurable"))
            figures |= dict(zip(names, ratio_interval(of_arm, runs["policy_only"]), strict=True))
        if all(run["foretold"] for run in of_arm):
            for when, place in (("first", 0), ("last", -1)):
                figures[f"{arm}_foretold_{when}"] = sum(run["foretold"][place] for run in of_arm) / len(of_arm)
        figures |= _probed(arm, [run["probes_after"] for run in of_arm])
    before = [run["probes_before"] for run in runs["policy_only"] if "probes_before" in run]
    figures |= _probed("base", before)
    for one, other in PAIRS:
        if one in runs and other in runs:
            pairs = list(zip(runs[one], runs[other], strict=True))
            figures |= told(f"{one}_minus_{other}_after", [a["after"] - b["after"] for a, b in pairs])
            figures |= told(f"{one}_minus_{other}_area", [area(a["curve"]) - area(b["curve"]) for a, b in pairs])
    return figures


def _probed(arm: str, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the probes over seeds, with what guessing would get."""
    names = [f"{probe}/{figure}" for probe in PROBES for figure in ("accuracy", "chance", "exact")]
    return {
        f"{arm}_probe_{name.replace('/', '_')}": sum(one[name] for one in found) / len(found)
        for name in (*names, "perplexity", "symbols")
        if found and all(name in one for one in found)
    }


def world_digest(overrides: Mapping[str, Any]) -> str:
    """Digest of what an environment says: its rules, and some episodes in it."""
    lead = "environment.params."
    env = make(overrides["environment.name"], **{k.removeprefix(lead): overrides[k] for k in overrides if lead in k})
    told: list[Any] = [env.instructions]
    for seed in range(8):
        told.append(env.reset(seed=seed)[0])
        told += [env.step(action)[:2] for action in (env.oracle() or [])[:1]]
    return digest([told, TURNED])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(ENVIRONMENTS), action="append", help="environments; all if left out")
    parser.add_argument("--arms", choices=sorted(ARMS), action="append", help="arms; all if left out")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="two short steps of three arms, stored nowhere")
    options = parser.parse_args()
    names = options.only or (["lake"] if options.quick else list(ENVIRONMENTS))
    arms = options.arms or (["policy_only", "dual_rehearse", "self_play"] if options.quick else list(ARMS))
    if "policy_only" not in arms:
        parser.error("the other arms are compared with policy_only, which is not among --arms")
    seeds = 1 if options.quick else options.seeds
    quick = {}
    if options.quick:
        quick = {"training.steps": 2, "training.groups": 2, "evaluation.every": 1}
        quick |= {"evaluation.episodes": 8, "evaluation.validation_episodes": 8}
    worlds = {name: world_digest(ENVIRONMENTS[name]["overrides"]) for name in names}
    cells = {
        f"{name}-{arm}-{seed}": {
            "recipe": ENVIRONMENTS[name]["recipe"], "seed": seed, "threads": options.threads, "world": worlds[name],
            "probes": 5 if options.quick else 100, "probes_before": arm == "policy_only" and seed == 0,
            "first": (1 if options.quick else ENVIRONMENTS[name]["first"]) if arm in SELF_PLAY else 0,
            "shuffled": arm == "self_play_placebo",
            "overrides": overrides, "resolved": resolved(ENVIRONMENTS[name]["recipe"], overrides), "epochs": EPOCHS,
            **origin(ENVIRONMENTS[name]["recipe"]),
        }
        for seed in range(seeds)
        for name in names
        for arm in arms
        for overrides in [{**COMMON, **ENVIRONMENTS[name]["overrides"], **ARMS[arm], **quick}]
    }  # fmt: skip
    played = run_cells("world_model_rl", cells, play, None if options.quick else RESULTS, options.workers)

    figures: dict[str, Any] = {}
    goals: dict[str, str] = {}
    for name in names:
        found = figures_of({arm: [played[f"{name}-{arm}-{seed}"] for seed in range(seeds)] for arm in arms})
        figures |= {f"{name}_{figure}": value for figure, value in found.items()}
        goals[f"{name}_policy_only_gain"] = f">= {MEASURABLE}"
        for arm in (arm for arm in ("dual", "dual_rehearse") if arm in arms):
            goals[f"{name}_{arm}_over_policy_only"] = "<= 0.5"
        for arm, placebo in PLACEBOS.items():
            if arm in arms and placebo in arms:
                goals[f"{name}_{arm}_minus_{placebo}_area_low"] = ">= 0.0"
    partial = bool(options.only or options.arms) or seeds < SEEDS
    result = report(
        "world_model_rl", figures, {} if options.quick else goals, list(range(seeds)), options.quick or partial
    )
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
