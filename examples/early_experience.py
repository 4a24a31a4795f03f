"""Learning before any reward: what an expert's neighbours lead to, and then what the expert does.

The environment's own oracle plays some episodes. Where it acted, the policy acts too, and what comes of it teaches a
world model; then the oracle's answers are imitated. No reward is read. With ``--steps`` the policy goes on to learn
from rewards.

    python examples/early_experience.py --environment frozenlake --expert-episodes 32
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import rehearsal as rh
from rehearsal.diagnostics import judge_early
from rehearsal.training.early_experience import EarlySettings, early_experience


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learning before any reward.")
    parser.add_argument("--model", default="base", help="base, a Hugging Face folder or a hub name")
    parser.add_argument("--environment", default="frozenlake", help="a built-in name or package.module:Class")
    parser.add_argument("--mode", default="dual", help="who learns the world: dual, shared, inactive or placebo")
    parser.add_argument("--expert-episodes", type=int, default=32)
    parser.add_argument("--episodes", type=int, default=64, help="held-out tasks before and after")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="for adapters of the base model")
    parser.add_argument("--steps", type=int, default=0, help="of learning from rewards afterwards")
    parser.add_argument("--output", default=None, help="run folder of those")
    options = parser.parse_args(arguments)

    changes = {
        "environment.name": options.environment, "model.path": options.model, "world.mode": options.mode,
        "evaluation.episodes": options.episodes,
    }  # fmt: skip
    if options.steps:
        changes |= {"training.steps": options.steps, "training.learning_rate": options.learning_rate}
    recipe = rh.resolve_recipe("frozenlake", changes)
    policy = rh.load_policy(options.model)
    # The base model cannot read a question, so it writes no reflections; a larger one is asked with reflect=True.
    settings = EarlySettings(
        episodes=options.expert_episodes, alternatives=2, reflect=options.model != "base", empty_thoughts=False,
        learning_rate=options.learning_rate, held_out=16, imitation_epochs=1,
    )  # fmt: skip
    figures = early_experience(policy, recipe, settings)
    for name in ("world_nats", "action_nats", "success"):
        if f"before/{name}" in figures:
            print(f"{name}: {figures[f'before/{name}']:.3f} before, {figures[f'after/{name}']:.3f} after")
    print(f"learnt from {figures['branches/states']:.0f} states of an expert, and no reward")
    for verdict in judge_early(figures):
        print(verdict.text())
    if options.steps:
        print(f"run: {rh.train(recipe, policy=policy, output=options.output).path}")


if __name__ == "__main__":
    main()
