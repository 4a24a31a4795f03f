"""A whole training step against TRL's GRPOTrainer, on the same model, environment, episodes and limits.

Steps alternate in one process with the same number of threads: before each step of TRL, rehearsal takes one of its own.
Both start from the same weights, walk through the same tasks, sample at temperature 1 from float32 weights and take one
AdamW step on a loss that is the mean over sampled tokens, without entropy or KL terms; the learning rate is so small
that the policies stay alike. On a processor rehearsal plays in one process for each thread, as it does by default, and
those wait while TRL works. TRL plays its turns as ``benchmarks/trl_side.py`` says and gets the fastest of several
batch sizes for learning (``--trl-batch auto``).

``ratio_at_full_rate`` says what would be left to gain: TRL's step over one of ours that generates as it does and learns
its operations, counted by ``benchmarks/counting.py``, at the speed of a large matrix product in the same run.

The goal is held to FrozenLake 4x4 as it is by default, 5 turns of up to 2 actions, 32 groups of 8 episodes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import parser, ratio, report, say, timed
from benchmarks.counting import MATRIX, PRODUCT_FLOPS, items_of, packed_counts, training_flops
from benchmarks.setting import frozen_lake_recipe, model_folder
from benchmarks.trl_side import TrlSeconds, model_copy, train_with_trl
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import Recipe
from rehearsal.trajectory import Group

GOAL = {"ratio": ">= 5"}
BATCHES = (256, 64, 32, 16)
"""Episodes of one pass that are tried for TRL."""


@dataclass
class _OurStep:
    step: float
    generation: float
    learning: float
    episodes: int
    sampled: int
    tokens: int
    turns: int
    learned: float
    """Share of the episodes that had an advantage: the others need no gradient, and the learner leaves them out."""
    flops: float
    """Operations of its learning."""
    product: float
    """Seconds of a product of matrices after it."""

    @property
    def at_full_rate(self) -> float:
        """Seconds that its learning would take at the speed of the product."""
        return self.flops / PRODUCT_FLOPS * self.product


class Ours:
    """Rehearsal's side: the training step of ``rehearsal train``, without a run folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.trainer = Trainer(recipe, policy=model_copy(folder))
        self.log: list[_OurStep] = []
        self._matrices = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)

    def _flops(self, groups: Sequence[Group]) -> float:
        """Operations of learning from groups, if each reads what its episodes have in common once."""
        items = items_of(groups)
        tokens, pairs = packed_counts(items, [range(len(items))], share=True)
        return training_flops(self.trainer.policy.model, tokens, sum(len(item.targets) for item in items), pairs)

    def step(self, number: int = 0) -> None:
        """One training step; ``number`` is not used."""
        trainer = self.trainer
        started = time.perf_counter()
        batch = trainer.play()
        played = time.perf_counter()
        figures = trainer.learner.step(batch.groups, trainer.steps_done, batch.kept.keep_PG)
        trainer.steps_done += 1
        trainer.record(batch, figures, started, played)
        seconds = time.perf_counter() - started
        episodes = [trajectory for group in batch.groups for trajectory in group]
        differing = [group for group in batch.groups if group.rewards.max() > group.rewards.min()]
        product = min(timed(lambda: torch.mm(*self._matrices)) for _ in range(3))
        self.log.append(
            _OurStep(
                seconds, played - started, figures.get("time/learning", 0.0), len(episodes),
                sum(trajectory.n_sampled for trajectory in episodes),
                sum(trajectory.n_tokens for trajectory in episodes),
                sum(len(trajectory.turns) for trajectory in episodes),
                sum(len(group) for group in differing) / len(episodes), self._flops(differing), product,
            )
        )  # fmt: skip


def fastest_batch(recipe: Recipe, folder: Path, batches: tuple[int, ...], engine: str) -> int:
    """The batch size at which TRL learns fastest: the second of two steps counts."""
    episodes = recipe.training.groups * recipe.training.group_size
    seconds: dict[int, float] = {}
    for batch in batches:
        if episodes % batch or batch > episodes:
            continue
        last = train_with_trl(recipe, model_copy(folder), 2, batch=batch, engine=engine)[-1]
        seconds[batch] = last.step - last.generation
        say(f"TRL learns in {seconds[batch]:.1f} s with batches of {batch}")
    return min(seconds, key=lambda batch: seconds[batch])


def figures_of(ours: list[_OurStep], theirs: list[TrlSeconds], batch: int, processes: int) -> dict[str, float]:
    """The figures of the result; the first step of each side is left out."""
    ours, theirs = ours[1:], theirs[1:]
    median = statistics.median
    return {
        # Episodes of a step are the same on both sides, so the ratio of times is that of episodes per second.
        **ratio([t.step for t in theirs], [o.step for o in ours]).figures("ratio"),
        **ratio([t.generation for t in theirs], [o.generation for o in ours]).figures("generation_ratio"),
        **ratio([t.step - t.generation for t in theirs], [o.learning for o in ours]).figures("learning_ratio"),
        **ratio([t.step for t in theirs], [o.generation + o.at_full_rate for o in ours]).figures("ratio_at_full_rate"),
        "learning_utilisation": median(o.at_full_rate / o.learning for o in ours),
        "episodes_per_second": median(o.episodes / o.step for o in ours),
        "trl_episodes_per_second": median(t.episodes / t.step for t in theirs),
        "step_seconds": median(o.step for o in ours),
        "trl_step_seconds": median(t.step for t in theirs),
        "generation_share": median(o.generation / o.step for o in ours),
        "trl_generation_share": median(t.generation / t.step for t in theirs),
        "learning_share": median(o.learning / o.step for o in ours),
        "trl_learning_share": median((t.step - t.generation) / t.step for t in theirs),
        "sampled_tokens_per_episode": sum(o.sampled for o in ours) / sum(o.episodes for o in ours),
        "trl_sampled_tokens_per_episode": sum(t.sampled for t in theirs) / sum(t.episodes for t in theirs),
        "tokens_per_episode": sum(o.tokens for o in ours) / sum(o.episodes for o in ours),
        "trl_tokens_per_episode": sum(t.tokens for t in theirs) / sum(t.episodes for t in theirs),
        "turns_per_episode": sum(o.turns for o in ours) / sum(o.episodes for o in ours),
        "trl_turns_per_episode": sum(t.turns for t in theirs) / sum(t.episodes for t in theirs),
        "episodes_with_advantage": sum(o.learned for o in ours) / len(ours),
        "processes": float(processes),
        "episodes_per_step": float(ours[0].episodes),
        "steps": float(len(ours)),
        "trl_batch": float(batch),
    }


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--model", default="base", help='a model folder, "base", or "random"')
    options.add_argument("--steps", type=int, default=7, help="steps of each side that are counted")
    options.add_argument("--groups", type=int, default=32)
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--actions", type=int, default=2, help="actions of a turn")
    options.add_argument("--tokens-per-turn", type=int, default=64)
    options.add_argument("--max-context", type=int, default=1024)
    options.add_argument("--trl-batch", default="auto", help='episodes of one pass of TRL, or "auto" for the fastest')
    options.add_argument("--trl-engine", choices=("generate", "continuous"), default="generate")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.quick:
        given.steps, given.groups = min(given.steps, 2), min(given.groups, 4)
        given.trl_batch = "16" if given.trl_batch == "auto" else given.trl_batch
    with model_folder(given.model) as folder:
        recipe = frozen_lake_recipe(
            groups=given.groups, group_size=given.group_size, turns=given.turns, actions=given.actions,
            tokens_per_turn=given.tokens_per_turn, max_context=given.max_context, seed=given.seed,
        )  # fmt: skip
        if given.trl_batch == "auto":
            batch = fastest_batch(recipe, folder, BATCHES, given.trl_engine)
        else:
            batch = int(given.trl_batch)
        ours = Ours(recipe, folder)
        with contextlib.closing(ours.trainer):
            theirs = train_with_trl(
                recipe, model_copy(folder), given.steps + 1, batch=batch, between=ours.step, engine=given.trl_engine
            )
    figures = figures_of(ours.log, theirs, batch, ours.trainer.processes)
    settings = [] if given.trl_engine == "generate" else ["continuous"]
    settings += [] if (given.turns, given.actions) == (5, 2) else [f"{given.turns}x{given.actions}"]
    name = "_".join(["against_trl", *settings])
    report(name, figures, GOAL, [given.seed], given.quick)


if __name__ == "__main__":
    main()
