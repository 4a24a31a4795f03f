"""What an environment may return: one rule for the harness that plays it and for the check that looks at it first."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rehearsal.texts import clean_text

TEXTS = ("task", "topic", "category", "state", "meaning", "split")
"""What is text in ``info``, where it is told."""
FLAGS = ("success", "effective", "foreseeable")
"""What is true or false in ``info``, where it is told."""
_NAMES = ("violations", "obligations")


@dataclass(frozen=True)
class Fault:
    """Something that the contract does not allow.

    Attributes:
        code: a short name of its kind, for programs.
        message: one sentence for people.
        ends: whether what was returned is of no use at all.
    """

    code: str
    message: str
    ends: bool = True


def reset_faults(where: str, returned: object) -> Iterator[Fault]:
    """What is wrong with what ``reset`` returned, worst first; ``where`` is its name in sentences."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        yield Fault("reset-type", f"{where} must return (observation, info), not {told(returned)}.")
        return
    observation, info = returned
    yield from _observation_faults("reset-type", where, observation)
    yield from _info_faults(where, info)


def step_faults(where: str, returned: object) -> Iterator[Fault]:
    """What is wrong with what ``step`` returned, worst first; ``where`` is its name in sentences."""
    if not isinstance(returned, tuple) or len(returned) != 5:
        yield Fault(
            "step-type",
            f"{where} must return (observation, reward, terminated, truncated, info), not {told(returned)}.",
        )
        return
    observation, reward, terminated, truncated, info = returned
    yield from _observation_faults("step-type", where, observation)
    if not is_number(reward):
        yield Fault("reward-type", f"{where} must return a finite number as reward, not {told(reward)}.")
    elif not math.isfinite(reward):
        message = f"{where} must return a finite number as reward, not {told(reward)}."
        yield Fault("reward-finite", message, ends=False)
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not is_flag(flag):
            yield Fault("flag-type", f"{where} must return True or False as {name}, not {told(flag)}.", ends=False)
    yield from _info_faults(where, info)


def is_number(value: object) -> bool:
    """Whether this is a real number, of Python or NumPy. True and False are none: where they stand for a reward,
    values have been mixed up more often than not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_flag(value: object) -> bool:
    """Whether this is True or False, of Python or NumPy."""
    return isinstance(value, bool | np.bool_)


def bad_text(text: str) -> str:
    """Where a string is not valid Unicode, as words for the end of a sentence; "" if it is valid."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text that is not valid Unicode ({text[error.start]!a} at character {error.start})"
    return ""


def told(value: object) -> str:
    """A value and its type, short enough for a sentence."""
    if value is None:
        return "None"
    try:
        text = clean_text(" ".join(repr(value).split()))
    except Exception:  # a broken __repr__ must not hide what is wrong
        text = "..."
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"


def _observation_faults(code: str, where: str, observation: object) -> Iterator[Fault]:
    if not isinstance(observation, str):
        yield Fault(code, f"{where} must return a string as observation, not {told(observation)}.")
    elif bad := bad_text(observation):
        yield Fault("unicode", f"{where} returned {bad} as observation; decode what it shows with errors='replace'.")


def _info_faults(where: str, info: object) -> Iterator[Fault]:
    if not isinstance(info, dict):
        yield Fault("info-type", f"{where} must return a dict as info, not {told(info)}.")
        return
    for key in TEXTS:
        value = info.get(key)
        if value is not None and not isinstance(value, str):
            yield _info_fault(where, key, f"must be a string, not {told(value)}")
        elif value is not None and (bad := bad_text(value)):
            yield Fault("unicode", f'{where} returned {bad} as info["{key}"].', ends=False)
    for key in FLAGS:
        if info.get(key) is not None and not is_flag(info[key]):
            yield _info_fault(where, key, f"must be True or False, not {told(info[key])}")
    yield from _part_faults(where, info.get("parts"))
    for key in _NAMES:
        yield from _name_faults(where, key, info.get(key))


def _part_faults(where: str, parts: Any) -> Iterator[Fault]:
    if parts is None:
        return
    if not isinstance(parts, Mapping):
        yield _info_fault(where, "parts", f"must be numbers by name, not {told(parts)}")
        return
    for name, amount in parts.items():
        if not isinstance(name, str) or bad_text(name) or not is_number(amount) or not math.isfinite(amount):
            yield _info_fault(
                where, "parts", f"must be finite numbers by name, not {told(amount)} for {told(name)}"
            )  # fmt: skip


def _name_faults(where: str, key: str, names: Any) -> Iterator[Fault]:
    if names is None:
        return
    listed = not isinstance(names, str) and isinstance(names, Collection)
    if not listed or not all(isinstance(name, str) and not bad_text(name) for name in names):
        yield _info_fault(where, key, f"must be a list of names, not {told(names)}")


def _info_fault(where: str, key: str, rest: str) -> Fault:
    return Fault("info-type", f'info["{key}"] of {where} {rest}.', ends=False)
