"""Looking further ahead: what a policy expects of actions that nobody has taken, rolled forward.

In the rehearse protocol (:mod:`rehearsal.agents.rehearse`) a policy foretells the answer to an action. Put into the
conversation as if the environment had said it, that answer is the ground for the next action and its prediction:

    call            -> We need the pin.
    call || ask pin -> It is 0429.

All of it is sampled in forks of the agent's session, which is itself neither extended nor sampled from. What was found
can go into the thought of the agent's own answer (:func:`thought_of`), or serve to choose an action.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from rehearsal.agents.protocol import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, Protocol
from rehearsal.agents.rehearse import PREDICT_CLOSE, PREDICT_OPEN
from rehearsal.errors import RecipeError
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.generation.session import Session
from rehearsal.models.chat import ChatRenderer, Piece
from rehearsal.trajectory import Kind, SampleStop

T = TypeVar("T")


@dataclass(frozen=True)
class Lookahead:
    """How far to look ahead.

    Attributes:
        depth: actions in a row.
        breadth: actions that are tried in each situation.
        tokens: the most tokens of one prediction, and of one answer in which the policy proposes an action.

    Raises:
        RecipeError: if one of them is less than 1.
    """

    depth: int = 1
    breadth: int = 1
    tokens: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise RecipeError(f"{name} must be at least 1, not {value}.")


@dataclass(frozen=True)
class Future:
    """What the policy expects to come of some actions.

    Attributes:
        actions: one for each answer, from the present situation on; one that holds several actions has them joined by
            the protocol's separator.
        expected: what the environment is expected to say to each, special tokens broken as in any observation.
        logprob: natural-log probability of all predictions on the way together, the tags that end them included, under
            the distribution that they were sampled from (at temperature 0 it is 0). NaN where a server gives none.
        tokens: how many tokens it is of.
        cut_off: whether a limit cut off a prediction on the way; what there is of it is kept.
        full: whether the context had no room, for the last prediction or for what follows it. Where not one token of
            a prediction fitted, ``expected`` ends with "".
    """

    actions: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    logprob: float = 0.0
    tokens: int = 0
    cut_off: bool = False
    full: bool = False


Propose = Callable[[Future], Sequence[str]]


async def imagine(
    session: Session, renderer: ChatRenderer, protocol: Protocol, actions: Sequence[str], settings: Lookahead,
    params: SamplingParams, key: int, *, propose: Propose | Sequence[str] | None = None,
) -> list[Future]:  # fmt: skip
    """What the policy expects of each action and, with ``settings.depth`` above 1, of those that may follow it.

    Each prediction is sampled in a fork of the session: breadth + breadth^2 + ... + breadth^depth of them at most, and
    where the policy itself proposes actions, once more as many without the first breadth. They sample at the same
    time. One fork more is held open, and never sampled from, so that the context is not read again for every level.

    Imagined messages hold the expected answer alone, without the notices that the harness adds to real ones.

    Args:
        session: ends where the agent is about to answer. It must rest until this returns, and is then as it was. All
            forks are closed by then, also after an error or a cancellation.
        renderer: of the model that samples.
        protocol: the answer format as the agent uses it (``agent.protocol``).
        actions: what to try now, each as it stands in an answer; the first ``settings.breadth`` different ones count.
        settings: depth, breadth and length.
        params: temperature and truncation; the number of tokens and what ends a sample are set here.
        key: of the noise. A prediction's own noise comes from this and the actions that lead to it, so it is the same
            in any order and any company.
        propose: the actions to try after a future: a function of it, or the same ones each time. By default the policy
            answers ``settings.breadth`` times without a thought; answers that are cut off or cannot be read are no
            proposals, and equal ones count once. A future without any is not followed further.

    Returns:
        every future, in the order of the actions, each followed by those that begin with it.

    Raises:
        RecipeError: if the answer format has no thought, or a given action cannot stand in one line of one answer.
        GenerationError: if sampling fails.
    """
    if not (protocol.thinking or renderer.opens_thought):
        raise RecipeError("To look ahead needs a thought to foretell in; switch thinking on.")
    search = _Search(session, renderer, protocol, settings, params, key, propose)
    with contextlib.closing(session.fork(key)):
        return await search.after(Future(), np.empty(0, np.int32), search.given(actions))


def thought_of(futures: Iterable[Future], protocol: Protocol, *, opened_thought: bool = False) -> str:
    """The beginning of a thought that holds predictions: left open, so that the agent goes on from there.

    Several actions in a row are one prediction, of what comes after the last of them. Futures of which nothing was
    foretold are left out; those that were cut off are not.

    Args:
        futures: what to put in, in this order.
        protocol: the answer format.
        opened_thought: whether the generation prompt has already opened the thought.
    """
    told = [
        f"{PREDICT_OPEN}{f' {protocol.action_separator} '.join(future.actions)}\n{future.expected[-1]}{PREDICT_CLOSE} "
        for future in futures
        if future.expected and future.expected[-1]
    ]
    return "".join(["" if opened_thought else THINK_OPEN, *told])


@dataclass(frozen=True)
class _Search:
    """One call of :func:`imagine`. A situation is the session and the tokens that would follow in it, so every fork is
    one of the session: what they all have in common is read once."""

    session: Session
    renderer: ChatRenderer
    protocol: Protocol
    settings: Lookahead
    params: SamplingParams
    key: int
    propose: Propose | Sequence[str] | None

    async def after(self, past: Future, ahead: np.ndarray, actions: Sequence[str]) -> list[Future]:
        branches = await _together(self._branch(past, ahead, action) for action in actions)
        return [future for branch in branches for future in branch]

    async def _branch(self, past: Future, ahead: np.ndarray, action: str) -> list[Future]:
        actions = (*past.actions, action)
        opening = f"{'' if self.renderer.opens_thought else THINK_OPEN}{PREDICT_OPEN}"
        prompt = np.concatenate([ahead, self.renderer.encode(opening), self.renderer.encode(f"{action}\n")])
        # A prediction is read up to any of these; see find_predictions.
        said = await self._sample(prompt, (PREDICT_CLOSE, PREDICT_OPEN, THINK_CLOSE), "predict", *actions)
        expected = tuple(map(self.renderer.plain, said.expected))
        future = Future(
            actions, past.expected + expected, past.logprob + said.logprob, past.tokens + said.tokens,
            past.cut_off or said.cut_off, said.full,
        )  # fmt: skip
        if future.full or len(actions) == self.settings.depth:
            return [future]
        answer = self.renderer.encode(self._answer(action))
        message = self.renderer.after_answer(answer, [Piece(future.expected[-1], Kind.OBSERVATION)])
        ahead = np.concatenate([ahead, answer, message.token_ids])
        if self.propose is None:
            proposed, full = await self._proposals(future, ahead)
            return [replace(future, full=full), *await self.after(future, ahead, proposed)]
        given = self.propose(future) if callable(self.propose) else self.propose
        return [future, *await self.after(future, ahead, self.given(given))]

    async def _proposals(self, future: Future, ahead: np.ndarray) -> tuple[list[str], bool]:
        """What the policy would do next, and whether it had no room to say so."""
        prompt = np.concatenate([ahead, self.renderer.encode(self._answer("").removesuffix(ANSWER_CLOSE))])
        drafts = await _together(
            self._sample(prompt, (ANSWER_CLOSE,), "propose", *future.actions, number)
            for number in range(self.settings.breadth)
        )
        proposed = self._different(self._read(said.expected[0]) for said in drafts if not said.cut_off)
        return proposed, not proposed and any(said.full for said in drafts)

    def given(self, actions: Sequence[str]) -> list[str]:
        """Actions that somebody asks for."""
        for action in actions:
            read = self._read(action)
            if not read or "".join(read.split()) != "".join(action.split()):
                raise RecipeError(f'"{action}" cannot be looked ahead to: give what one line of one answer can hold.')
        return self._different(map(self._read, actions))

    def _read(self, text: str) -> str:
        """The actions of an answer that holds this text; "" if there are none, or no prediction can name them."""
        parsed = self.protocol.parse(self._answer(text), self.renderer.opens_thought)
        action = f" {self.protocol.action_separator} ".join(parsed.actions)
        return "" if any(mark in action for mark in ("\n", PREDICT_OPEN, PREDICT_CLOSE)) else action

    def _answer(self, action: str) -> str:
        """The answer that takes an action, without a thought."""
        return f"{'' if self.renderer.opens_thought else THINK_OPEN}{THINK_CLOSE}{ANSWER_OPEN}{action}{ANSWER_CLOSE}"

    def _different(self, actions: Iterable[str]) -> list[str]:
        different: dict[str, str] = {}
        for action in filter(None, actions):
            different.setdefault(" ".join(action.casefold().split()), action)
        return list(different.values())[: self.settings.breadth]

    async def _sample(self, prompt: np.ndarray, ends: tuple[str, ...], *path: int | str) -> Future:
        """What is said behind a prompt, up to the first of some ends or to the end of the turn, as ``expected``."""
        if len(prompt) >= self.session.room:
            return Future((), ("",), cut_off=True, full=True)
        tags = [tag for end in ends if (tag := self.renderer.single_token(end)) is not None]
        stops = tuple(sorted({*self.renderer.stop_token_ids, *tags}))
        params = replace(self.params, max_tokens=self.settings.tokens, stop_token_ids=stops)
        with contextlib.closing(self.session.fork(stream_key(self.key, *path))) as fork:
            fork.extend(prompt)
            sampled = await fork.sample(params)
        decode, ids = self.renderer.decode, sampled.token_ids
        ended = re.compile("|".join(map(re.escape, (*ends, *self.renderer.stop_texts))))
        # An end of several tokens stops nobody: what was sampled behind it does not count.
        count = bisect_left(range(len(ids)), True, key=lambda n: ended.search(decode(ids[:n])) is not None)
        text, end = decode(ids), ended.search(decode(ids))
        cut_off = end is None and sampled.stop != SampleStop.END
        return Future(
            (), ((text[: end.start()] if end else text).strip(),),
            float(sampled.logprobs[:count].sum(dtype=np.float64)), count, cut_off,
            cut_off and sampled.stop == SampleStop.CONTEXT,
        )  # fmt: skip


async def _together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of jobs that run at the same time; none is still running when this returns or raises."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
