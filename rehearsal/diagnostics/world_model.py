"""What a policy knows of the world: gaps in episodes that it has to fill.

A gap is a piece of an episode that follows from the rest, with some other things that might stand there. The policy
fills it with what it finds likeliest; how often it is right, against what one would get who does not look, tells what
it knows, apart from how it plays:

==============  ===========================================  ==========================================================
kind            given                                        the gap
==============  ===========================================  ==========================================================
``action``      an episode up to an answer                   the action: one of the best, among other ones
``forward``     the same and an action                       what the environment answers, among its answers to others
``inverse``     a state, and the one after it                the action between them
``by_forward``  the same                                     the same, by how likely the second state is after each
``reward``      a state, an action, and what came of it      the reward, among those that there are
``budget``      a state and the turns that are left          whether they suffice, yes or no
==============  ===========================================  ==========================================================

``action``, ``forward`` and ``by_forward`` are asked in the very tokens of an episode, by how likely the policy finds
each candidate. The others are questions in words, which a model has to understand to do better than chance. So
``by_forward`` tells whether a policy knows what its actions do, and ``inverse`` whether it can say so. Answers come
without a thought.

Actions are chosen among the legal ones. Where any text is an action, they are the oracle's own and what it would say in
other episodes. Some of those can be told apart by what they are made of: in Countdown by their numbers, which are not
those of the task. A policy that fills such gaps knows what belongs to a task, and need not know how it is solved.

Beside them: the perplexity of the environment's answers against the number of symbols that they are made of. Above it
the policy does worse than somebody who knows nothing but the symbols: the world is foreign to it (SPA,
arXiv:2510.15047, which trains a world model by play before any reward, for that reason).

N target tokens.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rehearsal.agents.agent import Agent, Limits, check_reset, play_actions
from rehearsal.agents.players import end_of_answer
from rehearsal.agents.protocol import ANSWER_CLOSE, ANSWER_OPEN, Protocol
from rehearsal.agents.toolbox import Toolkit
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError
from rehearsal.models.chat import ChatRenderer, Piece
from rehearsal.models.packed import causal_lm, logits_of, packed_hidden
from rehearsal.models.packing import Pack, PackItem
from rehearsal.models.parallel import pack_workers
from rehearsal.models.scoring import each_target
from rehearsal.trajectory import Kind, SampleStop

PROBES = ("action", "forward", "inverse", "by_forward", "reward", "budget")
"""The kinds of gaps."""

_MOST_ACTIONS = 8
_ELSEWHERE = 64
"""Episodes that the oracle is asked in for what it would say elsewhere."""
_ROWS = 1024
_INVERSE = " After one action came:\n{}\nWhich action was it?"
_REWARD = " What was the reward of the last action?"
_BUDGET = " Can it be done in the turns that are left? yes or no."


@dataclass(frozen=True)
class Gap:
    """A gap and what might fill it.

    Attributes:
        kind: one of :data:`PROBES`.
        candidates: token ids, int32 of shape (T,), each with the position at which what is scored begins.
        right: which of them are.
        texts: what each of them stands for: an action, an observation, or the answer to a question.
    """

    kind: str
    candidates: tuple[tuple[np.ndarray, int], ...]
    right: frozenset[int]
    texts: tuple[str, ...]

    @property
    def chance(self) -> float:
        """The share of right candidates."""
        return len(self.right) / len(self.candidates)


class _Walk:
    """An episode up to a state, in tokens, with the turns and actions that a policy would see."""

    def __init__(
        self, env: TextEnv, renderer: ChatRenderer, limits: Limits, toolkit: Toolkit, seed: int, split: str
    ) -> None:
        self.env = env
        self.agent = Agent(renderer, Protocol(thinking=False), limits)
        self.observation, info = check_reset(env, env.reset(seed=seed, options={"split": split}))
        self.before = np.empty(0, np.int32)
        """The tokens before the last message."""
        self.answer: np.ndarray | None = None
        """The answer that the last message replies to; None at the start."""
        # Tools are shown, as in every episode, and called in none of the gaps.
        toolbox = toolkit.open(env)
        with contextlib.closing(toolbox) if toolbox is not None else contextlib.nullcontext():
            prompt = self.agent.opening(env.instructions, self.observation, str(info.get("state", "")), env, toolbox)
        self.open = prompt is not None

    @property
    def renderer(self) -> ChatRenderer:
        """The agent's, which shows the tools."""
        return self.agent.renderer

    @property
    def token_ids(self) -> np.ndarray:
        return self.agent.transcript.segment().token_ids

    def take(self, action: str) -> bool:
        """Go on by an action; whether there is a next turn."""
        self.before, self.answer = self.token_ids, self.spell(action)
        turn = self.agent.read(self.answer, np.zeros(len(self.answer), np.float32), SampleStop.END)
        result = play_actions(self.env, turn, self.agent.protocol, self.agent.actions_left)
        self.before = self.token_ids
        self.open = self.agent.next_turn(result) is not None
        self.observation = result.observation or self.observation
        return self.open

    def spell(self, action: str) -> np.ndarray:
        """The tokens of an answer with this action."""
        ids = self.renderer.encode(f"{ANSWER_OPEN}{action}{ANSWER_CLOSE}")
        return np.concatenate([ids, end_of_answer(self.renderer)]).astype(np.int32)

    def told(self, action: str, observation: str) -> tuple[np.ndarray, int]:
        """The episode with one more action and an answer to it, and where the answer's words begin."""
        answer = self.spell(action)
        rendered = self.renderer.after_answer(answer, [Piece(observation, Kind.OBSERVATION)])
        words = np.flatnonzero(rendered.kinds == Kind.OBSERVATION)
        before = np.concatenate([self.token_ids, answer])
        if len(words) == 0:
            return before, len(before)
        whole = np.concatenate([before, rendered.token_ids[: words[-1] + 1]]).astype(np.int32)
        return whole, len(before) + int(words[0])

    def asked(self, before: np.ndarray, answer: np.ndarray | None, observation: str, question: str) -> np.ndarray:
        """A message that ends in a question, after some tokens and the answer that it replies to."""
        pieces = [
            Piece(observation, Kind.OBSERVATION),
            Piece(f"\n{self.agent.turns[-1].notice}{question}", Kind.NOTICE),
        ]
        if answer is None:
            return self.renderer.first(self.agent.system(self.env.instructions, self.env), pieces).token_ids
        return np.concatenate([before, self.renderer.after_answer(answer, pieces).token_ids]).astype(np.int32)


@dataclass(frozen=True)
class _Step:
    """What an action leads to, tried out on a copy."""

    observation: str
    reward: float
    value: tuple[float, int]
    """How good it is to be there: the chance of success, then the fewer steps the better."""


class _Choices:
    """The actions to choose from in a state: the legal ones or, where any text is an action, the oracle's own and those
    that it would take elsewhere."""

    def __init__(self, env: TextEnv, seed: int, split: str) -> None:
        self._env = env
        self._seed = seed
        self._split = split

    @cached_property
    def _elsewhere(self) -> list[str]:
        env, rng = copy.deepcopy(self._env), np.random.default_rng([self._seed, 8])
        said: dict[str, None] = {}
        for _ in range(_ELSEWHERE):
            env.reset(seed=int(rng.integers(2**31)), options={"split": self._split})
            said |= dict.fromkeys(env.oracle() or ())
        return list(said)

    def of(self, env: TextEnv, plan: Sequence[str]) -> list[str]:
        """Those of the present state, each once."""
        legal = env.legal_actions()
        if legal is not None:
            return legal
        named = dict.fromkeys(map(env.parse_action, (*plan[:1], *self._elsewhere)))
        return [action for action in named if action is not None]


def _plan(env: TextEnv) -> list[str]:
    """The oracle's actions, the next one as the environment itself calls it."""
    plan = env.oracle() or []
    return [env.parse_action(plan[0]) or plan[0], *plan[1:]] if plan else []


def make_gaps(
    env: TextEnv, renderer: ChatRenderer, limits: Limits, count: int, *, seed: int = 0, split: str = "validation",
    toolkit: Toolkit | None = None,
) -> list[Gap]:  # fmt: skip
    """Gaps in ``count`` episodes of an environment, walked half by the oracle and half at random.

    Args:
        env: knows its best actions (``oracle``). It is reset, and copies of it are stepped.
        renderer: of the model that is to fill them.
        limits: of an episode; the turns are drawn anew each time, so that some budgets do not suffice.
        count: episodes; each gives at most one gap of each kind.
        seed: of the tasks and the walks.
        split: of the tasks.
        toolkit: the tools that agents have besides those of the environment. They are shown and not called.

    Raises:
        RecipeError: for an environment that has no oracle, or where nothing is legal.
    """
    env.reset(seed=0)
    if env.oracle() is None:
        raise RecipeError(
            f"The environment {env.name} cannot be probed: its oracle() is None, so nobody knows its best actions."
        )
    if env.legal_actions() == []:
        raise RecipeError(f"The environment {env.name} cannot be probed: no action is legal at the start.")
    choices = _Choices(env, seed, split)
    toolkit = toolkit or Toolkit()
    rng = np.random.default_rng([seed, 7])
    gaps: list[Gap] = []
    rewarded: list[tuple[_Walk, str, _Step]] = []
    for _ in range(count):
        turns = int(rng.integers(1, max(3, 2 * limits.max_turns)))
        drawn = Limits(turns, limits.max_actions_per_turn, turns * limits.max_actions_per_turn, 64, 1 << 20)
        walk = _Walk(copy.deepcopy(env), renderer, drawn, toolkit, int(rng.integers(2**31)), split)
        for _ in range(int(rng.integers(0, turns))):
            _stroll(walk, choices, rng)
        plan = _plan(walk.env)
        known = choices.of(walk.env, plan)
        actions = [known[place] for place in rng.permutation(len(known))[:_MOST_ACTIONS]]
        if plan and plan[0] in known and plan[0] not in actions:
            actions = [plan[0], *actions[:-1]]
        if not walk.open or not actions:
            continue
        steps = {action: _tried(walk.env, action, rng) for action in actions}
        taken = actions[int(rng.integers(len(actions)))]
        if walk.env.legal_actions() is None and plan and plan[0] in steps and rng.random() < 0.5:
            # Of any texts hardly one does anything: what comes of the oracle's has to be met as often.
            taken = plan[0]
        gaps += _action_gap(walk, plan, steps)
        gaps += _forward_gap(walk, taken, steps)
        gaps += _inverse_gaps(walk, taken, steps)
        gaps += _budget_gap(walk, plan)
        rewarded.append((walk, taken, steps[taken]))
    return gaps + _reward_gaps(rewarded)


def _stroll(walk: _Walk, choices: _Choices, rng: np.random.Generator) -> None:
    """One more turn, unless it would end the episode."""
    plan = _plan(walk.env)
    known = choices.of(walk.env, plan)
    if not known or walk.agent.actions_left <= 1 or len(walk.agent.turns) >= walk.agent.limits.max_turns:
        return
    action = plan[0] if plan and plan[0] in known and rng.random() < 0.5 else known[int(rng.integers(len(known)))]
    ahead = copy.deepcopy(walk.env)
    _, _, terminated, truncated, _ = ahead.step(action)
    if not (terminated or truncated):
        # The copy has the same luck as the environment itself, so what was looked at is what comes.
        walk.take(action)


def _tried(env: TextEnv, action: str, rng: np.random.Generator) -> _Step:
    ahead = copy.deepcopy(env)
    ahead.unwrapped.np_random = np.random.default_rng(int(rng.integers(2**32)))
    observation, reward, terminated, truncated, info = ahead.step(action)
    if terminated or truncated:
        return _Step(observation, float(reward), (float(bool(info.get("success"))), 0))
    plan = ahead.oracle() or []
    optimal = ahead.optimal_success()
    chance = optimal if optimal is not None else float(bool(plan))
    return _Step(observation, float(reward), (round(float(chance), 9), -len(plan)))


def _action_gap(walk: _Walk, plan: Sequence[str], steps: dict[str, _Step]) -> list[Gap]:
    if not plan or plan[0] not in steps:
        return []
    best = max(step.value for step in steps.values())
    ceiling = walk.env.optimal_success()
    right = {plan[0]} | {action for action, step in steps.items() if ceiling in (0.0, 1.0) and step.value == best}
    if ceiling is None:
        # Nobody knows whether another that did as well is as good or was lucky, so it is neither right nor wrong.
        own = steps[plan[0]].value
        steps = {action: step for action, step in steps.items() if action == plan[0] or step.value < own}
    return _answers("action", walk, walk.token_ids, steps, right)


def _forward_gap(walk: _Walk, taken: str, steps: dict[str, _Step]) -> list[Gap]:
    true = steps[taken].observation
    texts = dict.fromkeys([true, *(step.observation for step in steps.values()), walk.observation])
    return _gap("forward", {text: walk.told(taken, text) for text in texts}, {true})


def _inverse_gaps(walk: _Walk, taken: str, steps: dict[str, _Step]) -> list[Gap]:
    true = steps[taken].observation
    right = {action for action, step in steps.items() if step.observation == true}
    asked = walk.asked(walk.before, walk.answer, walk.observation, _INVERSE.format(true))
    after_each = {action: walk.told(action, true) for action in steps}
    return [*_answers("inverse", walk, asked, steps, right), *_gap("by_forward", after_each, right)]


def _budget_gap(walk: _Walk, plan: Sequence[str]) -> list[Gap]:
    left = min(
        walk.agent.actions_left,
        (walk.agent.limits.max_turns - len(walk.agent.turns) + 1) * walk.agent.limits.max_actions_per_turn,
    )
    asked = walk.asked(walk.before, walk.answer, walk.observation, _BUDGET)
    suffices = bool(plan) and len(plan) <= left
    return _answers("budget", walk, asked, ["yes", "no"], {"yes" if suffices else "no"})


def _reward_gaps(rewarded: Sequence[tuple[_Walk, str, _Step]]) -> list[Gap]:
    values = sorted({f"{step.reward:g}" for _, _, step in rewarded})
    gaps: list[Gap] = []
    for walk, taken, step in rewarded if 1 < len(values) <= _MOST_ACTIONS else ():
        answer = walk.spell(taken)
        asked = walk.asked(np.concatenate([walk.token_ids, answer]), answer, step.observation, _REWARD)
        gaps += _answers("reward", walk, asked, values, {f"{step.reward:g}"})
    return gaps


def _answers(kind: str, walk: _Walk, asked: np.ndarray, texts: Iterable[str], right: Set[str]) -> list[Gap]:
    spelled = {text: np.concatenate([asked, walk.spell(text)]).astype(np.int32) for text in texts}
    return _gap(kind, {text: (ids, len(asked)) for text, ids in spelled.items()}, right)


def _gap(kind: str, candidates: dict[str, tuple[np.ndarray, int]], right: Set[str]) -> list[Gap]:
    """A gap, if there is a right and a wrong way to fill it and every candidate has tokens."""
    places = frozenset(place for place, text in enumerate(candidates) if text in right)
    if not 0 < len(places) < len(candidates) or any(first >= len(ids) for ids, first in candidates.values()):
        return []
    return [Gap(kind, tuple(candidates.values()), places, tuple(candidates))]


def fill_gaps(model: Any, gaps: Sequence[Gap], *, pack_tokens: int = 4096) -> dict[str, float]:
    """How a model fills gaps.

    Args:
        model: a causal LM, with the adapters active that are to be probed.
        gaps: from :func:`make_gaps`.
        pack_tokens: tokens of one forward pass.

    Returns:
        for each kind that there are gaps of ``KIND/accuracy``, ``KIND/chance`` (what guessing would get or, where that
        is more, what the best answer would get that is always the same), ``KIND/exact`` (share of gaps that greedy
        generation fills with a right candidate, token for token) and ``KIND/count``; and ``perplexity`` of the
        environment's answers, a token, with ``symbols``, the number of different tokens that they are made of. A model
        that finds several candidates equally likely is right by their share.
    """
    items: list[PackItem] = []
    for number, gap in enumerate(gaps):
        items += [PackItem(ids, np.arange(first, len(ids)), number) for ids, first in gap.candidates]
    scored = _scored(model, items, pack_tokens) if items else []
    hits: dict[str, list[tuple[float, bool]]] = {}
    nats = tokens = 0.0
    symbols: set[int] = set()
    position = 0
    for gap in gaps:
        own = scored[position : position + len(gap.candidates)]
        position += len(gap.candidates)
        scores = np.array([float(one[:, 0].sum(dtype=np.float64)) for one in own])
        best = np.flatnonzero(scores == scores.max()).tolist()
        exact = any(bool(own[i][:, 1].all()) for i in gap.right)
        hits.setdefault(gap.kind, []).append((len(gap.right.intersection(best)) / len(best), exact))
        if gap.kind == "forward":
            (true,) = gap.right
            ids, first = gap.candidates[true]
            nats -= float(own[true][:, 0].sum(dtype=np.float64))
            tokens += len(ids) - first
            symbols |= set(ids[first:].tolist())
    figures: dict[str, float] = {}
    for kind in PROBES:
        if kind not in hits:
            continue
        right, exactly = zip(*hits[kind], strict=True)
        figures |= {
            f"{kind}/accuracy": sum(right) / len(right), f"{kind}/chance": _chance([g for g in gaps if g.kind == kind]),
            f"{kind}/exact": sum(exactly) / len(exactly), f"{kind}/count": float(len(right)),
        }  # fmt: skip
    if tokens:
        figures |= {"perplexity": math.exp(min(50.0, nats / tokens)), "symbols": float(len(symbols))}
    return figures


def _chance(gaps: Sequence[Gap]) -> float:
    """What somebody gets in gaps of one kind who does not look at what is given."""
    guessed = float(np.mean([gap.chance for gap in gaps]))
    # The same is often right: most rewards are 0, most budgets suffice, and some moves are best more often than others.
    often = Counter(gap.texts[place] for gap in gaps for place in gap.right)
    return max(guessed, max(often.values()) / len(gaps))


def _scored(model: Any, items: Sequence[PackItem], pack_tokens: int) -> list[np.ndarray]:
    """For each sequence float32 of shape (N, 2): the log-prob of each target, and whether no token is likelier."""
    lm = causal_lm(model)

    def look(pack: Pack) -> np.ndarray:
        hidden_ND = packed_hidden(model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
        found = []
        for start in range(0, len(hidden_ND), _ROWS):
            logits_NV = logits_of(lm, hidden_ND[start : start + _ROWS]).float()
            own_N = logits_NV.gather(1, pack.targets_N[start : start + _ROWS, None])[:, 0]
            top_N = (own_N >= logits_NV.max(dim=-1).values).float()
            found.append(torch.stack([own_N - logits_NV.logsumexp(dim=-1), top_N], dim=1))
        return torch.cat(found).cpu().numpy()

    device = next(lm.parameters()).device
    was_training = lm.training
    lm.eval()
    try:
        return each_target([model], items, look, pack_tokens, True, device, pack_workers(model))
    finally:
        lm.train(was_training)
