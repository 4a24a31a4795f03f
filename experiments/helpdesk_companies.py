"""The companies of the help desk experiment, what they are tested with, and who serves them without learning: a person
who remembers what was said, and somebody who brings the same facts everywhere."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from experiments.cells import digest
from rehearsal.environments import helpdesk_words, make
from rehearsal.environments.helpdesk import company_names
from rehearsal.environments.helpdesk_memory import RememberingOracle
from rehearsal.environments.helpdesk_words import DAYS, FACTS, MATTERS
from rehearsal.generation.sampling import stream_key
from rehearsal.rollout import Task

LEAD_IN = range(0, 50)
MANY = range(75, 345)
NEW = range(400, 430)
"""Indices of companies; of ten that follow each other eight are in the training split, and only those are called."""
LOT = 50
"""Indices of one lot of phase 3."""
WORLD_OF_THE_BASE, MET = 1, 100
"""The companies that the base was trained with."""
SERVED = 0.8
"""Share of the matters of a company that have to be settled."""
TESTED = (0, 1, 2, 3, 4, 6, 8, 12, 20, 40, 60)
"""Episodes with each company after which it is tested."""
GUESSED = 3
"""Facts that somebody brings who brings the same everywhere: as many as can be gathered."""
CHANGED = {"revision": 1, "changed": 1.0}
"""What the companies of phase 4 are changed by."""


def task_of(company: int, matter: str, seed: int) -> Task:
    """A matter of a company, by a name of it and a seed."""
    return Task(stream_key(seed, "helpdesk", company, matter) % 2**31, options={"company": company})


@cache
def matters_of(company: int) -> tuple[Task, ...]:
    """The matters that a company is tested with: one of each kind, each on another day, so that what it wants for some
    matters or on some days alone is always among them."""
    env = make("helpdesk")
    found: dict[int, Task] = {}
    for number in itertools.count():
        task = task_of(company, f"test {number}", 0)
        env.reset(seed=task.seed, options=dict(task.options))
        seen = env.describe()
        kind = MATTERS.index(seen["matter"])
        if DAYS.index(seen["day"]) == (kind + company) % len(DAYS):
            found.setdefault(kind, task)
        if len(found) == len(MATTERS):
            break
    return tuple(found[kind] for kind in sorted(found))


def training_companies(indices: range) -> list[int]:
    """Those of the training split whose names the base has not met."""
    met = set(company_names(WORLD_OF_THE_BASE)[:MET])
    return [index for index in indices if index % 10 < 8 and company_names(0)[index] not in met]


def world_digest() -> str:
    """Digest of what the companies of this experiment say and want."""
    words = {name: value for name, value in vars(helpdesk_words).items() if name.isupper()}
    companies = [
        str(env.company(index))
        for env in (_env({}), _env(CHANGED))
        for span in (LEAD_IN, NEW, MANY)
        for index in training_companies(span)
    ]
    return digest([words, companies, _env({}).instructions])


def _env(params: Mapping[str, Any]) -> Any:
    return make("helpdesk", **params)


def person(companies: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """The same episodes with a person who remembers what was said: episodes until served, before and after the
    change."""
    player = RememberingOracle()
    took: list[list[int]] = []
    for env in (_env({}), _env(CHANGED)):
        took.append([])
        for company in companies:
            count = 0
            # What a test teaches is forgotten again.
            while _mean(_settled(env, copy.deepcopy(player), test) for test in matters_of(company)) < SERVED:
                _settled(env, player, task_of(company, f"person {count}", seed))
                count += 1
            took[-1].append(count)
    return took[0], took[1]


def _settled(env: Any, player: RememberingOracle, task: Task) -> bool:
    observation, info = env.reset(seed=task.seed, options=dict(task.options))
    over = False
    while not over:
        observation, _, terminated, truncated, info = env.step(player.act(observation))
        over = terminated or truncated
    return bool(info["success"])


def guessable(companies: Sequence[int], params: Mapping[str, Any]) -> set[int]:
    """The companies that the best of those serves who bring the same facts everywhere."""
    env = _env(params)
    wanted: dict[int, list[set[str]]] = {}
    for company in companies:
        for task in matters_of(company):
            env.reset(seed=task.seed, options=dict(task.options))
            wanted.setdefault(company, []).append(set(env.wanted))
    served = [
        {company for company, each in wanted.items() if _mean(one <= set(guess) for one in each) >= SERVED}
        for guess in itertools.combinations(FACTS, GUESSED)
    ]
    return max(served, key=len)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(float(value) for value in values)
