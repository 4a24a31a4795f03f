"""What a world model of its own costs: a training step with two adapters over one with a single adapter.

Both play FrozenLake with the same model and learn with the same algorithm. The single adapter has the summed rank and
learns from rewards alone; of the two, one learns from rewards and the other from the environment's answers, each with a
backward pass of its own through a common forward pass. ``step_ratio`` is of whole steps, play and learning;
``learning_ratio`` of what the learner does.

Memory is the highest resident memory of a process that takes a learner's step, less that of the same process before it;
each variant has a process of its own. ``memory_ratio`` is of what is in use: the allocator gives back at once what is
freed. ``as_allocated`` is the same with the allocator as it is, which keeps pieces for later.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import forget_peak, in_own_process, interleaved, memory, parser, ratio, report, say
from benchmarks.setting import LEARNING_RATE, frozen_lake_recipe, model_folder
from rehearsal.training.loop import Trainer

RANK = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "single": {"world__mode": "policy_only", "adapters__policy_rank": RANK, "adapters__world_rank": 0},
    "dual": {"world__mode": "dual", "adapters__policy_rank": RANK // 2, "adapters__world_rank": RANK // 2},
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""For the allocator of glibc: what is larger is given back to the system as soon as it is freed."""
GOALS = {"step_ratio": "<= 1.6", "memory_ratio": "<= 1.15"}


def trainer_of(variant: str, given: argparse.Namespace, folder: Path) -> Trainer:
    recipe = frozen_lake_recipe(
        groups=given.groups, group_size=given.group_size, turns=5, actions=2, tokens_per_turn=64, max_context=1024,
        seed=given.seed, model__path=str(folder), training__learning_rate=LEARNING_RATE, engine__processes=1,
        diagnostics__every=0, diagnostics__gradients_every=0, **VARIANTS[variant],
    )  # fmt: skip
    return Trainer(recipe)


def measure_memory(given: argparse.Namespace, folder: Path) -> None:
    """What the process of one variant does: a single step of the learner, and a line on what it took."""
    trainer = trainer_of(given.measure, given, folder)
    groups = trainer.play().groups
    gc.collect()
    before = memory("VmRSS")
    forget_peak()
    trainer.learner.step(groups, 0)
    print(json.dumps({"bytes": memory("VmHWM") - before}))
    trainer.close()


def memory_of(variant: str, given: argparse.Namespace, folder: Path, environment: dict[str, str]) -> float:
    """MiB of a step, by :func:`measure_memory` in a process of its own."""
    options = ["--measure", variant, "--model", str(folder), "--groups", str(given.groups)]
    options += ["--group-size", str(given.group_size), "--seed", str(given.seed)]
    options += ["--threads", str(torch.get_num_threads())]
    return float(in_own_process(options, environment)["bytes"]) / 2**20


def times(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Ratios of seconds, the variants in turn."""
    trainers = {variant: trainer_of(variant, given, folder) for variant in VARIANTS}
    groups = {variant: trainer.play().groups for variant, trainer in trainers.items()}

    def learn(variant: str) -> Callable[[], Any]:
        return lambda: trainers[variant].learner.step(groups[variant], 0)

    def step(variant: str) -> Callable[[], Any]:
        return lambda: trainers[variant].learner.step(trainers[variant].play().groups, 0)

    works = {f"{variant}_learning": learn(variant) for variant in VARIANTS}
    works |= {f"{variant}_step": step(variant) for variant in VARIANTS}
    seconds = interleaved(works, given.repeats, warmup=1)
    for trainer in trainers.values():
        trainer.close()
    figures = ratio(seconds["dual_step"], seconds["single_step"]).figures("step_ratio")
    figures |= ratio(seconds["dual_learning"], seconds["single_learning"]).figures("learning_ratio")
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="base", help='a model folder, "base", or "random"')
    options.add_argument("--groups", type=int, default=32)
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.quick:
        given.groups, given.repeats = min(given.groups, 6), min(given.repeats, 2)
    with model_folder(given.model) as folder:
        if given.measure:
            measure_memory(given, folder)
            return
        figures = times(given, folder)
        say(f"a step {figures['step_ratio']:.2f}, learning {figures['learning_ratio']:.2f}")
        for lead, environment in (("", GIVE_BACK), ("as_allocated_", {})):
            for variant in VARIANTS:
                figures[f"{lead}{variant}_step_mib"] = memory_of(variant, given, folder, environment)
    for lead in ("", "as_allocated_"):
        figures[f"{lead}memory_ratio"] = figures[f"{lead}dual_step_mib"] / figures[f"{lead}single_step_mib"]
    figures["rank"] = float(RANK)
    report("dual", figures, GOALS, [given.seed], given.quick)


if __name__ == "__main__":
    main()
