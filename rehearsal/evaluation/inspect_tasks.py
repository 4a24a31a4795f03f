"""Our environments as tasks of inspect-ai (inspect.aisi.org.uk), for any model that it can talk to.

    inspect eval rehearsal/environment -T recipe=frozenlake -T episodes=64 --model openai/gpt-5

The agent is that of ``rehearsal eval --url``: the same rules, answer format, limits, tools and held-out tasks; the
conversation and the model are inspect's. With ``--epochs`` a task is played several times, each with other luck.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from rehearsal.agents.play import check_reset, play_actions
from rehearsal.agents.protocol import THINK_CLOSE, THINK_OPEN
from rehearsal.agents.text import TextAgent
from rehearsal.environments.base import TextEnv
from rehearsal.environments.luck import reset_with_luck
from rehearsal.errors import RecipeError
from rehearsal.training.playing import answer_protocol, episode_limits, make_toolkit
from rehearsal.training.recipe import resolve_recipe
from rehearsal.training.tasks import TaskSource, variants_of
from rehearsal.trajectory import SampleStop, Turn, info_success

try:
    from anyio import to_thread
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig, ModelOutput
    from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
    from inspect_ai.solver import Generate, Solver, TaskState, solver
except ImportError as _problem:
    raise RecipeError("Tasks for inspect-ai need its package: pip install 'rehearsal[inspect]'.") from _problem

_KEY = "rehearsal"


@task
def environment(
    recipe: str = "frozenlake", episodes: int = 64, split: str = "test", overrides: Mapping[str, Any] | None = None
) -> Task:
    """The held-out tasks of a recipe, to be played turn by turn.

    Args:
        recipe: a built-in name or a TOML file, for environments, limits, answer format and tools.
        episodes: how many tasks; all of them where the split has fewer and counts them.
        split: of the tasks.
        overrides: options of the recipe by dotted name.

    Raises:
        RehearsalError: for a recipe that cannot be used.
    """
    resolved = resolve_recipe(recipe, overrides or {})
    variants, limits = variants_of(resolved), episode_limits(resolved)
    samples = []
    for number, one in enumerate(TaskSource(resolved).held_out(resolved.evaluation.seed, split, episodes), start=1):
        with contextlib.closing(variants[one.environment].make()) as env:
            observation, info = check_reset(env, env.reset(seed=one.seed, options={**one.options, "split": split}))
        facts: dict[str, Any] = {"environment": env.name, "variant": one.environment, "seed": one.seed}
        facts |= {"split": split, "options": dict(one.options)}
        if info.get("category"):
            facts["category"] = str(info["category"])
        samples.append(Sample(input=observation, id=number, metadata=facts))
    return Task(
        dataset=MemoryDataset(samples, name=resolved.name), solver=play(recipe, overrides or {}), scorer=episode(),
        config=GenerateConfig(max_tokens=max(one.max_tokens_per_turn for one in limits)), name="environment",
    )  # fmt: skip


@solver
def play(recipe: str, overrides: Mapping[str, Any]) -> Solver:
    """Plays the episode of a sample: the model answers, the environment is stepped, until it is over."""
    resolved = resolve_recipe(recipe, overrides)
    variants, limits, protocol = variants_of(resolved), episode_limits(resolved), answer_protocol(resolved)
    toolkit = make_toolkit(resolved)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        facts = state.metadata
        agent = TextAgent(protocol, limits[facts["variant"]])
        env = await to_thread.run_sync(variants[facts["variant"]].make)
        try:
            begin = _opening(env, agent, toolkit.open, facts, luck=state.epoch - 1)
            prompt, success = await to_thread.run_sync(begin)
            state.messages = []
            while prompt is not None:
                state.messages += [_message(role, text) for role, text in agent.take_messages()]
                state = await generate(state)
                turn = _read(agent, state.output)
                result = await to_thread.run_sync(
                    play_actions, env, turn, agent.protocol, agent.actions_left, agent.toolbox
                )
                prompt = agent.next_turn(result)
        finally:
            if agent.toolbox is not None:
                agent.toolbox.close()
            await to_thread.run_sync(env.close)
        success = success if agent.success is None else agent.success
        reward = math.fsum(turn.reward for turn in agent.turns)
        state.store.set(_KEY, {"success": success, "reward": reward, "stop": str(agent.stop_reason)})
        return state

    return solve


@scorer(metrics={"success": [mean(), stderr()], "reward": [mean(), stderr()]})
def episode() -> Scorer:
    """Success, as the environment tells it (0 where it tells none), and the sum of its rewards."""

    async def score(state: TaskState, target: Target) -> Score:
        found = state.store.get(_KEY)
        value = {"success": float(bool(found["success"])), "reward": float(found["reward"])}
        return Score(value=value, answer=state.output.completion, explanation=f"The episode ended: {found['stop']}.")

    return score


def _opening(
    env: TextEnv, agent: TextAgent, open_toolbox: Callable[[TextEnv], Any], facts: Mapping[str, Any], luck: int
) -> Callable[[], tuple[Any, bool | None]]:
    def begin() -> tuple[Any, bool | None]:
        options = {**facts["options"], "split": facts["split"], "chance": luck}
        returned = reset_with_luck(env, facts["seed"], options)
        observation, info = check_reset(env, returned)
        prompt = agent.opening(env.instructions, observation, str(info.get("state", "")), env, open_toolbox(env))
        return prompt, info_success(info)

    return begin


def _message(role: str, text: str) -> ChatMessage:
    return ChatMessageSystem(content=text) if role == "system" else ChatMessageUser(content=text)


def _read(agent: TextAgent, output: ModelOutput) -> Turn:
    text = output.completion
    content = output.message.content
    thought = "" if isinstance(content, str) else "".join(p.reasoning for p in content if p.type == "reasoning")
    if thought and agent.protocol.thinking and THINK_OPEN not in text:
        # The rules ask for thoughts in the answer, and here they were taken out of it.
        text = f"{THINK_OPEN}{thought}{THINK_CLOSE}{text}"
    cut = output.stop_reason in ("max_tokens", "model_length")
    return agent.read_text(text, SampleStop.LENGTH if cut else SampleStop.END)
