"""What an agent expects of actions that it has not taken, and how much of it comes true.

In each task the agent foretells what every legal action leads to, and what the actions after it do, on its own
predictions. The environment is copied and asked the same, so one sees how many actions ahead the predictions can be
trusted. Then the predictions go into the agent's thought, and it answers.

    python examples/lookahead.py --environment frozenlake --tasks 8 --depth 2
"""

from __future__ import annotations

import argparse
import asyncio
import copy
from collections.abc import Sequence

import rehearsal as rh
from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.lookahead import Future, Lookahead, imagine, thought_of
from rehearsal.agents.protocol import Protocol
from rehearsal.environments.base import TextEnv
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key


def what_comes(env: TextEnv, actions: Sequence[str]) -> str | None:
    """The environment's words after some actions, taken in a copy; None where they cannot be taken."""
    world, observation, over = copy.deepcopy(env), "", False
    for action in actions:
        legal = None if over else world.parse_action(action)
        if legal is None:
            return None
        observation, _, terminated, truncated, _ = world.step(legal)
        over = terminated or truncated
    return observation


async def look(policy: rh.Policy, env: TextEnv, seed: int, settings: Lookahead) -> tuple[list[Future], str]:
    """The futures of a task's first situation, and the agent's answer with those of its actions in its thought."""
    # The rehearse protocol tells the agent how predictions are written.
    protocol = Protocol(thinking=True, rehearse=True)
    limits = Limits.for_env(env, max_tokens_per_turn=256, max_context=1536)
    engine = LocalEngine(policy.model, max_context=limits.max_context)
    agent = Agent(policy.renderer, protocol, limits)
    observation, info = env.reset(seed=seed, options={"split": "test"})
    prompt = agent.opening(env.instructions, observation, str(info.get("state", "")), env)
    session = engine.session(stream_key(seed, "look"))
    session.extend(prompt.token_ids)
    actions = env.legal_actions() or []
    futures = await imagine(
        session, policy.renderer, protocol, actions, settings, SamplingParams(temperature=0.0), key=seed,
        propose=actions,
    )  # fmt: skip
    near = [future for future in futures if len(future.actions) == 1]
    thought = thought_of(near, protocol, opened_thought=policy.renderer.opens_thought)
    session.extend(policy.renderer.encode(thought))
    said = await session.sample(
        SamplingParams(temperature=0.0, max_tokens=agent.tokens_left, stop_token_ids=policy.renderer.stop_token_ids)
    )
    session.close()
    return futures, policy.renderer.decode(said.token_ids)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What an agent expects, and what comes.")
    parser.add_argument("--model", default="base", help="base, a Hugging Face folder or a hub name")
    parser.add_argument("--environment", default="frozenlake", help="a built-in name or package.module:Class")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2, help="actions in a row")
    parser.add_argument("--breadth", type=int, default=4, help="actions that are tried in each situation")
    parser.add_argument("--tokens", type=int, default=96, help="the most tokens of one prediction")
    options = parser.parse_args(arguments)

    policy = rh.load_policy(options.model)
    settings = Lookahead(options.depth, options.breadth, options.tokens)
    true, told = [0] * options.depth, [0] * options.depth
    for seed in range(options.tasks):
        env = rh.make(options.environment)
        futures, answer = asyncio.run(look(policy, env, seed, settings))
        for future in futures:
            came = what_comes(env, future.actions)
            if came is None:
                continue  # an episode that is over has nothing more to say
            ahead = len(future.actions) - 1
            told[ahead] += 1
            true[ahead] += future.expected[-1].split() == came.split()
        print(f"task {seed + 1}: {len(futures)} futures, the agent goes on: {' '.join(answer.split())[-60:]}")
        env.close()
    for ahead in range(options.depth):
        print(f"{ahead + 1} ahead: {true[ahead]} of {told[ahead]} predictions came true word for word")


if __name__ == "__main__":
    main()
