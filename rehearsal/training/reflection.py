"""Self-reflection: the policy writes what one might think before an expert's action, and what leaks is turned down.

The second stage of :mod:`rehearsal.training.early_experience`.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rehearsal.agents.protocol import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, Protocol
from rehearsal.generation.sampling import stream_key
from rehearsal.models.chat import ANSWER_TAGS, ChatRenderer, Piece
from rehearsal.rollout import Rollout, run_coroutine
from rehearsal.training.branches import Branch, Experience, State, spelled
from rehearsal.trajectory import Kind, SampleStop

LEAKS = re.compile(
    r"\b(?:experts?|oracles?|alternatives?|options?|demonstrat\w*|hindsight|outcomes?|ground[ -]truth|labels?"
    r"|(?:reference|gold|given|listed|chosen|selected|correct|preferred) (?:actions?|answers?|choices?)"
    r"|(?:action|choice) \d+|a_i\b\S*|as (?:told|listed|stated)|(?:was|were) (?:told|given|listed))\b",
    re.IGNORECASE,
)
"""Words by which a reflection gives away that it was told what to do. In the published release 16% of them said so."""

TURNED_DOWN = ("no_room", "cut", "tags", "short", "long", "label", "future", "doubled", "duplicate")
"""Why a reflection may be turned down: the question does not fit into the context; the answer was cut off; it has tags
or special tokens; it is too short; too long; gives the label away (:data:`LEAKS`); quotes what could not be known
before acting; says everything twice; is word for word that of another state."""


def question(state: State, branches: Sequence[Branch], protocol: Protocol, rng: np.random.Generator) -> list[Piece]:
    """What a policy is asked about a state: what the actions there led to, in random order and without a name for any
    of them, and to think aloud towards the expert's. Rewards are not told."""
    separator = f" {protocol.action_separator} "
    pieces = []
    for observation, actions in state.past:
        pieces += [Piece(f"{observation}\n", Kind.OBSERVATION), Piece(f"> {separator.join(actions)}\n", Kind.NOTICE)]
    pieces += [Piece("Now:\n", Kind.NOTICE), Piece(f"{state.observation}\n\n", Kind.OBSERVATION)]
    pieces.append(Piece("What would come of it:\n", Kind.NOTICE))
    for number in rng.permutation(len(branches)):
        branch = branches[number]
        pieces.append(Piece(f"> {separator.join(branch.actions) or 'an answer that cannot be read'}\n", Kind.NOTICE))
        pieces.append(Piece(f"{branch.observation}\n", Kind.NOTICE if branch.refused else Kind.OBSERVATION))
        if branch.over:
            pieces.append(Piece("That is the end.\n", Kind.NOTICE))
    ask = (
        f"\nYou are about to do this: {separator.join(state.actions)}. Think aloud, in one to three sentences, from "
        "what you see now to doing it: what matters, what else you could do, and why that serves you less. Nothing "
        "has been done yet: speak of what would come only as of something that you expect. Write the thought alone."
    )
    return [*pieces, Piece(ask, Kind.NOTICE)]


def reflect(
    rollout: Rollout, experience: Experience, *, shortest: int = 20, longest: int = 1000, seed: int = 0,
    on_reflection: Callable[[State, str, str], None] | None = None,
) -> tuple[dict[State, str], dict[str, float]]:  # fmt: skip
    """Let the policy write what one might think before the expert's actions.

    States without another branch than the expert's are not asked about: there is nothing to compare with.

    Returns:
        the reflections that were kept, and ``reflections/asked``, ``reflections/kept`` and ``reflections/REASON`` for
        each of :data:`TURNED_DOWN`.
    """
    asked = {state: branches for state, branches in experience.by_state().items() if len(branches) > 1}
    answers = run_coroutine(_answers(rollout, asked, seed))
    assert rollout.renderer is not None
    kept: dict[State, str] = {}
    said: set[str] = set()
    counts: Counter[str] = Counter()
    for (state, branches), answer in zip(asked.items(), answers, strict=True):
        text, reason = "", "no_room"
        if answer is not None:
            text = thought_of(rollout.protocol.without_end(answer[0]), rollout.renderer.opens_thought)
            room = rollout.all_limits[state.task.environment].max_tokens_per_turn
            reason = turned_down(text, state, branches, rollout.renderer, shortest=shortest, longest=longest)
            if answer[1] != SampleStop.END:
                reason = "cut"
            elif not reason and len(spelled(rollout.renderer, rollout.protocol, state.actions, text)) > room:
                reason = "long"
            elif not reason and _plain(text) in said:
                reason = "duplicate"
        if not reason:
            kept[state] = text
            said.add(_plain(text))
        counts[reason] += 1
        if on_reflection is not None:
            on_reflection(state, text, reason)
    figures = {"reflections/asked": float(len(asked)), "reflections/kept": float(len(kept))}
    return kept, figures | {f"reflections/{reason}": float(counts[reason]) for reason in TURNED_DOWN}


async def _answers(
    rollout: Rollout, asked: Mapping[State, Sequence[Branch]], seed: int
) -> list[tuple[str, SampleStop] | None]:
    """The text of each answer, and why it ended; None where the question leaves no room for one."""
    renderer = rollout.renderer
    assert renderer is not None

    async def one(state: State, branches: Sequence[Branch]) -> tuple[str, SampleStop] | None:
        rng = np.random.default_rng([seed, 31, stream_key(*state.key)])
        asking = question(state, branches, rollout.protocol, rng)
        prompt = renderer.first([Piece(state.rules, Kind.SYSTEM)], asking).token_ids
        room = rollout.all_limits[state.task.environment].max_tokens_per_turn
        if len(prompt) + room > rollout.engine.max_context:
            return None
        session = rollout.engine.session(stream_key(seed, "reflection", *state.key))
        session.extend(prompt)
        params = replace(rollout.sampling, max_tokens=room, stop_token_ids=renderer.stop_token_ids)
        try:
            answer = await session.sample(params)
        finally:
            session.close()
        return renderer.decode(answer.token_ids), answer.stop

    return list(await asyncio.gather(*(one(state, branches) for state, branches in asked.items())))


def thought_of(text: str, opened: bool = False) -> str:
    """The reflection in an answer: what stands behind the thought, or the thought itself of one that goes on to act.

    Args:
        text: without the tokens that end it.
        opened: whether the prompt has opened a thought already.
    """
    if not opened and not text.startswith(THINK_OPEN):
        return text.strip()
    thought, _, rest = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    rest = rest.strip()
    return (thought if not rest or rest.startswith(ANSWER_OPEN) else rest).strip()


def turned_down(
    text: str, state: State, branches: Sequence[Branch], renderer: ChatRenderer, *, shortest: int = 20,
    longest: int = 1000,
) -> str:  # fmt: skip
    """Why a reflection cannot stand as a thought before acting, one of :data:`TURNED_DOWN`; "" if it can.

    A word of :data:`LEAKS` that the rules or the present observation use is the environment's own. A line or sentence
    of what came of a branch may be quoted if it stands in the present observation too.
    """
    if any(tag in text for tag in ANSWER_TAGS) or renderer.plain(text) != text:
        return "tags"
    if not shortest <= len(text) <= longest:
        return "short" if len(text) < shortest else "long"
    now, said = _plain(state.observation), _plain(text)
    own = f"{_plain(state.rules)} {now}"
    if any(not _stands_in(_plain(found.group()), own) for found in LEAKS.finditer(text)):
        return "label"
    lines = [line for branch in branches for line in branch.observation.splitlines()]
    lines += [sentence for line in lines for sentence in re.split(r"(?<=[.!?])\s", line) if " " in sentence.strip()]
    told = {_plain(line).strip(" .,;:!?\"'") for line in lines} - {""}
    if any(_stands_in(line, said) and not _stands_in(line, now) for line in told):
        return "future"
    again = said.find(said[:shortest], 1)
    return "doubled" if again > 0 and said[:again].strip() == said[again:].strip() else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _stands_in(words: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
