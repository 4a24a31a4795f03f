"""Does filtering groups by reward variance help, and is it the choice of groups or only the fewer of them?

    python experiments/filtering.py [--only lake] [--seeds 5] [--workers 2] [--threads 1] [--quick]

Published (RAGEN-2): on FrozenLake and Sokoban, keeping the groups that hold 90% of the variance helps, most where noise
is moderate. The tables leave open whether fewer updates or fewer tokens alone explain it. So one arm keeps as many
groups as ``top_p`` does and draws them at random; and all arms play the same number of episodes in the same number of
steps, with the same seeds of tasks and noise. What counts is the held-out success of the final policy on 256 tasks.

The loss is that of the published runs: advantages are divided by the standard deviation of their group, so a group of
hardly any variance pushes as hard as another; and terms of 0.001 for KL and entropy, which push where no reward does.
(The shipped recipes do neither: their advantages are in proportion to the rewards, so a group without variance has no
part in their direction, and dropping it can change no more than the scale of a step, which Adam takes out again.)

Arms: none; constant (drops groups without variance); top-p 0.9 on variance; top-k with half of the groups; random with
as many groups as top-p would keep of the same batch. Runs drift apart, so what random and top-p came to keep is
compared too. Differences are paired by seed; ``slip_`` is how much larger one is on the lake that slips than on the one
that does not. There are many of them: of those whose interval at 95% leaves out zero, one in twenty does so by chance.
Sokoban has levels of at most 5 pushes and steps to the goal, since 30 steps do not teach the longer ones of the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.intervals import told
from experiments.policies import origin, resolved, train_cell

SEEDS = 5

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "lake": {"recipe": "frozenlake", "overrides": {"training.steps": 30}},
    "lake_slip": {"recipe": "frozenlake", "overrides": {"training.steps": 30, "environment.params.slip": 0.2}},
    "sokoban": {
        "recipe": "sokoban", "overrides": {"training.steps": 30, "environment.params.max_solution": 5},
    },
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"filter.name": "constant"},
    "top_p": {"filter.name": "top_p", "filter.options.p": 0.9},
    "top_k": {"filter.name": "top_k", "filter.options.k": 0.5},
    "random": {"filter.name": "random", "filter.options.like": "top_p", "filter.options.p": 0.9},
}
COMPARED = (
    ("top_p", "none"), ("top_p", "random"), ("top_p", "constant"), ("constant", "none"), ("top_k", "none"),
    ("random", "none"),
)  # fmt: skip
COMMON = {
    "algorithm.name": "grpo", "algorithm.options.kl_coefficient": 0.001, "algorithm.options.entropy_coefficient": 0.001,
    # Half of the groups of the shipped recipes: a grid of 75 runs has to end some day.
    "training.groups": 16, "evaluation.every": 0, "diagnostics.every": 0, "diagnostics.gradients_every": 0,
    "engine.processes": 1,
}  # fmt: skip


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One training run."""
    return train_cell(settings)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(ENVIRONMENTS), action="append", help="environments; all if left out")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="two steps and one seed on one lake, stored nowhere")
    options = parser.parse_args()
    names = ["lake"] if options.quick else options.only or list(ENVIRONMENTS)
    seeds = 1 if options.quick else options.seeds
    quick = {"training.steps": 2, "training.groups": 8, "evaluation.episodes": 16} if options.quick else {}
    cells = {
        f"{name}-{arm}-{seed}": {
            "recipe": ENVIRONMENTS[name]["recipe"], "seed": seed, "threads": options.threads,
            **origin(ENVIRONMENTS[name]["recipe"]),
            "resolved": resolved(ENVIRONMENTS[name]["recipe"], overrides),
            "overrides": overrides,
        }
        for seed in range(seeds)
        for name in names
        for arm in ARMS
        for overrides in [{**COMMON, **ENVIRONMENTS[name]["overrides"], **ARMS[arm], **quick}]
    }  # fmt: skip
    played = run_cells("filtering", cells, play, None if options.quick else RESULTS, options.workers)

    figures: dict[str, Any] = {}
    gains: dict[str, dict[tuple[str, str], list[float]]] = {}
    for name in names:
        runs = {arm: [played[f"{name}-{arm}-{seed}"] for seed in range(seeds)] for arm in ARMS}
        figures[f"{name}_before"] = runs["none"][0]["before"]
        for arm, of_arm in runs.items():
            figures |= told(f"{name}_{arm}_after", [run["after"] for run in of_arm])
            for what in ("kept_share", "updates", "kept_episodes", "seconds", "cpu_seconds", "learning_seconds"):
                figures[f"{name}_{arm}_{what}"] = statistics.median(run[what] for run in of_arm)
        gains[name] = {
            (arm, other): [a["after"] - b["after"] for a, b in zip(runs[arm], runs[other], strict=True)]
            for arm, other in COMPARED
        }
        for (arm, other), each in gains[name].items():
            figures |= told(f"{name}_{arm}_minus_{other}", each)
        for what in ("kept_share", "kept_episodes"):
            pairs = zip(runs["top_p"], runs["random"], strict=True)
            figures |= told(f"{name}_top_p_minus_random_{what}", [a[what] - b[what] for a, b in pairs])
    if {"lake", "lake_slip"} <= set(names):
        for pair in (("top_p", "none"), ("top_p", "random")):
            larger = [a - b for a, b in zip(gains["lake_slip"][pair], gains["lake"][pair], strict=True)]
            figures |= told(f"slip_{pair[0]}_minus_{pair[1]}", larger)
    partial = bool(options.only) or seeds < SEEDS
    result = report("filtering", figures, {}, list(range(seeds)), options.quick or partial)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
