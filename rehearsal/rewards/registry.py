"""Verifiers by name, so that a recipe can name one: built-in ones, a user's own, and any ``package.module:Class``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rehearsal.errors import RehearsalError, RewardError
from rehearsal.naming import hint, import_named
from rehearsal.rewards.verifier import Verifier

Factory = Callable[..., Verifier]

_registered: dict[str, str | Factory] = {
    "math": "rehearsal.rewards.mathematics:Mathematics",
    "last-number": "rehearsal.rewards.mathematics:LastNumber",
    "question": "rehearsal.rewards.questions:Question",
    "code": "rehearsal.rewards.registry:code_tests",
    "instructions": "rehearsal.rewards.instructions:InstructionFollowing",
    "json-schema": "rehearsal.rewards.structure:JsonSchema",
    "pattern": "rehearsal.rewards.structure:Pattern",
    "rubric": "rehearsal.rewards.registry:rubric_judge",
    "pair": "rehearsal.rewards.registry:pair_judge",
    "reward-model": "rehearsal.rewards.reward_model:RewardModel",
}

_CLIENT_OPTIONS = ("base_url", "model", "api_key_env", "timeout", "max_retries", "backoff", "cache", "prices", "extra")


def verifiers() -> list[str]:
    """The names that :func:`verifier` knows, sorted."""
    return sorted(_registered)


def register_verifier(name: str, factory: str | Factory) -> None:
    """Give a verifier a name for :func:`verifier`.

    Args:
        name: without a colon, not in use yet.
        factory: its class, a function that makes one, or "package.module:Class".

    Raises:
        RewardError: for a name that is in use or not usable.
    """
    if not name or ":" in name or name != name.strip():
        raise RewardError(f"{name!r} cannot name a verifier: a name is not empty, has no colon and no outer spaces.")
    if name in _registered:
        raise RewardError(f"There is a verifier named {name!r} already; choose another name.")
    _registered[name] = factory


def verifier(name: str, /, **options: Any) -> Verifier:
    """Make a verifier.

    Args:
        name: one of :func:`verifiers`, or "package.module:Class" for one of your own.
        **options: passed to its class.

    Raises:
        RewardError: for an unknown name or option, a library that is not installed, or a value that the class refuses.
    """
    factory = _factory(name)
    known, takes_any = _options(factory)
    if name in ("rubric", "pair"):
        known, takes_any = [*known, *_CLIENT_OPTIONS], False
    for option in options:
        if option not in known and not takes_any:
            raise RewardError(f"The verifier {name} has no option {option!r}; {hint(option, known)}")
    try:
        made: object = factory(**options)
    except RehearsalError:
        raise
    except Exception as problem:
        raise RewardError(f"The verifier {name} could not be made: {type(problem).__name__}: {problem}") from problem
    if not isinstance(made, Verifier):
        raise RewardError(
            f"{name} made a {type(made).__name__}, which is no verifier: it needs a name and a method verify."
        )
    return made


def rubric_judge(criteria: Any = None, threshold: float = 0.5, **client: Any) -> Verifier:
    """A :class:`rehearsal.rewards.judge.RubricJudge`, from the options of its client."""
    from rehearsal.rewards.judge import RubricJudge
    from rehearsal.rewards.judge_client import JudgeClient

    return RubricJudge(JudgeClient(**client), criteria, threshold=threshold)


def pair_judge(question: str = "Which response does the task better?", **client: Any) -> Verifier:
    """A :class:`rehearsal.rewards.judge.PairJudge`, from the options of its client."""
    from rehearsal.rewards.judge import PairJudge
    from rehearsal.rewards.judge_client import JudgeClient

    return PairJudge(JudgeClient(**client), question)


def code_tests(
    partial: bool = False, isolation: str | None = None, seconds: float = 10.0, memory_mib: int = 512,
    concurrent: int = 4, packages: Sequence[str] = (), url: str | None = None, api_key_env: str | None = None,
    together: float | None = None,
) -> Verifier:  # fmt: skip
    """A :class:`rehearsal.rewards.code.CodeVerifier`, from options of plain values."""
    from rehearsal.rewards.code import CodeVerifier
    from rehearsal.sandbox import Limits

    limits = Limits(seconds=seconds, memory_bytes=memory_mib << 20)
    return CodeVerifier(
        limits=limits, isolation=isolation, partial=partial, concurrent=concurrent, packages=packages, url=url,
        api_key_env=api_key_env, together=together,
    )  # fmt: skip


def _factory(name: str) -> Factory:
    target: str | Factory = name
    if ":" not in name:
        if name not in _registered:
            raise RewardError(f"There is no verifier {name!r}; {hint(name, verifiers())}")
        target = _registered[name]
    if not isinstance(target, str):
        return target
    found = import_named(target, "verifier", RewardError)
    if not callable(found):
        raise RewardError(f"{name} is neither a class nor a function that makes a verifier.")
    made: Factory = found
    return made


def _options(factory: Factory) -> tuple[list[str], bool]:
    """The names that a class or function takes, and whether it takes any others."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of something not written in Python
        return [], True
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
