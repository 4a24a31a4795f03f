"""Predictions inside a thought, and what became of them.

In the rehearse protocol an agent writes, before it acts, what it expects the environment to answer to one or several
actions that it thinks of:

    <think>A call first needs facts. <predict>call
    Clerk: I need the pin code.</predict> So ask pin.</think><answer>ask pin</answer>

The first line of a prediction names the actions, the rest is the expected answer. After the episode each prediction
whose actions were taken gets the true answer as its target (:func:`hindsight`): the world model learns to foretell at
the very place where the policy looks, and a single failure is enough to change the next plan. A prediction whose
actions were not taken has no target: nobody knows what would have come.

T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from rehearsal.models.chat import ChatRenderer
from rehearsal.trajectory import Prediction, StopReason, Trajectory

PREDICT_OPEN, PREDICT_CLOSE = "<predict>", "</predict>"

_SPEAKER = re.compile(r"\s*([^\W\d_][\w' -]{0,30}):\s")


@dataclass(frozen=True, eq=False)
class Hindsight:
    """A situation in which an answer was foretold, and what the answer was.

    Attributes:
        token_ids: int32 of shape (T,): the context up to the prediction, the actions, the true answer, and the end of
            the prediction.
        first: where the answer begins; everything from there on is to be learnt.
        topic: what the episode was about, for a memory that keeps a bit of everything.
        environment: where it was.
        foretold: whether the prediction said just this.
        meaning: of the answer, whatever its words; "" where they are not told apart.
        speaker: who gives it, see :func:`speaker_of`.
    """

    token_ids: np.ndarray
    first: int
    topic: str
    environment: str
    foretold: bool
    meaning: str = ""
    speaker: str = ""


def find_predictions(
    sampled_ids: Sequence[int] | np.ndarray, decode: Callable[[Sequence[int]], str], *, separator: str | None = "||",
    end: str = "</think>", open_id: int | None = None,
) -> list[Prediction]:  # fmt: skip
    """The predictions of an answer, in order; those without a first line that names an action are left out.

    One that was cut off counts with what it has: its action may have been taken all the same.

    Args:
        sampled_ids: ids of one answer.
        decode: ids to text, special tokens included.
        separator: what stands between several actions; None where there is one, whatever it holds.
        end: nothing behind this text is looked at.
        open_id: the id of ``<predict>`` where it is one token; found faster.

    Returns:
        positions are counted from the beginning of ``sampled_ids``.
    """
    ids = [int(index) for index in sampled_ids]
    text = decode(ids)
    _, *bodies = text.partition(end)[0].split(PREDICT_OPEN)
    found: list[Prediction] = []
    places = [at + 1 for at, index in enumerate(ids) if index == open_id] if open_id is not None else []
    if len(places) != text.count(PREDICT_OPEN):
        places = []  # the tag is spelled in other tokens too, so that the n-th token is not the n-th tag
    for number, body in enumerate(bodies, 1):
        head, line, rest = body.partition(PREDICT_CLOSE)[0].partition("\n")
        parts = [head] if separator is None else head.split(separator)
        actions = tuple(part.strip() for part in parts if part.strip())
        if not line or not actions:
            continue
        position = places[number - 1] if places else _place(ids, decode, number, (PREDICT_OPEN,))
        closed = _place(ids[position:], decode, 1, (PREDICT_CLOSE, end))
        found.append(Prediction(actions, rest.strip(), position, position + closed))
    return found


def _place(ids: list[int], decode: Callable[[Sequence[int]], str], number: int, marks: Sequence[str]) -> int:
    """How many tokens it takes until one of these marks stands there for the ``number``-th time; all of them if none
    ever does."""
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        text = decode(ids[:middle])
        if any(text.count(mark) >= number for mark in marks):
            high = middle
        else:
            low = middle
    return high


def hindsight(
    trajectory: Trajectory, renderer: ChatRenderer, *, separator: str = "||", horizon: int = 0
) -> list[Hindsight]:
    """The true answers to what an episode's predictions were about.

    Args:
        trajectory: of one segment; of one that failed, what was answered before it did counts too.
        renderer: of the model that played it.
        separator: what stands between several actions.
        horizon: turns after its own in which the actions of a prediction may be taken; 0 where an answer depends on
            the state of the moment. A help desk says the same whenever it is called, so there it may be the episode.

    Returns:
        in the order in which the predictions were made.
    """
    if len(trajectory.segments) != 1:
        return []
    context = trajectory.segments[0].token_ids
    close = renderer.encode(PREDICT_CLOSE)
    found: list[Hindsight] = []
    for number, turn in enumerate(trajectory.turns):
        for prediction in turn.predictions:
            taken = _taken(trajectory, number, prediction, horizon)
            answer = None if taken is None else answer_to(trajectory, taken)
            if taken is None or answer is None:
                continue
            done = trajectory.turns[taken].executed
            actions = f" {separator} ".join([*done, *prediction.actions[len(done) :]])
            head = np.concatenate([context[: prediction.position], renderer.encode(f"{actions}\n")])
            told = np.concatenate([renderer.encode(renderer.plain(answer)), close])
            found.append(
                Hindsight(
                    np.concatenate([head, told]).astype(np.int32), len(head), trajectory.topic or trajectory.task,
                    trajectory.environment, _plain(prediction.text) == _plain(answer),
                    trajectory.turns[taken].meaning, speaker_of(answer),
                )
            )  # fmt: skip
    return found


def _taken(trajectory: Trajectory, number: int, prediction: Prediction, horizon: int) -> int | None:
    """The first turn, from its own on, in which the actions of a prediction were taken, and no others. Of those behind
    the one that ended the episode nothing more could have come.

    An action goes by the words that the answer of that turn had for it, by those of the environment, which may call it
    something else, and by any others that the environment took for it in that state.
    """
    wanted = [_plain(action) for action in prediction.actions]
    over = trajectory.stop_reason in (StopReason.TERMINATED, StopReason.TRUNCATED)
    for later in range(number, min(number + horizon + 1, len(trajectory.turns))):
        turn = trajectory.turns[later]
        done = [
            {_plain(action) for action in (done, written, *aliases)}
            for done, written, aliases in zip_longest(turn.executed, turn.actions, turn.aliases, fillvalue="")
        ]
        del done[len(turn.executed) :]  # written, and not executed
        ended = over and later == len(trajectory.turns) - 1
        compared = wanted[: len(done)] if ended else wanted
        if done and len(done) == len(compared) and all(one in names for one, names in zip(compared, done, strict=True)):
            return later
    return None


def answer_to(trajectory: Trajectory, number: int) -> str | None:
    """What the environment said after a turn; None where it never answered."""
    if number + 1 < len(trajectory.turns):
        return trajectory.turns[number + 1].observation
    return None if trajectory.failed else trajectory.final_observation


def speaker_of(answer: str) -> str:
    """Who gives an answer that begins with a name and a colon, such as "Clerk: We need the pin."; "" otherwise."""
    found = _SPEAKER.match(answer)
    return found[1] if found else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
