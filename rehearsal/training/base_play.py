"""How well a base model plays, sampled as it is."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.toolbox import Toolkit
from rehearsal.agents.toolkit import make_source
from rehearsal.environments import make
from rehearsal.evaluation.held_out import evaluate, held_out_tasks
from rehearsal.generation.local import LocalEngine
from rehearsal.models.chat import ChatRenderer
from rehearsal.models.load import load_policy
from rehearsal.rollout import Rollout
from rehearsal.training.base_config import Scene
from rehearsal.training.playing import DEFAULT_TOOL_TURNS
from rehearsal.trajectory import all_trajectories

SETTINGS = {
    "frozenlake": Scene("frozenlake"),
    "frozenlake_slip": Scene("frozenlake", {"slip": 0.2}),
    "sokoban": Scene("sokoban"),
    "bandit": Scene("bandit", {"held_out": "pairs"}),
    "bandit_reversed": Scene("bandit", {"held_out": "pairs", "reversed": True}),
    "bandit_unknown_names": Scene("bandit"),
    "countdown": Scene("countdown"),
    "helpdesk": Scene("helpdesk"),
    "helpdesk_rehearsed": Scene("helpdesk", rehearse=1.0),
    "frozenlake_rehearsed": Scene("frozenlake", rehearse=1.0),
    "calculate": Scene("calculate"),
    "calculate_with_calculator": Scene("calculate", tools=("calculator",)),
    "lookup_one_hop": Scene("lookup", {"hops": 1}),
    "lookup_two_hops": Scene("lookup"),
}
"""What is played, by the name that its rate gets."""

_MAX_TOKENS = 128
_MAX_CONTEXT = 2048


def sampled_play(
    folder: Path, episodes: int = 256, split: str = "validation", settings: Iterable[str] = tuple(SETTINGS)
) -> dict[str, float]:
    """Success of sampled play (temperature 1) with the environments' own limits.

    Args:
        folder: of the model, in Hugging Face format.
        episodes: of each setting, every one with another task.
        split: of the tasks. The validation split by default, so that nothing about the base was chosen on test tasks.
        settings: some of the names in :data:`SETTINGS`.

    Returns:
        ``success_NAME`` for each setting, ``valid_answers`` (share of all answers that kept the format and named legal
        actions) and ``play_episodes``.

    Raises:
        ModelError: for a folder that has no usable model.
    """
    policy = load_policy(folder, device="cpu")
    engine = LocalEngine(policy.model, max_context=_MAX_CONTEXT)
    figures: dict[str, float] = {"play_episodes": float(episodes)}
    answers = valid = 0
    for name in settings:
        scene = SETTINGS[name]
        make_env = partial(make, scene.environment, **scene.params)
        limits = Limits.for_env(
            make_env(), max_tokens_per_turn=_MAX_TOKENS, max_context=_MAX_CONTEXT,
            tool_turns=DEFAULT_TOOL_TURNS if scene.tools else 0,
        )  # fmt: skip
        rollout = Rollout(
            make_env, engine, policy.renderer, Protocol(rehearse=scene.rehearse > 0), limits,
            toolkit=Toolkit([make_source(tool) for tool in scene.tools]),
        )  # fmt: skip
        try:
            played = evaluate(rollout, held_out_tasks(0, split, episodes))
        finally:
            rollout.close()
        trajectories = all_trajectories(played.groups)
        # Where no action was ever executed, the environment never spoke of success.
        figures[f"success_{name}"] = sum(bool(trajectory.success) for trajectory in trajectories) / len(trajectories)
        turns = [turn for trajectory in trajectories for turn in trajectory.turns]
        answers += len(turns)
        valid += sum(turn.valid for turn in turns)
    figures["valid_answers"] = valid / max(1, answers)
    return figures


def opening_tokens(tokenizer: Any) -> int:
    """How many tokens the system prompt and the first observation of FrozenLake take, up to the first answer."""
    env = make("frozenlake")
    observation, _ = env.reset(seed=0)
    prompt = Agent(ChatRenderer(tokenizer), Protocol(), Limits.for_env(env)).opening(env.instructions, observation)
    assert prompt is not None
    return len(prompt)
