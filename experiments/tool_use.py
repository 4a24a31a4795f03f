"""Does an agent find out from rewards that tools are useful, and what becomes of it where its first calls fail?

    python experiments/tool_use.py [--only calculate] [--seeds 5] [--workers 2] [--threads 1] [--quick]

The base that ships knows how a call is written and calls in a part of its episodes, whether it helps or not. Three
questions, each with the same number of episodes in every arm:

- ``calculate``: lines of arithmetic with a calculator, against the same budget without one; GRPO and DAPO side by side,
  by the steps that each takes to half of what it gains;
- ``lookup``: questions that take two documents, with search and open;
- ``abandoned``: short sums, where a guess pays now and then, with a calculator that is out of order in four of five
  calls for the first steps and works ever after. An agent that has stopped calling by then never finds out. Arms: one
  whose calculator always works (what could be had); the broken one; and four cures: an entropy bonus (``exploration``),
  lines that cannot be guessed as long as the calculator is broken (``curriculum``), credit for the first call of an
  episode that told something (``credit``), and a world model learnt from results (``world``; its own control is
  ``broken_lora``, which has adapters too).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.policies import origin
from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.toolkit.calculator import calculator
from rehearsal.agents.tools import Tool, ToolFailure, tool_from
from rehearsal.evaluation.statistics import mean_interval

COMMON: dict[str, Any] = {
    "evaluation.every": 0, "diagnostics.every": 0, "diagnostics.gradients_every": 0, "engine.processes": 1,
}  # fmt: skip
SHORT = {"environment.params.terms": 2, "environment.params.digits": 2}
LORA = {"adapters.policy_rank": 32, "adapters.world_rank": 32, "training.learning_rate": 3e-3}
BROKEN_STEPS, MENDED_STEPS = 12, 24
BROKEN = 0.8
"""Share of calls that fail as long as the calculator is out of order."""


_TOOL = "experiments.tool_use:Unreliable"


def _phases(first: Mapping[str, Any], both: Mapping[str, Any]) -> list[dict[str, Any]]:
    tool = {"tools.names": [_TOOL], "training.schedule": "constant", **SHORT}
    return [
        {**tool, "training.steps": BROKEN_STEPS, "tools.options": {_TOOL: {"fails": BROKEN}}, **both, **first},
        {**tool, "training.steps": MENDED_STEPS, "tools.options": {_TOOL: {"fails": 0.0}}, **both},
    ]


ARMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "calculate_grpo": ("calculate", [{"algorithm.name": "grpo"}]),
    "calculate_dapo": ("calculate", [{"algorithm.name": "dapo"}]),
    "calculate_without": ("calculate", [{"algorithm.name": "grpo", "tools.names": []}]),
    "lookup": ("lookup", [{}]),
    "abandoned_working": ("calculate", _phases({"tools.options": {_TOOL: {"fails": 0.0}}}, {})),
    "abandoned_broken": ("calculate", _phases({}, {})),
    "abandoned_exploration": ("calculate", _phases({}, {"algorithm.options.entropy_coefficient": 0.01})),
    "abandoned_curriculum": ("calculate", _phases({"environment.params.terms": 3, "environment.params.digits": 3}, {})),
    "abandoned_credit": ("calculate", _phases({}, {"rewards.call": 0.1})),
    "abandoned_broken_lora": ("calculate", _phases({}, LORA)),
    "abandoned_world": ("calculate", _phases({}, {**LORA, "world.mode": "dual"})),
}
"""Recipe and options of each part of a run, by arm."""


class Unreliable(ToolSource):
    """The calculator, out of order now and then.

    Args:
        fails: the share of calls that fail.
        seed: of the chance of it.
    """

    fast = True

    def __init__(self, fails: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def unreliable(expression: str) -> str:
            if rng.random() < fails:
                raise ToolFailure("out of order")
            return calculator(expression)

        # What the agent is told of it is what it is told of the one that works.
        unreliable.__doc__ = calculator.__doc__
        self._tool = tool_from(unreliable, name="calculator", fast=True)

    def open(self) -> Sequence[Tool]:
        return [self._tool]


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One arm and one seed: held-out success before and after, and success and use of tools by step."""
    import torch

    from rehearsal.training.loop import Trainer
    from rehearsal.training.recipe import resolve_recipe

    torch.set_num_threads(int(settings["threads"]))
    policy = None
    figures: dict[str, Any] = {}
    rows: list[Mapping[str, float]] = []
    for number, part in enumerate(settings["parts"]):
        recipe = resolve_recipe(settings["recipe"], {"seed": settings["seed"] + 1000 * number, **part})
        trainer = Trainer(recipe, policy=policy)
        trainer.run()
        policy = trainer.policy
        rows += trainer.history
        held_out = [found for _, split, found in trainer.evaluations if split == "test"]
        if not number:
            figures["before"] = held_out[0]["success"]
        figures |= {"after": held_out[-1]["success"], "after_low": held_out[-1]["success_low"],
                    "after_high": held_out[-1]["success_high"]}  # fmt: skip
    figures["success"] = [round(row["train/success"], 4) for row in rows]
    figures["used"] = [round(used_share(row), 4) for row in rows]
    figures["episodes"] = sum(row["train/episodes"] for row in rows)
    return figures


def used_share(row: Mapping[str, float]) -> float:
    """The share of the episodes of a step that called the tool that was called most; 0 where there is none."""
    return max((row[name] for name in row if name.startswith("train/tools/") and name.endswith("/used")), default=0.0)


def steps_to_half(curve: Sequence[float], window: int = 5) -> float:
    """Steps until half of the gain of a curve, smoothed by a trailing mean; NaN where it gained nothing."""
    smooth = [statistics.mean(curve[max(0, end - window) : end]) for end in range(1, len(curve) + 1)]
    first, last = smooth[0], smooth[-1]
    if last <= first:
        return math.nan
    return float(next(step for step, value in enumerate(smooth, 1) if value >= first + (last - first) / 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("calculate", "lookup", "abandoned"), action="append", help="questions")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="two short steps of two arms, stored nowhere")
    options = parser.parse_args()
    asked = tuple(options.only or ("calculate", "lookup", "abandoned"))
    arms = [arm for arm in ARMS if arm.startswith(asked)]
    arms = ["calculate_grpo", "abandoned_broken"] if options.quick else arms
    seeds = 1 if options.quick else options.seeds
    quick = {"training.steps": 2, "training.groups": 4, "evaluation.episodes": 8} if options.quick else {}
    cells = {
        f"{arm}-{seed}": {
            "recipe": ARMS[arm][0], "seed": seed, "threads": options.threads, **origin(ARMS[arm][0]),
            "parts": [{**COMMON, **part, **quick} for part in ARMS[arm][1]],
        }
        for seed in range(seeds)
        for arm in arms
    }  # fmt: skip
    played = run_cells("tool_use", cells, play, None if options.quick else RESULTS, options.workers)

    figures: dict[str, Any] = {}
    goals: dict[str, str] = {}
    for arm in arms:
        runs = [played[f"{arm}-{seed}"] for seed in range(seeds)]
        for name, values in {
            "before": [run["before"] for run in runs],
            "after": [run["after"] for run in runs],
            "used_at_the_end": [statistics.mean(run["used"][-5:]) for run in runs],
        }.items():
            mean, low, high = mean_interval(values)
            figures |= {f"{arm}_{name}": mean, f"{arm}_{name}_low": low, f"{arm}_{name}_high": high}
        figures[f"{arm}_worst"] = min(run["after"] for run in runs)
        halves = [steps_to_half(run["success"]) for run in runs]
        figures[f"{arm}_steps_to_half"] = statistics.mean(halves)
        if arm.startswith("abandoned"):
            figures[f"{arm}_used_when_mended"] = statistics.mean(
                statistics.mean(run["used"][BROKEN_STEPS - 3 : BROKEN_STEPS]) for run in runs
            )
    if "lookup" in arms:
        figures["lookup_gain"] = statistics.mean(
            played[f"lookup-{seed}"]["after"] - played[f"lookup-{seed}"]["before"] for seed in range(seeds)
        )
        goals["lookup_gain"] = ">= 0.3"
    if "calculate_grpo" in arms and "calculate_without" in arms:
        goals |= {"calculate_grpo_after": ">= 0.9", "calculate_without_after": "<= 0.4"}
    result = report("tool_use", figures, {} if options.quick else goals, list(range(seeds)), options.quick)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
