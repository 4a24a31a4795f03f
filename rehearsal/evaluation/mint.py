"""MINT's protocol: success after k turns with tools, with and without feedback from a simulated user.

Wang et al., arXiv:2309.10691 (github.com/xingyaoww/mint-bench). Every task is played once for each k = 1, 2, ... turns,
since an agent that is told that it has one turn left plays otherwise than one that has five. A turn is an answer or
calls of tools. A wrong answer may be followed by another, two in all; with one turn there is one. Success at k is
averaged over tasks, whatever their kind (the micro-average), and over those of each kind. The slope is that of the line
of least squares through success at k; the gain by feedback is success with less success without it, task by task.

Where it differs: the answer format and the tools are those of the recipe, and answers are judged by the environment
(MINT takes numbers within 5% and texts that contain the reference); the first user is computed from the episode, where
MINT asks GPT-4.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rehearsal.agents.agent import Limits
from rehearsal.agents.feedback import Feedback, JudgeFeedback, ScriptedFeedback
from rehearsal.environments.base import TextEnv
from rehearsal.environments.proposals import Proposals
from rehearsal.errors import RecipeError
from rehearsal.evaluation.categories import categories_of, share_interval, success_shares, token_figures
from rehearsal.evaluation.held_out import evaluation_figures
from rehearsal.evaluation.samples import compare, success_by_task
from rehearsal.evaluation.statistics import mean_interval
from rehearsal.generation.sampling import SamplingParams
from rehearsal.rewards.judge_client import JudgeClient
from rehearsal.rollout import Player, Task
from rehearsal.training.playing import episode_limits
from rehearsal.training.recipe import Recipe
from rehearsal.training.tasks import variants_of
from rehearsal.trajectory import Group

MOST_TURNS = 100

ByTurns = Sequence[Sequence[Group]]
"""The episodes of each task, for k = 1, 2, ... turns."""


def mint_environments(
    recipe: Recipe, turns: int = 5, proposals: int = 2
) -> tuple[list[Callable[[], TextEnv]], list[Limits]]:
    """What makes the environments of a recipe for the protocol, and the limits of their episodes.

    Environment v with k turns has the index ``v * turns + k - 1``.

    Raises:
        RecipeError: for fewer than one turn or proposal.
    """
    for name, value in (("turns", turns), ("proposals", proposals)):
        if not 1 <= value <= MOST_TURNS:
            raise RecipeError(f"{name} must be from 1 to {MOST_TURNS}, not {value}.")
    makers: list[Callable[[], TextEnv]] = []
    limits: list[Limits] = []
    for variant, usual in zip(variants_of(recipe), episode_limits(recipe), strict=True):
        with contextlib.closing(variant.make()) as env:
            one_answer = Proposals(env).one_answer
        for k in range(1, turns + 1):
            tries = min(k, proposals)
            # Of tasks that one action answers, the actions that are left are the answers that are left.
            actions = tries if one_answer else k * usual.max_actions_per_turn
            makers.append(partial(_with_proposals, variant.maker, tries))
            limits.append(replace(usual, max_turns=k, max_actions=actions))
    return makers, limits


def _with_proposals(make: Callable[[], TextEnv], proposals: int) -> TextEnv:
    return Proposals(make(), proposals)


def play_mint(
    player: Player, tasks: Sequence[Task], turns: int, *, first: int = 1, temperature: float = 0.0, samples: int = 1
) -> list[list[Group]]:
    """Play every task with k turns, for k = ``first`` to ``turns``.

    Args:
        player: with the environments of :func:`mint_environments`.
        tasks: of the recipe's own environments.
        turns: the most turns.
        first: the fewest.
        temperature: of the answers; MINT takes the likeliest token.
        samples: episodes of each task.

    Returns:
        the groups of all tasks, for each k.
    """
    counts = range(first, turns + 1)
    played = player.play(
        [replace(task, environment=task.environment * turns + k - 1) for k in counts for task in tasks],
        samples, step=-1, sampling=SamplingParams(temperature=temperature),
    )  # fmt: skip
    return [played[i * len(tasks) : (i + 1) * len(tasks)] for i in range(len(counts))]


def mint_figures(plain: ByTurns, assisted: ByTurns | None = None) -> dict[str, float]:
    """The figures of the protocol.

    Args:
        plain: the episodes without feedback.
        assisted: those with it.

    Returns:
        ``success@k`` with its 95% interval (``success@k/low``, ``/high``), ``slope``, the gain a turn, with its own;
        the same of episodes with feedback behind ``feedback/``, and for k from 2 on the gain by it,
        ``feedback/gain@k`` (``/low``, ``/high``, ``/p_value``) by :func:`rehearsal.evaluation.samples.compare`;
        ``feedback/remarks`` and ``feedback/withheld``, of an episode with all its turns; ``feedback/tokens/sampled``.
        Where there are several kinds of tasks, success and the gain of each behind ``category/NAME/``, and
        ``category/NAME/tasks``. What :func:`rehearsal.evaluation.held_out.evaluation_figures` tells of the episodes
        with all turns and without feedback comes with it, ``success`` among it.

    Raises:
        RecipeError: if the environment tells no success.
    """
    if not any(success_shares(groups) for groups in plain):
        raise RecipeError("The environment tells no success, so there is none after k turns.")
    figures = {name: value for name, value in evaluation_figures(plain[-1]).items() if not name.startswith("category/")}
    figures |= _arm(plain)
    if assisted is not None:
        figures |= {f"feedback/{name}": value for name, value in _arm(assisted).items()} | _gains(plain, assisted)
        episodes = [one for group in assisted[-1] for one in group]
        for name, counter in (("remarks", "feedback"), ("withheld", "withheld_feedback")):
            figures[f"feedback/{name}"] = sum(one.counters.get(counter, 0.0) for one in episodes) / len(episodes)
        figures["feedback/tokens/sampled"] = token_figures(assisted[-1])["tokens/sampled"]
    return figures | _of_categories(plain, assisted)


def _arm(by_turns: ByTurns) -> dict[str, float]:
    """Success at each k, and its slope."""
    figures: dict[str, float] = {}
    for k, groups in enumerate(by_turns, start=1):
        shares = success_shares(groups)
        if shares:
            mean, low, high = share_interval(shares, once=all(len(group) < 2 for group in groups))
            figures |= {f"success@{k}": mean, f"success@{k}/low": low, f"success@{k}/high": high}
    if len(by_turns) > 1:
        # The slope is linear in success, so the slope of the means is the mean of the tasks' own slopes.
        middle = (len(by_turns) + 1) / 2
        spread = sum((k - middle) ** 2 for k in range(1, len(by_turns) + 1))
        slopes = [
            sum((k - middle) * share for k, share in enumerate(shares, start=1)) / spread
            for shares in zip(*(success_by_task(groups) for groups in by_turns), strict=True)
        ]
        mean, low, high = mean_interval([slope for slope in slopes if not math.isnan(slope)])
        figures |= {"slope": mean, "slope/low": low, "slope/high": high}
    return figures


def _gains(plain: ByTurns, assisted: ByTurns) -> dict[str, float]:
    figures: dict[str, float] = {}
    for k, (without, helped) in enumerate(zip(plain, assisted, strict=True), start=1):
        if k > 1:
            found = compare(success_by_task(helped), success_by_task(without))
            lead = f"feedback/gain@{k}"
            figures |= {lead: found.difference, f"{lead}/low": found.low, f"{lead}/high": found.high}
            figures[f"{lead}/p_value"] = found.p_value
    return figures


def _of_categories(plain: ByTurns, assisted: ByTurns | None) -> dict[str, float]:
    named = categories_of(plain[0])
    figures: dict[str, float] = {}
    if len(set(named)) < 2:
        return figures

    def only(by_turns: ByTurns, name: str) -> ByTurns:
        return [[one for one, of in zip(groups, named, strict=True) if of == name] for groups in by_turns]

    for name in sorted(set(named)):
        lead = f"category/{name or 'others'}/"
        own = only(plain, name)
        found = _arm(own)
        if assisted is not None:
            helped = only(assisted, name)
            found |= {f"feedback/{key}": value for key, value in _arm(helped).items()} | _gains(own, helped)
        figures |= {lead + key: value for key, value in found.items()}
        figures[f"{lead}tasks"] = float(len(own[0]))
    return figures


def user_of(feedback: str | None, model: str | None = None, api_key_env: str | None = None) -> Feedback | None:
    """The simulated user that a name stands for.

    Args:
        feedback: "scripted", "none" (or None), or the address of a server that speaks the OpenAI chat API.
        model: the model's name there.
        api_key_env: environment variable with the server's key; none is sent if None.

    Raises:
        RecipeError: for anything else, and for an address without a model.
        RewardError: for an address or a key that cannot be used.
    """
    if feedback in (None, "none"):
        return None
    if feedback == "scripted":
        return ScriptedFeedback()
    assert feedback is not None
    if "://" not in feedback:
        raise RecipeError(
            f"Feedback comes from scripted, none, or the address of a server such as http://localhost:8000/v1, not "
            f"{feedback!r}."
        )
    if model is None:
        raise RecipeError(f"Name the model behind {feedback} that gives feedback, with --feedback-model.")
    return JudgeFeedback(JudgeClient(feedback, model, api_key_env=api_key_env))
