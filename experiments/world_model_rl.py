"""Does a world model make reinforcement learning need fewer episodes?

    python experiments/world_model_rl.py [--only lake_slip] [--seeds 5] [--workers 2] [--threads 1] [--quick]

FrozenLake 4x4 where one move of five slips, and Sokoban 6x6 with one box. Every arm has low-rank adapters of 64 ranks
in total over the base that ships, plays the same number of episodes with the same seeds of tasks and noise, and is
judged on validation tasks on the way and on 256 held-out tasks at the end.

Arms: rewards alone (``policy_only``); one adapter for both (``shared``, ECHO); an adapter each (``dual``); the same
with rehearsal of answers (``dual_rehearse``), and its control that rehearses and learns from rewards alone
(``rehearse_only``); ``placebo``, in which answers are dealt out among episodes before they are learnt; and
``self_play``, which learns nothing but the answers for the first steps and nothing but rewards afterwards (SPA,
arXiv:2510.15047, found Sokoban 25.6 -> 59.8 and FrozenLake 22.1 -> 70.9 with 1.5B parameters).

What counts is how many episodes an arm takes to the success that ``policy_only`` ends at, on the mean curve over seeds.
If the placebo is as good as the real thing, the answers had nothing to do with it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.policies import origin
from rehearsal.evaluation.statistics import mean_interval

COMMON: dict[str, Any] = {
    "evaluation.every": 4, "diagnostics.every": 0, "diagnostics.gradients_every": 0, "engine.processes": 1,
    "training.schedule": "constant", "adapters.policy_rank": 32, "adapters.world_rank": 32,
}  # fmt: skip
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "lake_slip": {
        "recipe": "frozenlake", "first": 8,
        "overrides": {"training.steps": 40, "environment.params.slip": 0.2, "training.learning_rate": 3e-3},
    },
    "sokoban": {
        "recipe": "sokoban", "first": 6,
        "overrides": {
            "training.steps": 24, "training.groups": 16, "training.learning_rate": 3e-3,
            "environment.params.max_solution": 6,
        },
    },
}  # fmt: skip
"""Recipes, what differs from them, and the steps in which ``self_play`` learns the answers."""
ALONE = {"adapters.policy_rank": 64, "adapters.world_rank": 0}
REHEARSE = {"agent.rehearse": True, "world.replay": 64}
ARMS: dict[str, dict[str, Any]] = {
    "policy_only": ALONE,
    "shared": {"world.mode": "shared", **ALONE},
    "dual": {"world.mode": "dual"},
    "dual_rehearse": {"world.mode": "dual", **REHEARSE},
    "rehearse_only": {"agent.rehearse": True, **ALONE},
    "placebo": {"world.mode": "placebo"},
    "self_play": {},
}
PROBED = ("action", "forward", "inverse")


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One arm and one seed: success on validation tasks by episodes played, held-out success, and probes."""
    import torch

    from rehearsal.evaluation.probe import Prober
    from rehearsal.training.loop import Trainer
    from rehearsal.training.recipe import resolve_recipe

    torch.set_num_threads(int(settings["threads"]))
    recipe = resolve_recipe(settings["recipe"], {"seed": settings["seed"], **settings["overrides"]})
    steps, first = recipe.training.steps, int(settings["first"])
    phases: list[dict[str, Any]] = [{"training.steps": steps}]
    if first:
        phases = [
            {"world.mode": "world_only", "training.steps": first},
            {"world.mode": "policy_only", "training.steps": steps - first},
        ]
    policy = None
    done = 0
    curve: list[list[float]] = []
    figures: dict[str, Any] = {}
    for number, changes in enumerate(phases):
        part = resolve_recipe(recipe, {**changes, "seed": settings["seed"] + 1000 * number})
        trainer = Trainer(part, policy=policy)
        policy = trainer.policy
        assert policy is not None
        if settings["probes"] and not number:
            prober = Prober(part, policy.renderer, int(settings["probes"]))
            figures["probes_before"] = prober.measure(policy.model)
        trainer.run()
        each = part.training.groups * part.training.group_size
        curve += [[float((done + step) * each), round(found["success"], 4)] for step, _, found in trainer.evaluations]
        done += part.training.steps
        held_out = [found for _, split, found in trainer.evaluations if split == "test"]
        if not number:
            figures["before"] = held_out[0]["success"]
        figures |= {name: held_out[-1][source] for name, source in (
            ("after", "success"), ("after_low", "success_low"), ("after_high", "success_high"))}  # fmt: skip
    figures["curve"] = curve
    if settings["probes"]:
        figures["probes_after"] = prober.measure(policy.model)
    return figures


def episodes_to(curve: Sequence[Sequence[float]], level: float) -> float:
    """Episodes until a curve reaches a level, by straight lines between its points; NaN if it never does."""
    before: Sequence[float] | None = None
    for episodes, success in curve:
        if success >= level:
            if before is None or success == before[1]:
                return episodes
            share = (level - before[1]) / (success - before[1])
            return before[0] + share * (episodes - before[0])
        before = (episodes, success)
    return math.nan


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The curves of several seeds, point by point; those of the same episodes are one point."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for episodes, success in run["curve"]:
            found.setdefault(episodes, []).append(success)
    return [[episodes, sum(each) / len(each)] for episodes, each in sorted(found.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(ENVIRONMENTS), action="append", help="environments; all if left out")
    parser.add_argument("--arms", choices=sorted(ARMS), action="append", help="arms; all if left out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="four short steps on one lake, stored nowhere")
    options = parser.parse_args()
    names = ["lake_slip"] if options.quick else options.only or list(ENVIRONMENTS)
    arms = ["policy_only", "dual", "self_play"] if options.quick else options.arms or list(ARMS)
    if "policy_only" not in arms:
        parser.error("the other arms are compared with policy_only, which is not among --arms")
    seeds = 1 if options.quick else options.seeds
    quick = {"training.steps": 4, "training.groups": 4, "evaluation.episodes": 16} if options.quick else {}
    cells = {
        f"{name}-{arm}-{seed}": {
            "recipe": ENVIRONMENTS[name]["recipe"], "seed": seed, "threads": options.threads,
            "probes": 10 if options.quick else 100, **origin(ENVIRONMENTS[name]["recipe"]),
            "first": (2 if options.quick else ENVIRONMENTS[name]["first"]) if arm == "self_play" else 0,
            "overrides": {**COMMON, **ENVIRONMENTS[name]["overrides"], **ARMS[arm], **quick},
        }
        for seed in range(seeds)
        for name in names
        for arm in arms
    }  # fmt: skip
    played = run_cells("world_model_rl", cells, play, None if options.quick else RESULTS, options.workers)

    figures: dict[str, Any] = {}
    goals: dict[str, str] = {}
    for name in names:
        runs = {arm: [played[f"{name}-{arm}-{seed}"] for seed in range(seeds)] for arm in arms}
        curves = {arm: mean_curve(of_arm) for arm, of_arm in runs.items()}
        level = curves["policy_only"][-1][1]
        taken = {arm: episodes_to(curve, level) for arm, curve in curves.items()}
        figures[f"{name}_before"] = sum(run["before"] for run in runs["policy_only"]) / seeds
        for arm, of_arm in runs.items():
            mean, low, high = mean_interval([run["after"] for run in of_arm])
            figures |= {f"{name}_{arm}_after": mean, f"{name}_{arm}_after_low": low, f"{name}_{arm}_after_high": high}
            figures[f"{name}_{arm}_episodes_to_level"] = taken[arm]
            figures[f"{name}_{arm}_over_policy_only"] = taken[arm] / (taken["policy_only"] or math.nan)
            for when in ("before", "after"):
                for probe in PROBED:
                    values = [run[f"probes_{when}"].get(f"{probe}/accuracy", math.nan) for run in of_arm]
                    figures[f"{name}_{arm}_{probe}_probe_{when}"] = sum(values) / seeds
            if arm != "policy_only":
                mean, low, high = mean_interval(
                    [a["after"] - b["after"] for a, b in zip(of_arm, runs["policy_only"], strict=True)]
                )
                figures |= {
                    f"{name}_{arm}_minus_policy_only": mean, f"{name}_{arm}_minus_policy_only_low": low,
                    f"{name}_{arm}_minus_policy_only_high": high,
                }  # fmt: skip
        if "dual_rehearse" in arms:
            goals[f"{name}_dual_rehearse_over_policy_only"] = "<= 0.5"
    result = report("world_model_rl", figures, {} if options.quick else goals, list(range(seeds)), options.quick)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
