"""Completions of a prescribed form: JSON that keeps a schema, text that matches a pattern."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import answer_of
from rehearsal.rewards.verifier import Score, Task, VerificationError

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class JsonSchema:
    """JSON that keeps a schema, checked by jsonschema (github.com/python-jsonschema/jsonschema).

    The answer must be JSON as a whole, or hold exactly one fenced block that is: of several blocks none is chosen.
    ``NaN`` and ``Infinity``, which Python reads, are not JSON, and neither is an object with a key twice. Formats such
    as "date" are checked. References to other documents are not followed.

    The value is 1 if the schema is kept, ``partial`` for JSON that does not keep it, 0 for anything else; parts:
    ``json`` and ``schema``.

    Attributes:
        schema: the schema; the reference of the task if None.
        partial: value of JSON that breaks the schema.

    Raises:
        RewardError: if the library is not installed.
        VerificationError: for a schema that is none or refers to other documents.
    """

    schema: Mapping[str, Any] | None = None
    partial: float = 0.0
    name: str = "json-schema"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("jsonschema") is None:
            raise RewardError("Checking JSON needs the library jsonschema: pip install 'rehearsal[json]'.")

    def warm_up(self) -> None:
        _validator("{}")

    def verify(self, completion: str, task: Task) -> Score:
        import jsonschema
        import referencing.exceptions

        schema = self.schema if self.schema is not None else task.reference
        if not isinstance(schema, Mapping | bool):
            raise VerificationError("The task has no JSON schema: its reference must be an object.")
        validator = _validator(json.dumps(schema))
        answer = answer_of(completion)
        blocks = _FENCED.findall(answer)
        try:
            value = parse_json(blocks[0] if len(blocks) == 1 else answer)
        except ValueError as problem:
            return Score(0.0, False, {"json": 0.0, "schema": 0.0}, f"not JSON: {problem}"[:300])
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except referencing.exceptions.Unresolvable as problem:
            raise VerificationError(f"The schema refers to what is not in it: {problem}.") from problem
        except RecursionError:
            return Score(self.partial, False, {"json": 1.0, "schema": 0.0}, "nested too deeply for its schema")
        except re.error as problem:
            raise VerificationError(f"A pattern in the schema is no regular expression: {problem}.") from problem
        if error is None:
            return Score(1.0, True, {"json": 1.0, "schema": 1.0}, "keeps the schema")
        told = f"{error.json_path}: {error.message}"[:300]
        return Score(self.partial, False, {"json": 1.0, "schema": 0.0}, told)


def parse_json(text: str) -> Any:
    """Read JSON as its standard has it (RFC 8259), and no key twice.

    Raises:
        ValueError: for anything else.
    """

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice in an object")
        return found

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    import jsonschema
    import referencing

    content = json.loads(schema)
    kind = jsonschema.validators.validator_for(content)
    try:
        kind.check_schema(content)
    except jsonschema.exceptions.SchemaError as problem:
        raise VerificationError(f"The JSON schema is not valid: {problem.message[:200]}.") from problem
    # An empty registry: without one the library would fetch what a schema refers to.
    return kind(content, registry=referencing.Registry(), format_checker=kind.FORMAT_CHECKER)


@dataclass(frozen=True)
class Pattern:
    """Text that matches a regular expression (Python's ``re``). Value 1 or 0.

    A pattern may take exponentially long on a text made for it; run it in a
    :class:`rehearsal.rewards.pool.VerifierPool`, which stops it.

    Attributes:
        pattern: the expression; the reference of the task if None.
        how: ``full`` (all of the text), ``search`` (anywhere in it) or ``absent`` (nowhere in it). Where there is no
            text, or nothing but white space, ``absent`` does not pass: saying nothing is no way to keep a rule about
            what is said. A completion whose thought never ends has no answer.
        where: ``answer`` (see :func:`rehearsal.rewards.answers.answer_of`) or ``completion`` (everything, with thought
            and tags, for checks of their form).
        ignore_case: whether case does not matter.

    Raises:
        RewardError: for another choice of ``how`` or ``where``, or a pattern that is no regular expression.
        VerificationError: for a reference that is none.
    """

    pattern: str | None = None
    how: Literal["full", "search", "absent"] = "full"
    where: Literal["answer", "completion"] = "answer"
    ignore_case: bool = False
    name: str = "pattern"

    def __post_init__(self) -> None:
        if self.how not in ("full", "search", "absent"):
            raise RewardError(f'how a pattern matches is "full", "search" or "absent", not {self.how!r}.')
        if self.where not in ("answer", "completion"):
            raise RewardError(f'where a pattern matches is "answer" or "completion", not {self.where!r}.')
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as problem:
                raise RewardError(f"{self.pattern!r} is no regular expression: {problem}.") from problem

    def verify(self, completion: str, task: Task) -> Score:
        pattern = self.pattern if self.pattern is not None else task.reference
        if not isinstance(pattern, str):
            raise VerificationError("The task has no pattern: its reference must be a regular expression.")
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        text = answer_of(completion) if self.where == "answer" else completion
        try:
            expression = re.compile(pattern, flags)
        except (re.error, OverflowError, RecursionError) as problem:
            raise VerificationError(f"The reference {pattern[:80]!r} is no regular expression: {problem}.") from problem
        if self.how == "absent" and not text.strip():
            return Score(0.0, False, evidence=f"there is no {self.where} for {pattern[:100]!r} to be absent from")
        found = expression.fullmatch(text) if self.how == "full" else expression.search(text)
        passed = (found is None) if self.how == "absent" else (found is not None)
        told = f"matches at {found.start()}" if found else "does not match"
        return Score(float(passed), passed, evidence=f"{pattern[:100]!r} {told}")
