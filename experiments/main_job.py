"""Does the main job hold with every seed? The shipped recipes from the shipped base, on held-out tasks.

    python experiments/main_job.py [--only frozenlake] [--seeds 5] [--workers 1] [--threads 2] [--quick]

Each cell is one training run. Success is that of the final policy, not of the best one on the way, on 256 tasks of the
test split, which no run trains on and which are the same for all. The control is the same run with the rewards of each
group dealt out anew among its episodes: as many updates, gradients of the same size, and nothing to learn from. What
it gains is what training does without a signal. (The bandit's rewards are so large and so few that such noise takes its
policy apart, which its entropy tells: that control says what noise does, and not that the format alone would not do.)

``seconds_longest`` is what the longest run of an environment takes on cores of its own: with one thread the processor's
time, since the machine may have done other things; ``clock_seconds_longest`` is by the clock.

The bandit holds out pairs of names. One more cell, held to no goal, holds out the names themselves: the shipped base
has read nothing but its games, so it should not be able to do it, and training on other names makes it worse.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.intervals import told
from experiments.policies import origin, train_cell
from rehearsal.trajectory import Group

SEEDS = {"frozenlake": 5, "bandit": 5, "sokoban": 3}


def deal_rewards(groups: Sequence[Group], rng: np.random.Generator) -> None:
    """Give each episode the reward of one of its own group, drawn without replacement, in place."""
    for group in groups:
        played = [episode for episode in group.trajectories if not episode.failed and episode.turns]
        rewards = rng.permutation([episode.reward for episode in played])
        for episode, reward in zip(played, rewards, strict=True):
            for turn in episode.turns:
                turn.rewards, turn.penalty = [], 0.0
            episode.turns[-1].rewards = [float(reward)]


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One training run; ``deal_rewards`` in the settings makes it a control."""
    from rehearsal.training.loop import Batch, Trainer

    class Control(Trainer):
        def play(self) -> Batch:
            batch = super().play()
            deal_rewards(batch.groups, np.random.default_rng([self.recipe.seed, self.steps_done]))
            return batch

    trainer, figures = train_cell(settings, Control if settings.get("deal_rewards") else None)
    last = trainer.history[-1]
    return figures | {
        "dead_groups_at_the_end": last["signal/dead_groups"],
        "entropy_at_the_end": last.get("policy/entropy"),
        "curve": [[step, round(told["success"], 4)] for step, _, told in trainer.evaluations],
    }


def seconds_of(run: Mapping[str, Any], threads: int) -> float:
    """What a run takes on cores of its own: with one thread what the processor spent on it, where that is known, since
    the machine may have done other things; by the clock otherwise."""
    return min(run["seconds"], run.get("cpu_seconds", run["seconds"])) if threads == 1 else run["seconds"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(SEEDS), action="append", help="environments; all if left out")
    parser.add_argument("--seeds", type=int, help="seeds of each environment")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="three steps and one seed, stored nowhere")
    options = parser.parse_args()
    names = options.only or list(SEEDS)
    cells: dict[str, dict[str, Any]] = {}
    for name in names:
        seeds = 1 if options.quick else options.seeds or SEEDS[name]
        common: dict[str, Any] = {"recipe": name, "threads": options.threads, **origin(name)}
        quick = {"training.steps": 3, "evaluation.episodes": 32} if options.quick else {}
        for seed in range(seeds):
            cells[f"{name}-{seed}"] = common | {"seed": seed, "overrides": quick}
        cells[f"{name}-control"] = common | {"seed": 0, "overrides": quick, "deal_rewards": True}
        if name == "bandit":
            names_apart = {"environment.params.held_out": "names", **quick}
            cells["bandit-unknown_names"] = common | {"seed": 0, "overrides": names_apart}
    played = run_cells("main_job", cells, play, None if options.quick else RESULTS, options.workers)

    figures: dict[str, Any] = {}
    goals: dict[str, Any] = {}
    for name in names:
        runs = [played[cell] for cell in cells if cell.removeprefix(name + "-").isdigit()]
        after = [run["after"] for run in runs]
        figures |= {
            f"{name}_before_mean": sum(run["before"] for run in runs) / len(runs),
            **{f"{name}_after_seed_{seed}": success for seed, success in enumerate(after)},
            **told(f"{name}_after_mean", after),
            f"{name}_after_worst": min(after),
            f"{name}_gain_worst": min(run["after"] - run["before"] for run in runs),
            f"{name}_seconds_longest": max(seconds_of(run, options.threads) for run in runs),
            f"{name}_clock_seconds_longest": max(run["seconds"] for run in runs),
            f"{name}_control_entropy_at_the_end": played[f"{name}-control"]["entropy_at_the_end"],
            f"{name}_control_change": played[f"{name}-control"]["after"] - played[f"{name}-control"]["before"],
        }
    if "frozenlake" in names:
        goals |= {
            "frozenlake_before_mean": "<= 0.30", "frozenlake_after_worst": ">= 0.75",
            "frozenlake_after_mean": ">= 0.80", "frozenlake_seconds_longest": "<= 900.0",
        }  # fmt: skip
    if "bandit" in names:
        figures["bandit_unknown_names_before"] = played["bandit-unknown_names"]["before"]
        figures["bandit_unknown_names_after"] = played["bandit-unknown_names"]["after"]
        goals["bandit_after_worst"] = ">= 0.75"
    if "sokoban" in names:
        goals |= {"sokoban_gain_worst": ">= 0.25", "sokoban_seconds_longest": "<= 2400.0"}
    seeds = list(range(max(1 if options.quick else options.seeds or SEEDS[name] for name in names)))
    partial = bool(options.only) or any((options.seeds or count) < count for count in SEEDS.values())
    result = report("main_job", figures, goals, seeds, options.quick or partial)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
