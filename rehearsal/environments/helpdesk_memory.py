"""A player of the help desk that remembers what it was told: what a person would do, and so the human baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rehearsal.environments.helpdesk_words import (
    ALSO,
    CHANNEL_WORDS,
    FACTS,
    GATHER,
    GIVE,
    LEAVE,
    OPENINGS,
    REACH,
    READY,
    WANT,
)
from rehearsal.environments.registry import check_names
from rehearsal.errors import RecipeError

_LONG = ("facts", "fact", "channel")
"""The fields of templates that may take several words."""


def _pattern(template: str) -> re.Pattern[str]:
    """A pattern with one named group for each field of a template."""

    def group(field: re.Match[str]) -> str:
        return f"(?P<{field[1]}>{'.+?' if field[1] in _LONG else '[A-Za-z]+'})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template)))


_OPENINGS = [_pattern(template) for template in OPENINGS]
_WANT = [_pattern(template) for templates in WANT.values() for template in templates]
_ALSO = [_pattern(template) for templates in ALSO.values() for template in templates]
_READY = _pattern(READY)


@dataclass
class Memory:
    """What a company has told so far.

    Attributes:
        always: facts that it wants in any case.
        when: facts that it wants besides, by the matter or the day that it named.
    """

    always: set[str] = field(default_factory=set)
    when: dict[str, set[str]] = field(default_factory=dict)

    def wanted(self, matter: str, day: str) -> set[str]:
        """What it would want now, as far as it has told."""
        return self.always | self.when.get(matter, set()) | self.when.get(day, set())


class RememberingOracle:
    """Plays episode after episode from the texts that an agent sees, and remembers what each company said it wants.

    For a company that it knows nothing of it gathers ``guess``; once told, it gathers what it was told, with the
    matters or days that were named. What is told later replaces what was told before, so that changed requirements are
    learned again. It never looks into the environment.

        player = RememberingOracle()
        observation, _ = env.reset(seed=seed)
        while not over:
            observation, reward, terminated, truncated, info = env.step(player.act(observation))

    Args:
        guess: what to gather for an unknown company, at most as many facts as the environment allows.

    Attributes:
        memory: what was told so far, by the company's name.

    Raises:
        RecipeError: for a guess that names something else than facts, or one of them twice.
    """

    def __init__(self, guess: Sequence[str] = ("account", "card", "pin")) -> None:
        check_names("fact", guess, FACTS)
        if len(set(guess)) < len(guess):
            raise RecipeError(f"The guess names a fact twice: {', '.join(guess)}.")
        self.guess = tuple(guess)
        self.memory: dict[str, Memory] = {}
        self._matter: dict[str, str] = {}
        self._ready: set[str] = set()
        self._plan: list[str] = []

    def act(self, observation: str) -> str:
        """The next action after an observation. The first observation of an episode begins a new one.

        Raises:
            ValueError: for an observation that no help desk gives here.
        """
        opening = _first_match(_OPENINGS, observation)
        if opening:
            self._open(opening)
        elif ready := _READY.search(observation):
            self._ready = _facts_in(ready["facts"])
        elif _first_match(_WANT, observation, whole=False):
            self._listen(observation)
        if not self._plan:
            raise ValueError(f"Nothing is left to do after {observation!r}.")
        return self._plan.pop(0)

    def _open(self, opening: re.Match[str]) -> None:
        self._matter = opening.groupdict()
        known = self.memory.get(self._matter["company"])
        wanted = set(self.guess) if known is None else known.wanted(self._matter["matter"], self._matter["day"])
        self._ready = set()
        self._plan = [GATHER[fact] for fact in FACTS if fact in wanted] + [REACH[self._channel]]

    @property
    def _channel(self) -> str:
        return next(channel for channel, shown in CHANNEL_WORDS.items() if shown == self._matter["channel"])

    def _listen(self, observation: str) -> None:
        """Remember what is wanted, and plan what is left to do."""
        also = _first_match(_ALSO, observation, whole=False)
        always = _facts_in(observation[: also.start()] if also else observation)
        now = {self._matter["matter"], self._matter["day"]}
        memory = self.memory.setdefault(self._matter["company"], Memory())
        # Conditions that are said to hold hold; one that should have been told now and was not is out of date, and a
        # company that has changed what it always wants may have changed the rest too.
        stays = {} if memory.always != always else memory.when
        memory.when = {value: facts for value, facts in stays.items() if value not in now}
        memory.always = always
        if also:
            memory.when |= {also["one"]: _facts_in(also["fact"]), also["other"]: _facts_in(also["fact"])}
        wanted = memory.wanted(self._matter["matter"], self._matter["day"])
        can = wanted <= self._ready
        self._plan = [GIVE[fact] for fact in FACTS if fact in wanted] if can else [LEAVE[self._channel]]


def _first_match(patterns: Sequence[re.Pattern[str]], text: str, whole: bool = True) -> re.Match[str] | None:
    found = (pattern.fullmatch(text) if whole else pattern.search(text) for pattern in patterns)
    return next((match for match in found if match), None)


def _facts_in(text: str) -> set[str]:
    return set(re.findall(rf"\b(?:{'|'.join(FACTS)})\b", text))
