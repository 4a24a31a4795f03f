"""Does an agent find out from rewards that tools are useful, and what becomes of it where its first calls fail?

    python experiments/tool_use.py [--only calculate] [--seeds 5] [--workers 2] [--threads 1] [--quick]

The base that ships knows how a call is written and calls in a part of its episodes, whether it helps or not. Three
questions:

- ``calculate``: lines of arithmetic with a calculator, against the same budget without one. Held-out lines are the same
  for all, so it can be told whether the tool is used where it helps: on lines that the arm without it gets wrong. GRPO
  and DAPO side by side, each with its own loss, by the steps and by the episodes that each takes to half of the
  success that it ends with. DAPO plays other tasks in place of those that teach nothing, so its steps have more
  episodes, up to four times as many here.
- ``lookup``: questions that take two documents, with search and open, by the recipe that ships: questions of one
  document first. Held-out questions of both kinds before and after.
- ``abandoned``: sums that nobody guesses, with a calculator that costs 0.3 a call and is out of order in four of five
  calls for the first steps, when a call is not worth its price, and works ever after, when it is worth twice that. An
  agent that has stopped calling by then never finds out. Arms: one whose calculator always works (what could be had);
  the broken one; and six cures, which are there all the time if nothing else is said: an entropy bonus
  (``exploration``); a ladder (``curriculum``), on which lines of one digit come first and the tool is locked until they
  are mastered or do not get better any more, whatever its state; credit for the first call of an episode that brought a
  result (``credit``), which pays for use itself, so that arm is judged by success; a world model learnt from results
  (``world``); and two that were added when these four had been seen: twice the credit (``high_credit``), and calls that
  cost nothing until the calculator works (``late_price``, which has to know when that is). The world model has
  adapters, and so have its controls: ``working_lora``, ``broken_lora``, and ``placebo``, whose world model learns
  results that were dealt out among episodes. What the price does and what the failures do is told apart by calls that
  cost nothing and fail as often (``free_broken``, with ``free_working``).

Held-out play before and after training is with the tools, and the state that they are in, of the end. Differences are
paired by seed. The best cure is chosen for each seed by the other seeds, so that it is not judged on the luck that it
was chosen for, and compared with a calculator that always worked for a policy of its own kind.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from experiments.cells import RESULTS, run_cells
from experiments.intervals import told
from experiments.policies import origin, resolved
from experiments.tool_use_arms import ARMS, COMMON, CURES, PAIRS, TESTS, WORKING

SEEDS = 5
HELD_OUT = 256
"""Tasks of each evaluation."""


def play(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One arm and one seed: held-out play before and after, and success and use of tools by step."""
    import torch

    from rehearsal.training.loop import Trainer
    from rehearsal.training.recipe import resolve_recipe

    torch.set_num_threads(int(settings["threads"]))
    seed = int(settings["seed"])
    parts = [_with_luck(part, seed) for part in settings["parts"]]
    policy, ladder = None, None
    figures: dict[str, Any] = {}
    rows: list[Mapping[str, float]] = []

    def look(when: str) -> Any:
        # Held-out tasks are those of the end, whatever led there.
        options = {name: value for name, value in parts[-1].items() if not name.startswith("curriculum.")}
        whole = {"seed": seed, **options, "curriculum.name": "fresh", "curriculum.stages": []}
        now = policy
        for name, changes in settings["tests"].items():
            trainer = Trainer(resolve_recipe(settings["recipe"], {**whole, **changes}), policy=now)
            found = trainer.evaluate("test", settings["held_out"])
            now = trainer.policy
            trainer.close()
            assert found is not None
            figures.update({f"{name}{when}{end}": found.figures[f"success{end}"] for end in ("", "_low", "_high")})
            if when == "after":
                episodes = [group.trajectories[0] for group in found.groups]
                # Texts, one for all tasks: as many numbers in lines of their own would be nobody's to read.
                figures[f"{name}held_out"] = [
                    "".join(str(int(bool(one.success))) for one in episodes),
                    "".join(str(int(called_a_tool(one))) for one in episodes),
                    ",".join(one.category for one in episodes),
                ]
        return now

    policy = look("before")
    for number, part in enumerate(parts):
        # Each part has tasks of its own.
        trainer = Trainer(resolve_recipe(settings["recipe"], {"seed": seed + 1000 * number, **part}), policy=policy)
        if ladder is not None:
            trainer.tasks.sampler.load_state_dict(ladder)
        trainer.run()
        policy = trainer.policy
        ladder = trainer.tasks.sampler.state_dict() if part.get("curriculum.name") == "staged" else None
        rows += trainer.history
    look("after")
    for name, key in (("success", "train/success"), ("episodes", "train/episodes")):
        figures[name] = [round(row[key], 4) for row in rows]
    figures["steps"] = [part["training.steps"] for part in parts if "training.steps" in part]
    figures["used"] = [round(used_share(row), 4) for row in rows]
    figures["seconds"] = round(sum(row["time/step"] for row in rows), 1)
    return figures


def _with_luck(part: Mapping[str, Any], seed: int) -> dict[str, Any]:
    tools = {name: {**options, "seed": seed} for name, options in part.get("tools.options", {}).items()}
    return {**part, "tools.options": tools} if tools else dict(part)


def called_a_tool(episode: Any) -> bool:
    """Whether an episode called a tool that there is."""
    return any(call.error not in ("unknown", "limit") for turn in episode.turns for call in turn.calls)


def used_share(row: Mapping[str, float]) -> float:
    """The share of the episodes of a step that called the tool that was called most; 0 where there is none."""
    return max((row[name] for name in row if name.startswith("train/tools/") and name.endswith("/used")), default=0.0)


def steps_to_half(curve: Sequence[float]) -> float:
    """Steps until half of the success of the end (a mean over the last five steps) is reached.

    Means over three steps, the one before and the one after included, so that nothing lags; between two of them the
    curve is a straight line. 0 where it begins there, NaN where there is no success at the end.

    Args:
        curve: success by step; that of step i, from 0, is success after i steps of learning.
    """
    smooth = [statistics.mean(curve[max(0, step - 1) : step + 2]) for step in range(len(curve))]
    half = statistics.mean(curve[-5:]) / 2
    if half <= 0:
        return math.nan
    if smooth[0] >= half:
        return 0.0
    for step, (before, after) in enumerate(itertools.pairwise(smooth)):
        if after >= half:
            return step + (half - before) / (after - before)
    return math.nan


def episodes_to_half(run: Mapping[str, Any]) -> float:
    """Episodes that were played until then."""
    played = [0.0, *itertools.accumulate(run["episodes"])]
    step = steps_to_half(run["success"])
    return math.nan if math.isnan(step) else float(np.interp(step, range(len(played)), played))


class HeldOut(NamedTuple):
    """How the held-out tasks went, in order.

    Attributes:
        solved: whether the answer was right.
        called: whether a tool was called.
        kinds: of what kind each task is.
    """

    solved: list[bool]
    called: list[bool]
    kinds: list[str]


def held_out(run: Mapping[str, Any]) -> HeldOut:
    """The held-out tasks of a run, after training."""
    solved, called, kinds = run["held_out"]
    return HeldOut([one == "1" for one in solved], [one == "1" for one in called], kinds.split(","))


def used_among(run: Mapping[str, Any], other: Mapping[str, Any], solved: bool) -> float:
    """The share of held-out tasks in which a run called a tool, of those that another run solved or did not."""
    pairs = zip(held_out(run).called, held_out(other).solved, strict=True)
    mine = [called for called, done in pairs if done == solved]
    return statistics.mean(mine) if mine else math.nan


def by_kind(runs: Sequence[Mapping[str, Any]], field: str) -> dict[str, float]:
    """The share of the held-out tasks of each kind that were ``solved``, or in which a tool was ``called``, over all
    runs."""
    found: dict[str, list[bool]] = {}
    for run in runs:
        tasks = held_out(run)
        for kind, one in zip(tasks.kinds, getattr(tasks, field), strict=True):
            found.setdefault(kind.replace(" ", "_"), []).append(one)
    return {kind: statistics.mean(found[kind]) for kind in sorted(found)}


def chosen_by_others(values: Mapping[str, Sequence[float]]) -> list[str]:
    """For each seed the name that is best on average over all other seeds."""
    seeds = len(next(iter(values.values())))
    return [
        max(values, key=lambda name: sum(value for other, value in enumerate(values[name]) if other != seed))
        for seed in range(seeds)
    ]


def used_when_mended(run: Mapping[str, Any]) -> float:
    """The share of episodes that called it in the last three steps in which the calculator was out of order."""
    return statistics.mean(run["used"][: run["steps"][0]][-3:])


def used_at_the_end(run: Mapping[str, Any]) -> float:
    """The share of episodes that called a tool in the last five steps."""
    return statistics.mean(run["used"][-5:])


MEASURES = {
    "after": lambda run: run["after"], "used_when_mended": used_when_mended, "used_at_the_end": used_at_the_end,
}  # fmt: skip
"""What is compared between the arms of ``abandoned``."""


def calculate_figures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Where the tool is used, and how long GRPO and DAPO take, for the arms that were played."""
    figures: dict[str, float] = {}
    for arm in ("calculate_grpo", "calculate_dapo", "calculate_without"):
        for field in ("solved", "called"):
            figures |= {f"{arm}_{field}_{kind}": share for kind, share in by_kind(runs.get(arm, ()), field).items()}
    if {"calculate_grpo", "calculate_without"} <= set(runs):
        pairs = list(zip(runs["calculate_grpo"], runs["calculate_without"], strict=True))
        figures |= told("calculate_grpo_used_where_needed", [used_among(*pair, solved=False) for pair in pairs])
        figures |= told("calculate_grpo_used_where_not_needed", [used_among(*pair, solved=True) for pair in pairs])
    measures = {"steps_to_half": lambda run: steps_to_half(run["success"]), "episodes_to_half": episodes_to_half}
    for name, measure in measures.items():
        found = {
            arm: [measure(run) for run in runs[arm]] for arm in ("calculate_grpo", "calculate_dapo") if arm in runs
        }
        for arm, values in found.items():
            figures |= told(f"{arm}_{name}", values)
        if len(found) == 2:
            paired = zip(found["calculate_dapo"], found["calculate_grpo"], strict=True)
            figures |= told(f"calculate_dapo_less_grpo_{name}", [dapo - grpo for dapo, grpo in paired])
    return figures


def abandoned_figures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Curves of use, differences from controls, and the best cure against what could be had."""
    figures: dict[str, float] = {}
    for arm in (arm for arm in runs if arm.startswith("abandoned")):
        figures |= told(f"{arm}_used_when_mended", [used_when_mended(run) for run in runs[arm]])
        for step in range(0, len(runs[arm][0]["used"]), 3):
            figures[f"{arm}_used_after_{step}"] = statistics.mean(run["used"][step] for run in runs[arm])
    for arm, control in PAIRS:
        if arm in runs and control in runs:
            name = f"{arm}_less_{control.removeprefix('abandoned_')}"
            for what, measure in MEASURES.items():
                pairs = zip(runs[arm], runs[control], strict=True)
                figures |= told(f"{name}_{what}", [measure(one) - measure(other) for one, other in pairs])
    if {*CURES, "abandoned_working", *WORKING.values()} <= set(runs) and len(runs["abandoned_working"]) > 1:
        best = chosen_by_others({cure: [run["after"] for run in runs[cure]] for cure in CURES})
        for what in ("after", "used_at_the_end"):
            measure = MEASURES[what]
            differences = [
                measure(runs[cure][seed]) - measure(runs[WORKING.get(cure, "abandoned_working")][seed])
                for seed, cure in enumerate(best)
            ]
            figures |= told(f"abandoned_best_cure_less_working_{what}", differences)
        figures |= {f"{cure}_chosen": float(best.count(cure)) for cure in CURES}
    return figures


GOALS = {
    "calculate_grpo_after": ">= 0.9", "calculate_without_after": "<= 0.4", "calculate_grpo_used_where_needed": ">= 0.9",
    "lookup_gain": ">= 0.3",
    "abandoned_broken_used_when_mended": "<= 0.2", "abandoned_broken_used_at_the_end": "<= 0.2",
    "abandoned_working_used_when_mended": ">= 0.8", "abandoned_broken_less_working_after": "<= -0.2",
    "abandoned_best_cure_less_working_after": ">= -0.1",
    "abandoned_best_cure_less_working_used_at_the_end": ">= -0.1",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ("calculate", "lookup", "abandoned")
    parser.add_argument("--only", choices=questions, action="append", help="questions; all if left out")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--quick", action="store_true", help="two short steps of some arms, stored nowhere")
    options = parser.parse_args()
    arms = [arm for arm in ARMS if arm.startswith(tuple(options.only or questions))]
    if options.quick:
        some = ("calculate_grpo", "calculate_without", "lookup", "abandoned_broken", "abandoned_curriculum")
        arms = [arm for arm in arms if arm in some]
    seeds = 1 if options.quick else options.seeds
    quick = {"training.steps": 2, "training.groups": 4} if options.quick else {}
    cells = {
        f"{arm}-{seed}": {
            "recipe": ARMS[arm][0], "seed": seed, "threads": options.threads, **origin(ARMS[arm][0]),
            "held_out": 16 if options.quick else HELD_OUT, "tests": TESTS[ARMS[arm][0]],
            "parts": parts, "resolved": [resolved(ARMS[arm][0], part) for part in parts],
        }
        for seed in range(seeds)
        for arm in arms
        for parts in [[{**COMMON, **part, **quick} for part in ARMS[arm][1]]]
    }  # fmt: skip
    played = run_cells("tool_use", cells, play, None if options.quick else RESULTS, options.workers)

    runs = {arm: [played[f"{arm}-{seed}"] for seed in range(seeds)] for arm in arms}
    figures: dict[str, Any] = {}
    for arm, found in runs.items():
        for test in TESTS[ARMS[arm][0]]:
            for when in ("before", "after"):
                figures |= told(f"{arm}_{test}{when}", [run[f"{test}{when}"] for run in found])
            gains = [run[f"{test}after"] - run[f"{test}before"] for run in found]
            figures |= told(f"{arm}_{test}gain", gains)
        figures |= told(f"{arm}_used_at_the_end", [used_at_the_end(run) for run in found])
        figures[f"{arm}_worst"] = min(run["after"] for run in found)
        figures[f"{arm}_episodes"] = statistics.mean(sum(run["episodes"]) for run in found)
    figures |= calculate_figures(runs) | abandoned_figures(runs)
    partial = bool(options.only) or seeds < SEEDS
    goals = {} if options.quick else {name: bound for name, bound in GOALS.items() if name in figures}
    result = report("tool_use", figures, goals, list(range(seeds)), options.quick or partial)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
