"""The books of this process: what was asked of judges, and what was run in sandboxes.

Whoever uses something counts it here with :func:`count`, whatever it belongs to (a verifier, an environment, a tool,
code of a user's own), and whoever has to give an account of it opens an :class:`Account`. Processes that work for this
one send what they used along with their results, and it is counted here again. So nothing between the two has to pass
figures on, and nothing that wraps something else can lose them.

The names: ``judge/requests``, ``judge/cached``, ``judge/prompt_tokens``, ``judge/completion_tokens``, and
``judge/money`` where prices are known; the same behind ``feedback/`` for a model that plays a user; and
``sandbox/LEVEL``, the calls and programs that were run in a sandbox at this level of isolation.

The books are those of the process: two runs that work in one process at the same time each see what both use.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

SANDBOX = "sandbox/"
_ASKED = {"judge": "Judge", "feedback": "Feedback"}

_lock = threading.Lock()
_totals: dict[str, float] = {}


def count(amounts: Mapping[str, float]) -> None:
    """Count what was used. Thread-safe.

    Args:
        amounts: by name; none of them negative.
    """
    with _lock:
        for name, amount in amounts.items():
            _totals[name] = _totals.get(name, 0.0) + amount


class Account:
    """What this process has used from now on. Accounts know nothing of each other: each sees all of it."""

    def __init__(self) -> None:
        self._before = _present()

    def take(self) -> dict[str, float]:
        """What was used since the account was opened or taken last, by name; without what was not used."""
        before, self._before = self._before, _present()
        used = {name: total - before.get(name, 0.0) for name, total in self._before.items()}
        return {name: amount for name, amount in used.items() if amount}


def added(*usages: Mapping[str, float]) -> dict[str, float]:
    """The sums by name."""
    sums: dict[str, float] = {}
    for usage in usages:
        for name, amount in usage.items():
            sums[name] = sums.get(name, 0.0) + amount
    return sums


def is_usage(name: str) -> bool:
    """Whether a figure is one of usage, by its name."""
    return name.startswith(SANDBOX) or name in {f"{who}/{what}" for who in _ASKED for what in _COUNTS}


def merged(facts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Facts of several things together: of one name, all that is said of it, each once."""
    found: dict[str, dict[str, None]] = {}
    for each in facts:
        for name, told in each.items():
            found.setdefault(name, {}).update(dict.fromkeys(part for part in told.split(", ") if part))
    return {name: ", ".join(told) for name, told in found.items()}


def usage_words(usage: Mapping[str, Any], facts: Mapping[str, str] | None = None) -> dict[str, str]:
    """What was used, for people: ``{"Sandbox": "namespaces, 1,234 calls", "Judge": "12 requests, ..."}``.

    Args:
        usage: amounts by name; what is no number is left out.
        facts: what was in force, by name: it stands for what was there and never used.
    """
    known = {
        name: float(amount)
        for name, amount in usage.items()
        if isinstance(amount, int | float) and not isinstance(amount, bool)
    }
    words = {}
    calls = [f"{name.removeprefix(SANDBOX)}, {_number(amount, 'call')}"
             for name, amount in sorted(known.items()) if name.startswith(SANDBOX)]  # fmt: skip
    if calls:
        words["Sandbox"] = "; ".join(calls)
    elif facts and facts.get("sandbox"):
        words["Sandbox"] = f"{facts['sandbox']}, no call"
    for who, title in _ASKED.items():
        spent = {what: known[f"{who}/{what}"] for what in _COUNTS if f"{who}/{what}" in known}
        told = [f"{spent[what]:,.0f} {_COUNTS[what]}" for what in spent if what != "money"]
        told += [f"{spent['money']:,.4g} {_COUNTS['money']}"] if "money" in spent else []
        asked = facts.get(who, "") if facts else ""
        if told or asked:
            words[title] = ": ".join(part for part in (asked, ", ".join(told) or "never asked") if part)
    return words


_COUNTS = {
    "requests": "requests",
    "cached": "from the cache",
    "prompt_tokens": "tokens in",
    "completion_tokens": "tokens out",
    "money": "by its prices",
}


def _number(amount: float, what: str) -> str:
    return f"{amount:,.0f} {what}{'' if amount == 1 else 's'}"


def _present() -> dict[str, float]:
    with _lock:
        return dict(_totals)


def _free_in_child() -> None:
    """Another thread may have been counting as this process was forked."""
    global _lock
    _lock = threading.Lock()


with contextlib.suppress(AttributeError):
    os.register_at_fork(after_in_child=_free_in_child)
