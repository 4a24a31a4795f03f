"""Branches: what an agent might have done where an expert stood, and what the environment answers to it.

An expert walks through episodes. Wherever it answers, some other answers are tried out on copies of the environment,
and what comes of each is kept: experience of the agent's own making, without any reward (Early Experience,
arXiv:2510.08558). Everything is in the very tokens that an agent would see and answer in.

T tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rehearsal.agents.agent import Agent, Limits, check_reset, play_actions
from rehearsal.agents.players import end_of_answer
from rehearsal.agents.protocol import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, Protocol
from rehearsal.agents.rehearse import Hindsight, speaker_of
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.generation.sampling import stream_key
from rehearsal.generation.session import Sampled
from rehearsal.models.chat import ChatRenderer, Rendered
from rehearsal.rollout import Rollout, Task, run_coroutine
from rehearsal.trajectory import Kind, SampleStop, StopReason

Proposer = Callable[[TextEnv, int, np.random.Generator], Sequence[str]]
"""Names actions that might be taken in the present state of an environment, at least as many as the number if it can.
What it is given is a copy: it may try things out."""

_AT_ONCE = 64
"""Episodes whose states are held, each with a copy of its environment, at the same time."""


@dataclass(frozen=True, eq=False)
class State:
    """Where an expert stood before an answer.

    Attributes:
        task: of the episode.
        turn: number of the answer in it, from 0.
        environment: the environment's name.
        topic: what the episode is about.
        rules: the environment's instructions.
        observation: the environment's words that the answer replies to.
        past: the observations and the expert's actions before, in order.
        shown: int32 of shape (T,), the tokens between the answer before and this one.
        context: int32 of shape (T,), all tokens up to the answer; the expert's earlier thoughts are empty in them.
        actions: what the expert did.
    """

    task: Task
    turn: int
    environment: str
    topic: str
    rules: str
    observation: str
    past: tuple[tuple[str, tuple[str, ...]], ...]
    shown: np.ndarray
    context: np.ndarray
    actions: tuple[str, ...]

    @property
    def key(self) -> tuple[int | str, ...]:
        """Names the state: what is drawn for it does not depend on which others there are."""
        return (self.task.environment, self.task.split, self.task.seed, self.turn)


@dataclass(frozen=True, eq=False)
class Branch:
    """An answer that was tried out in a state.

    Attributes:
        state: where.
        answer: int32 of shape (T,), as it was sampled, the token that ends it included.
        told: int32 of shape (T,), what follows the answer up to the last of the environment's words; empty where the
            answer was refused, or nothing was said that fits into the context.
        first: where in ``told`` the environment's words begin.
        actions: the actions of the answer; none if it could not be read.
        observation: the environment's words; where the answer was refused, the notice of the harness ("" if there was
            neither a turn nor room left to show it).
        reward: of the environment, for the actions that it took.
        expert: whether it is what the expert did.
        refused: whether nothing was taken, because the answer could not be read or its first action is not legal.
        over: whether the episode ended with it.
        meaning: of the environment's words, where it tells it apart from them.
    """

    state: State
    answer: np.ndarray
    told: np.ndarray
    first: int
    actions: tuple[str, ...]
    observation: str
    reward: float
    expert: bool = False
    refused: bool = False
    over: bool = False
    meaning: str = ""

    @property
    def context(self) -> np.ndarray:
        """int32 of shape (T,): the tokens up to the answer."""
        return self.state.context

    def situation(self) -> Hindsight | None:
        """The environment's words as what is to be learnt; None where it said none. The notice to an answer that was
        refused is not its own, and is learnt by heart in no time (ECHO, arXiv:2605.24517)."""
        if len(self.told) == 0:
            return None
        ids = np.concatenate([self.context, self.answer, self.told])
        first = len(ids) - len(self.told) + self.first
        return Hindsight(
            ids, first, self.state.topic, self.state.environment, False, self.meaning, speaker_of(self.observation)
        )


@dataclass(eq=False)
class Experience:
    """What was found out around an expert's episodes.

    Attributes:
        episodes: the states of each episode, in order.
        branches: the expert's own and the others, state by state, the expert's first.
        figures: ``expert/episodes``, ``expert/success`` (share of those that tell it), ``expert/cut`` (episodes that
            the context was too short for), ``branches/states``, ``branches/alternatives``, ``branches/refused`` (how
            many of them were), ``branches/refused_dropped`` (how many more there were, beyond the share that is kept),
            ``branches/duplicates`` (proposals that were no other action than one before, or than the expert's).
    """

    episodes: list[list[State]] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def situations(self) -> list[Hindsight]:
        """What a world model learns from them: the environment's words alone, for ``Learner.step(situations=...)``."""
        return [one for branch in self.branches if (one := branch.situation()) is not None]

    def by_state(self) -> dict[State, list[Branch]]:
        """The branches of each state."""
        found: dict[State, list[Branch]] = {}
        for branch in self.branches:
            found.setdefault(branch.state, []).append(branch)
        return found


def any_legal(env: TextEnv, count: int, rng: np.random.Generator) -> list[str]:
    """A proposer that draws among the legal actions, for policies that cannot answer yet."""
    legal = env.legal_actions() or []
    return [legal[place] for place in rng.permutation(len(legal))]


def spelled(renderer: ChatRenderer, protocol: Protocol, actions: Sequence[str], thought: str = "") -> np.ndarray:
    """An answer in tokens, int32 of shape (T,), its end included; with a thought where the protocol thinks."""
    text = ANSWER_OPEN + f" {protocol.action_separator} ".join(actions) + ANSWER_CLOSE
    if protocol.thinking or renderer.opens_thought:
        text = f"{'' if renderer.opens_thought else THINK_OPEN}{thought}{THINK_CLOSE}{text}"
    return np.concatenate([renderer.encode(text), end_of_answer(renderer)]).astype(np.int32)


# Collecting


@dataclass(eq=False)
class _Stop:
    """A state with what it takes to go on from there, as often as one likes."""

    state: State
    env: TextEnv
    agent: Agent


def collect_branches(
    rollout: Rollout, tasks: Sequence[Task], *, alternatives: int = 3, draws: int | None = None,
    proposer: Proposer | None = None, error_share: float = 0.1, seed: int = 0,
) -> Experience:  # fmt: skip
    """Let an expert play, and try out other answers wherever it stood.

    The expert is the environment's own ``oracle()``, asked again before each answer, with as few actions in an answer
    as the turns that are left allow. Environments are called in line, without a time limit.

    Args:
        rollout: environments, engine, answer format and limits.
        tasks: what the expert plays.
        alternatives: other answers in each state.
        draws: how many answers are sampled in a state to find them; twice as many if None.
        proposer: names the other actions; if None they are what the policy itself samples, thoughts included.
        error_share: the most of all alternatives that may have been refused.
        seed: of sampling, and of the luck that the copies have.

    Raises:
        RecipeError: for an environment that has no oracle or cannot be copied, or numbers that cannot be used.
        EnvironmentFault: where an environment breaks its contract.
    """
    draws = 2 * alternatives if draws is None else draws
    if alternatives < 0 or draws < alternatives or not 0.0 <= error_share <= 1.0:
        raise RecipeError(
            f"Branches need alternatives of 0 or more, at least as many draws and an error_share from 0 to 1, not "
            f"{alternatives}, {draws} and {error_share}."
        )
    experience = Experience()
    ends: list[tuple[bool | None, bool]] = []
    duplicates = 0
    with contextlib.ExitStack() as closing:
        envs = {
            kind: closing.enter_context(contextlib.closing(rollout.makers[kind]()))
            for kind in dict.fromkeys(task.environment for task in tasks)
        }
        for start in range(0, len(tasks), _AT_ONCE):
            stops: list[_Stop] = []
            own: dict[State, list[Branch]] = {}
            for task in tasks[start : start + _AT_ONCE]:
                walked, taken, end = _walk(rollout, envs[task.environment], task)
                stops += walked
                own |= {branch.state: [branch] for branch in taken}
                experience.episodes.append([stop.state for stop in walked])
                ends.append(end)
            answers = _proposed(rollout, stops, draws, proposer, seed) if alternatives else [[] for _ in stops]
            for stop, some in zip(stops, answers, strict=True):
                found, repeated = _alternatives(stop, some, alternatives, seed)
                own[stop.state] += found
                duplicates += repeated
                # Most of the memory; the state alone is wanted from here on.
                del stop.env, stop.agent
            experience.branches += [branch for found in own.values() for branch in found]
    if not any(experience.episodes):
        raise RecipeError("The expert found nothing to do in any episode: its oracle() gave no actions, or no room.")
    dropped = _cap(experience, error_share, seed)
    others = [branch for branch in experience.branches if not branch.expert]
    told = [success for success, _ in ends if success is not None]
    experience.figures = {
        "expert/episodes": float(len(ends)),
        **({"expert/success": sum(told) / len(told)} if told else {}),
        "expert/cut": float(sum(cut for _, cut in ends)),
        "branches/states": float(sum(map(len, experience.episodes))),
        "branches/alternatives": float(len(others)),
        "branches/refused": float(sum(branch.refused for branch in others)),
        "branches/refused_dropped": float(dropped),
        "branches/duplicates": float(duplicates),
    }
    return experience


def _walk(rollout: Rollout, env: TextEnv, task: Task) -> tuple[list[_Stop], list[Branch], tuple[bool | None, bool]]:
    """An expert's episode: where it stopped to answer, what came of its answers, and whether it succeeded and was cut
    off by the context."""
    assert rollout.renderer is not None
    limits: Limits = rollout.all_limits[task.environment]
    agent = Agent(rollout.renderer, rollout.protocol, limits, keep_ending=True)
    observation, info = check_reset(env, env.reset(seed=task.seed, options={**task.options, "split": task.split}))
    toolbox = rollout.toolkit.open(env)
    if toolbox is not None:
        toolbox.close()
        raise RecipeError(
            "Early experience learns from an expert's actions, and no expert calls tools; leave tools.names and the "
            f"tools of {env.name} empty for it."
        )
    topic = str(info.get("topic") or info.get("task") or "")
    prompt = agent.opening(env.instructions, observation, str(info.get("state", "")), env)
    stops: list[_Stop] = []
    taken: list[Branch] = []
    past: tuple[tuple[str, tuple[str, ...]], ...] = ()
    cut = False
    while prompt is not None and (plan := _plan(env)):
        turns = limits.max_turns - len(agent.turns) + 1
        count = min(-(-len(plan) // turns), limits.max_actions_per_turn, agent.actions_left)
        actions = tuple(plan[:count])
        answer = spelled(agent.renderer, agent.protocol, actions)
        if cut := len(answer) > agent.tokens_left:
            break
        context = agent.transcript.segment().token_ids
        state = State(
            task, len(stops), env.name, topic, env.instructions, agent.turns[-1].observation, past, prompt.token_ids,
            context, actions,
        )  # fmt: skip
        stops.append(_Stop(state, _copied(env), _copied_agent(agent)))
        branch, prompt = _tried(state, env, agent, answer, SampleStop.END, expert=True)
        if branch.refused:
            raise EnvironmentFault(f"The oracle() of {env.name} plans an action that it does not take: {actions[0]}.")
        taken.append(branch)
        past = (*past, (state.observation, actions))
    return stops, taken, (agent.success, cut or agent.stop_reason == StopReason.CONTEXT_LIMIT)


def _plan(env: TextEnv) -> list[str]:
    plan = env.oracle()
    if plan is None:
        raise RecipeError(
            f"The environment {env.name} has no expert, since its oracle() is None; early experience begins where an "
            "expert has been, so write an oracle() for it, or learn from rewards at once."
        )
    return list(plan)


def _copied(env: TextEnv) -> TextEnv:
    try:
        copied = copy.deepcopy(env)
    except Exception as error:  # a copy runs the environment's own code
        told = f"copy.deepcopy raised {type(error).__name__}"
    else:
        if copied.unwrapped is not env.unwrapped:
            return copied
        told = "copy.deepcopy gives the same one back"
    raise RecipeError(
        f"The environment {env.name} cannot be copied ({told}), and branches are tried out on copies; give it a "
        "__deepcopy__ that copies its state."
    )


def _copied_agent(agent: Agent) -> Agent:
    return copy.deepcopy(agent, {id(agent.renderer): agent.renderer})


def _tried(
    state: State, env: TextEnv, agent: Agent, answer: np.ndarray, stop: SampleStop, expert: bool = False
) -> tuple[Branch, Rendered | None]:
    """Give an answer, and see what comes; also the next prompt, None where the episode is over."""
    turn = agent.read(answer, np.zeros(len(answer), np.float32), stop)
    after = len(agent.transcript)
    result = play_actions(env, turn, agent.protocol, agent.actions_left)
    prompt = agent.next_turn(result)
    segment = agent.transcript.segment()
    refused = not result.executed
    # What is shown after an answer that was refused is what was shown before.
    words = np.flatnonzero(segment.kinds[after:] == Kind.OBSERVATION)[: 0 if refused else None]
    told = segment.token_ids[after : after + int(words[-1]) + 1] if len(words) else np.empty(0, np.int32)
    notice = agent.turns[-1].notice if prompt is not None else result.notice
    branch = Branch(
        state, answer, told, int(words[0]) if len(words) else 0, tuple(turn.actions),
        notice if refused else (result.observation or ""), float(sum(result.rewards)), expert, refused, result.over,
        result.meaning,
    )  # fmt: skip
    return branch, prompt


def _proposed(
    rollout: Rollout, stops: Sequence[_Stop], draws: int, proposer: Proposer | None, seed: int
) -> list[list[Sampled]]:
    """Answers that might be given in each state."""
    if proposer is None:
        return run_coroutine(_sampled(rollout, stops, draws, seed))
    found = []
    for stop in stops:
        rng = np.random.default_rng([seed, 19, stream_key(*stop.state.key)])
        agent = stop.agent
        actions = list(proposer(_copied(stop.env), draws, rng))[:draws]
        each = [spelled(agent.renderer, agent.protocol, [action]) for action in actions]
        found.append([Sampled(ids, np.zeros(len(ids), np.float32), SampleStop.END) for ids in each])
    return found


async def _sampled(rollout: Rollout, stops: Sequence[_Stop], draws: int, seed: int) -> list[list[Sampled]]:
    async def one(stop: _Stop) -> list[Sampled]:
        key = stop.state.key
        ends = stop.agent.renderer.stop_token_ids
        params = replace(rollout.sampling, max_tokens=stop.agent.tokens_left, stop_token_ids=ends)
        root = rollout.engine.session(stream_key(seed, "branches", *key))
        root.extend(stop.state.context)
        sessions = [root.fork(stream_key(seed, "branch", *key, draw)) for draw in range(draws)]
        root.close()
        try:
            return list(await asyncio.gather(*(session.sample(params) for session in sessions)))
        finally:
            for session in sessions:
                session.close()

    return list(await asyncio.gather(*(one(stop) for stop in stops)))


def _alternatives(stop: _Stop, answers: Sequence[Sampled], count: int, seed: int) -> tuple[list[Branch], int]:
    """Up to ``count`` branches with other actions than the expert's, those that were refused only where no others are
    left; and how many answers were no other action."""
    state, protocol, renderer = stop.state, stop.agent.protocol, stop.agent.renderer

    def meant(actions: Sequence[str]) -> tuple[str, ...]:
        taken = actions[: stop.agent.actions_left]
        return tuple(stop.env.parse_action(action) or action.casefold() for action in taken)

    seen: set[object] = {meant(state.actions)}
    repeated = 0
    legal: list[Branch] = []
    refused: list[Branch] = []
    for number, answer in enumerate(answers):
        if len(legal) == count:
            break
        text = renderer.decode(answer.token_ids)
        parsed = protocol.parse(text, renderer.opens_thought)
        meaning: object = meant(parsed.actions) if parsed.valid else protocol.without_end(text)
        if meaning in seen:
            repeated += 1
            continue
        seen.add(meaning)
        env = _copied(stop.env)
        # Luck of its own: what the expert's dice would have shown is not for others to see.
        env.unwrapped.np_random = np.random.default_rng([seed, 23, stream_key(*state.key), number])
        branch, _ = _tried(state, env, _copied_agent(stop.agent), answer.token_ids, answer.stop)
        (refused if branch.refused else legal).append(branch)
    return legal + refused[: count - len(legal)], repeated


def _cap(experience: Experience, share: float, seed: int) -> int:
    """Take out what was refused beyond its share of all alternatives, at random; how many were taken out."""
    refused = [branch for branch in experience.branches if branch.refused]
    others = sum(not branch.expert and not branch.refused for branch in experience.branches)
    room = len(refused) if share == 1.0 else min(len(refused), int(share * others / (1.0 - share) + 1e-9))
    kept = set(np.random.default_rng([seed, 29]).permutation(len(refused))[:room].tolist())
    gone = {id(branch) for number, branch in enumerate(refused) if number not in kept}
    experience.branches = [branch for branch in experience.branches if id(branch) not in gone]
    return len(gone)
