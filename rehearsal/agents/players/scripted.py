"""Episodes of scripted players, in the very tokens that a model would see and answer in."""

from __future__ import annotations

import contextlib
from weakref import WeakKeyDictionary

import numpy as np

from rehearsal.agents.agent import Agent, Limits, check_reset, play_actions
from rehearsal.agents.calls import CALL_CLOSE, spell_call
from rehearsal.agents.players.known import world_of
from rehearsal.agents.players.player import Player
from rehearsal.agents.protocol import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, Protocol
from rehearsal.agents.rehearse import PREDICT_CLOSE, PREDICT_OPEN
from rehearsal.agents.toolbox import Toolkit
from rehearsal.environments.base import TextEnv
from rehearsal.models.chat import ChatRenderer, Piece
from rehearsal.trajectory import Kind, SampleStop, StopReason, ToolCall, Trajectory

_FOREIGN_WORDS = ("North", "South", "East", "West", "Jump", "Stay", "Wait", "Help", "Back", "Go")
"""What a player says who takes the rules for those of another game."""


def scripted_episode(
    env: TextEnv,
    player: Player,
    renderer: ChatRenderer,
    rng: np.random.Generator,
    *,
    seed: int,
    split: str = "train",
    protocol: Protocol | None = None,
    limits: Limits | None = None,
    toolkit: Toolkit | None = None,
) -> Trajectory:
    """Let a scripted player play one episode.

    The prompts, notices and kinds are those of :class:`rehearsal.agents.agent.Agent`, so a model that was trained on
    such episodes meets nothing new in a rollout. The answers count as sampled by their kinds; their log-probabilities
    are NaN, because no policy gave them.

    Args:
        env: is reset.
        player: who plays.
        renderer: of the model that the episode is for.
        rng: the player's own chance. The environment's comes from ``seed``.
        seed: of the environment's reset.
        split: of the environment's tasks.
        protocol: the answer format; the usual one if None.
        limits: of the episode; the environment's own if None.
        toolkit: the tools that there are beside those of the environment.

    Raises:
        RecipeError: where the player needs something that the environment does not tell, such as its best actions.
        EnvironmentFault: where the environment breaks its contract.
    """
    limits = limits or Limits.for_env(env)
    agent = Agent(renderer, protocol or Protocol(), limits)
    observation, info = check_reset(env, env.reset(seed=seed, options={"split": split}))
    end_ids = end_of_answer(renderer)
    toolbox = (toolkit or Toolkit()).open(env)
    with contextlib.closing(toolbox) if toolbox is not None else contextlib.nullcontext():
        prompt = agent.opening(
            env.instructions, observation, state=str(info.get("state", "")), env=env, toolbox=toolbox
        )
        while prompt is not None:
            text = _answer(env, player, agent, renderer.opens_thought, rng)
            ids = np.concatenate([renderer.encode(text), end_ids])
            room = agent.tokens_left
            stop = SampleStop.END if len(ids) <= room else SampleStop.LENGTH
            turn = agent.read(ids[:room], np.zeros(min(len(ids), room), np.float32), stop)
            result = play_actions(env, turn, agent.protocol, agent.actions_left, toolbox, agent.foretold)
            prompt = agent.next_turn(result)
    segment = agent.transcript.segment()
    segment.logprobs[:] = np.nan
    return Trajectory(
        environment=env.name,
        seed=seed,
        split=str(info.get("split", split)),
        task=str(info.get("task", "")),
        topic=str(info.get("topic", "")),
        category=str(info.get("category", "")),
        segments=[segment],
        turns=agent.turns,
        stop_reason=agent.stop_reason or StopReason.TURN_LIMIT,
        success=agent.success,
        final_observation=agent.final_observation,
        counters=dict(agent.counters),
    )


def _answer(env: TextEnv, player: Player, agent: Agent, opened: bool, rng: np.random.Generator) -> str:
    """The text of one answer, without the token that ends it."""
    protocol = agent.protocol
    world = world_of(env)
    heard = [call for turn in agent.turns for call in turn.calls if turn.valid]
    call = None
    if player.calls and agent.toolbox is not None:
        call = world.call(env, agent.toolbox.tools, heard, rng)
    actions: list[str] = []
    if call is None:
        actions = world.informed(env, heard)
        if not actions or rng.random() < player.epsilon:
            actions = player.actions(env, min(protocol.max_actions_per_turn, agent.actions_left), rng)
    thought = ""
    if protocol.thinking or opened:
        parts = [world.facts(env), world.told(env, heard)]
        if protocol.rehearse and call is None:
            rehearsed = world.rehearsals(env, actions, rng)
            parts += [f"{PREDICT_OPEN}{action}\n{answer}{PREDICT_CLOSE}" for action, answer in rehearsed]
        parts.append(world.intention(env, actions, rng) if call is None else f"ask {call.name}.")
        thought = f"{'' if opened else THINK_OPEN}{' '.join(part for part in parts if part)}{THINK_CLOSE}"
    mistaken = rng.random() < player.mistakes
    if call is not None:
        return thought + (_mistaken_call(call, rng) if mistaken else spell_call(call.name, call.arguments))
    if mistaken:
        return thought + _mistaken(env, actions, protocol, rng)
    return thought + ANSWER_OPEN + f" {protocol.action_separator} ".join(actions) + ANSWER_CLOSE


def _mistaken_call(call: ToolCall, rng: np.random.Generator) -> str:
    """A call of a tool that there is not, with an argument that it does not take, or that cannot be read."""
    written = spell_call(call.name, call.arguments)
    misnamed = {"input": next(iter(call.arguments.values()))}
    wrong = (
        spell_call(call.name[:-1], call.arguments), spell_call(call.name, misnamed),
        written.replace('"}}', '"}'), written.removesuffix(CALL_CLOSE),
    )  # fmt: skip
    return wrong[int(rng.integers(len(wrong)))]


def _mistaken(env: TextEnv, actions: list[str], protocol: Protocol, rng: np.random.Generator) -> str:
    """An answer that is broken, or names something that is not an action; half of them each where both are possible."""
    joined = f" {protocol.action_separator} ".join(actions)
    foreign = [word for word in _FOREIGN_WORDS if env.parse_action(word) is None]
    if foreign and rng.random() < 0.5:
        wrong = [*actions[:-1], foreign[int(rng.integers(len(foreign)))]]
        return ANSWER_OPEN + f" {protocol.action_separator} ".join(wrong) + ANSWER_CLOSE
    broken = (joined, ANSWER_OPEN + joined, ANSWER_OPEN + ANSWER_CLOSE, ANSWER_OPEN + joined + ANSWER_CLOSE + joined)
    return broken[int(rng.integers(len(broken)))]


_ends: WeakKeyDictionary[ChatRenderer, np.ndarray] = WeakKeyDictionary()


def end_of_answer(renderer: ChatRenderer) -> np.ndarray:
    """The id that the chat template ends an answer with, or nothing where no token does; found once a renderer."""
    if renderer not in _ends:
        closing = renderer.after_answer((), [Piece("x", Kind.OBSERVATION)]).token_ids
        stops = renderer.stop_token_ids
        closes = len(closing) > 0 and int(closing[0]) in stops
        _ends[renderer] = closing[:1] if closes else np.array(stops[:1], dtype=np.int32)
    return _ends[renderer]
