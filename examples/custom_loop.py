"""The training loop by hand: play, learn, look.

What ``rehearsal train`` does, without its run folder, checkpoints and schedule. Copy it where you want another loop: a
curriculum over tasks, your own filter, two environments at once.

    python examples/custom_loop.py --environment frozenlake --steps 20
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import rehearsal as rh
from rehearsal.agents.agent import Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.algorithms import has_variance, preset
from rehearsal.evaluation.held_out import evaluate, held_out_tasks
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams
from rehearsal.rollout import Rollout, tasks_of_step
from rehearsal.training.learner import Learner
from rehearsal.training.options import TrainingOptions
from rehearsal.trajectory import all_trajectories, rewards_matrix


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The training loop by hand.")
    parser.add_argument("--model", default="base", help="base, a Hugging Face folder or a hub name")
    parser.add_argument("--environment", default="frozenlake", help="a built-in name or package.module:Class")
    parser.add_argument("--algorithm", default="dr_grpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=128, help="held-out tasks before and after")
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="for the base model; large ones need less")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    # An agent: a model with its chat format, an answer format, and what an episode may use.
    policy = rh.load_policy(options.model)
    limits = Limits.for_env(rh.make(options.environment), max_tokens_per_turn=64, max_context=1024)
    engine = LocalEngine(policy.model, max_context=limits.max_context)
    rollout = Rollout(
        lambda: rh.make(options.environment), engine, policy.renderer, Protocol(thinking=True), limits,
        sampling=SamplingParams(temperature=1.0), seed=options.seed,
    )  # fmt: skip

    # A learner: it updates the model in place, so the engine samples from the new weights at once.
    training = TrainingOptions(
        steps=options.steps, groups=options.groups, group_size=options.group_size, learning_rate=options.learning_rate
    )
    learner = Learner(policy.model, preset(options.algorithm, aggregation="token_mean"), training, seed=options.seed)

    def held_out(step: int) -> None:
        figures = evaluate(rollout, held_out_tasks(options.seed, "test", options.episodes), step=step).figures
        names = ("success", "success_low", "success_high", "reward", "format_errors")
        print(f"held-out after {step} steps:", {name: round(figures[name], 3) for name in names if name in figures})

    held_out(0)
    for step in range(options.steps):
        groups = rollout.play(tasks_of_step(options.seed, step, options.groups), options.group_size, step=step)
        # Groups whose episodes all got the same reward teach the policy nothing; a filter of your own goes here.
        keep_P = has_variance(rewards_matrix(groups))
        figures = learner.step(groups, step, keep_P)
        rewards = [trajectory.reward for trajectory in all_trajectories(groups) if not trajectory.failed]
        print(
            f"step {step + 1}: reward {sum(rewards) / max(1, len(rewards)):.3f}, "
            f"{int(keep_P.sum())} of {len(groups)} groups have something to teach, "
            f"gradient norm {figures.get('policy/grad_norm', 0.0):.3f}"
        )
    held_out(options.steps)
    rollout.close()


if __name__ == "__main__":
    main()
