"""What can be wrong with learning before any reward: rules over the figures of one early experience.

The published warnings (arXiv:2510.08558 and what its released data show): an expert is imitated whether or not it is
right; a sixth of the reflections say that they were told what to do, and a quarter of those about moving tell what was
found there; what is written with the end in view is no thought that an agent could have before it acts. And from the
other stages: a world that is learnt no better on branches that were held out was memorised, and imitation may cost more
in play than it brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from rehearsal.diagnostics.rules import Rule, Thresholds
from rehearsal.diagnostics.series import Series
from rehearsal.diagnostics.verdict import Verdict, judge

_EXPERT = 0.9
"""Success of an expert that is worth imitating."""
_TOLD = 0.15
"""Share of the reflections that give away what was known: about what the published data had, of which 16% said so."""
_KEPT = 0.25
_TRIED = 0.5
"""Alternatives a state below which there is little to compare the expert's action with."""


def _expert_fails(series: Series, limits: Thresholds) -> str | None:
    success = series.last("expert/success")
    return f"The expert succeeds in {success:.0%} of its episodes." if success < _EXPERT else None


def _few_branches(series: Series, limits: Thresholds) -> str | None:
    states, found = series.last("branches/states"), series.last("branches/alternatives")
    return f"{found:.0f} other actions were found in {states:.0f} states." if found < _TRIED * states else None


def _thoughts_tell(series: Series, limits: Thresholds) -> str | None:
    asked, label, future = (series.last(f"reflections/{name}") for name in ("asked", "label", "future"))
    if not (asked and label + future >= _TOLD * asked):
        return None
    return (
        f"Of {asked:.0f} reflections {label / asked:.0%} gave away that they were told what to do, and "
        f"{future / asked:.0%} quoted what came of it."
    )


def _few_thoughts(series: Series, limits: Thresholds) -> str | None:
    asked, kept = series.last("reflections/asked"), series.last("reflections/kept")
    return f"Of {asked:.0f} reflections {kept:.0f} were kept." if kept < _KEPT * asked else None


def _no_better(series: Series, name: str, what: str) -> str | None:
    before, after = series.last(f"before/{name}"), series.last(f"after/{name}")
    return f"In held-out states {what} {after:.2f} nats, from {before:.2f}." if after >= before else None


def _world_memorised(series: Series, limits: Thresholds) -> str | None:
    return _no_better(series, "world_nats", "a token of the environment's words takes")


def _expert_memorised(series: Series, limits: Thresholds) -> str | None:
    return _no_better(series, "action_nats", "the expert's answer takes")


def _plays_worse(series: Series, limits: Thresholds) -> str | None:
    low, high = series.last("before/success_low"), series.last("after/success_high")
    if math.isnan(low) or not high < low:
        return None
    return f"Held-out success fell from {series.last('before/success'):.0%} to {series.last('after/success'):.0%}."


_at_once = partial(Rule, begins_after=1, ends_after=1)
"""There is one row of figures, so nothing can last."""

EARLY_RULES = (
    _at_once(
        "expert_fails", "The expert fails", "What it does is imitated all the same.",
        "See what its oracle() cannot do, and whether agent.max_turns, actions and max_context leave room for it.",
        "expert/success", _expert_fails,
    ),
    _at_once(
        "few_branches", "Little was tried", "There is hardly anything to compare the expert's actions with.",
        "Raise draws or the temperature of sampling, or name other actions by a proposer, such as any_legal.",
        "branches/alternatives", _few_branches,
    ),
    _at_once(
        "thoughts_tell", "Thoughts know the end",
        "Those were turned down, but a filter finds what somebody thought of: the same may stand in others in words "
        "that it does not know, and who learns them thinks what cannot be known before acting.",
        "Read some of those that were kept (on_reflection) before you go on.",
        "reflections/label", _thoughts_tell,
    ),
    _at_once(
        "few_thoughts", "Few thoughts", "Without one the expert is imitated in thinking nothing.",
        "Set empty_thoughts to False, take a model that can read the question, or do without (reflect=False).",
        "reflections/kept", _few_thoughts,
    ),
    _at_once(
        "world_memorised", "The world is no better known", "What was learnt of the branches does not carry over.",
        "Play more episodes of the expert, take one world epoch, or lower the learning rate.",
        "after/world_nats", _world_memorised,
    ),
    _at_once(
        "expert_memorised", "The expert is no better known", "What was learnt of its answers does not carry over.",
        "Play more episodes of the expert, take fewer imitation epochs, or lower the learning rate.",
        "after/action_nats", _expert_memorised,
    ),
    _at_once(
        "plays_worse", "It plays worse than before", "That is more than chance.",
        "Lower the learning rate, and look at the expert and at what happens with world_epochs=0: where policy and "
        "world model share parameters, the world may cost more than it is worth.",
        "after/success", _plays_worse,
    ),
)  # fmt: skip


def judge_early(figures: Mapping[str, float]) -> list[Verdict]:
    """What is wrong with an early experience.

    Args:
        figures: of :func:`rehearsal.training.early_experience.early_experience`.
    """
    return judge([{"step": 0, **figures}], rules=EARLY_RULES)
