"""Tools: functions that an agent may call by name, with arguments as JSON.

    def weather(city: str, days: int = 1) -> str:
        '''The forecast for a city.

        Args:
            city: its name.
            days: how many, from today.
        '''

    tool = tool_from(weather)

What the function is called, what it takes and what it is for are read off it: the agent is told the name, the types as
a JSON schema and the docstring. Arguments are checked and converted before the function sees them.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError

from rehearsal.environments.tooling import ToolFailure
from rehearsal.errors import ToolError
from rehearsal.texts import clean_text

__all__ = ["ArgumentError", "Tool", "ToolFailure", "as_tool", "patience", "result_text",
           "tool_from"]  # fmt: skip

patience: ContextVar[float | None] = ContextVar("patience", default=None)
"""Within a call that is not fast: after how many seconds it is left behind. A tool that waits for something else should
give up soon after, because its thread is there until it does; None where nobody keeps the time."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*")
_PARAMETERS = ("Args", "Arguments", "Parameters")
_PARAMETER = re.compile(r"\*{0,2}(\w+)(?:\s*\([^)]*\))?:\s*(.*)")
_MAX_PROBLEMS = 3
_MAX_QUOTED = 60


class ArgumentError(ValueError):
    """Arguments that a tool does not take; the message says which and why."""


@dataclass(frozen=True)
class Tool:
    """One tool of an agent.

    Attributes:
        name: letters, digits, ``_``, ``.`` and ``-``, up to 64 characters.
        description: what it is for, in a sentence or two.
        parameters: a JSON schema of type "object".
        run: does it, with checked arguments by name. What it returns is shown as text: strings as they are, None as
            nothing, other values as JSON where they have such a form. What it raises becomes an error for the agent.
        check: the arguments as the agent wrote them to those that ``run`` takes; raises :class:`ArgumentError`.
        fast: whether a call takes well under a millisecond, never blocks and never hangs. Such a tool is called in
            line; any other in a thread with a time limit.
        timeout: seconds that a call may take; None for what the limits of the episode say.
        cost: what a call takes off the reward; None for what the limits of the episode say.
        close: called once, when the episode is over; must not block.

    Raises:
        ToolError: for a name that cannot be used.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], Any]
    check: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    fast: bool = False
    timeout: float | None = None
    cost: float | None = None
    close: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ToolError(
                f"{self.name!r} cannot name a tool: use up to 64 letters, digits, '_', '.' and '-', a letter first."
            )

    @property
    def schema(self) -> dict[str, Any]:
        """What the agent is told of it, in the form that chat templates and servers take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @property
    def signature(self) -> str:
        """How it is called, on a line: ``search(query: string, limit: integer = 5)``."""
        properties = self.parameters.get("properties", {})
        required = self.parameters.get("required", ())
        shown = []
        for name, schema in properties.items():
            text = f"{name}: {_type_of(schema)}"
            if name not in required:
                known = isinstance(schema, Mapping) and "default" in schema
                text += f" = {json.dumps(schema['default'])}" if known else ", optional"
            shown.append(text)
        return f"{self.name}({', '.join(shown)})"


def tool_from(
    function: Callable[..., Any], *, name: str | None = None, description: str | None = None, fast: bool = False,
    timeout: float | None = None, cost: float | None = None,
) -> Tool:  # fmt: skip
    """A tool from a function with types and a docstring.

    Types may be str, int, float, bool, list, dict, ``Literal``, ``X | None``, enums, dataclasses and whatever else
    pydantic knows. Arguments are converted where nothing is lost by it ("3" and 3.0 to the integer 3, 42 to the string
    "42"). The docstring is read in Google's style.

    Args:
        function: may be a bound method, a partial, or a coroutine function.
        name: the tool's; the function's own if None.
        description: the tool's; the docstring's beginning if None.
        fast, timeout, cost: see :class:`Tool`.

    Raises:
        ToolError: for a function without a docstring, with parameters that have no type or are not fixed in number.
    """
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    name = str(name or getattr(inner, "__name__", type(inner).__name__))
    text, told = _docstring(inner)
    description = text if description is None else description
    if not description:
        raise ToolError(f"The tool {name} has no docstring, so nobody would know what it is for; write one.")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(inner if inspect.isroutine(inner) else inner.__call__, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise ToolError(f"The types of the tool {name} cannot be found out: {error}.") from error
    fields: dict[str, Any] = {}
    places: dict[str, str] = {}
    positional: set[str] = set()
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolError(f"The tool {name} takes any number of arguments (*{parameter.name}); name each of them.")
        if parameter.name not in hints:
            raise ToolError(f"The parameter {parameter.name} of the tool {name} has no type; write one.")
        if parameter.kind == parameter.POSITIONAL_ONLY:
            positional.add(parameter.name)
        # An alias, since a field of a pydantic model may not have any name, and a parameter may.
        place = f"field_{len(fields)}"
        places[place] = parameter.name
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[place] = (
            hints[parameter.name], Field(default, alias=parameter.name, description=told.get(parameter.name)),
        )  # fmt: skip
    model = _model(name, fields)

    def check(arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            checked = model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ArgumentError(_problems(error)) from error
        # Only what was given: the function knows its own defaults best.
        return {parameter: getattr(checked, place) for place, parameter in places.items()
                if place in checked.model_fields_set}  # fmt: skip

    def run(arguments: Mapping[str, Any]) -> Any:
        first = [value for parameter, value in arguments.items() if parameter in positional]
        rest = {parameter: value for parameter, value in arguments.items() if parameter not in positional}
        value = function(*first, **rest)
        return asyncio.run(_awaited(value, patience.get())) if inspect.isawaitable(value) else value

    return Tool(name, description, _schema_of(model), run, check, fast, timeout, cost)


def as_tool(thing: Any, *, fast: bool = False) -> Tool:
    """A tool as it is, or a tool from a function.

    Raises:
        ToolError: for anything else.
    """
    if isinstance(thing, Tool):
        return thing
    if not callable(thing) or isinstance(thing, type):
        raise ToolError(f"{thing!r} is no tool; give a function with types and a docstring, or a Tool.")
    return tool_from(thing, fast=fast)


def result_text(value: Any) -> str:
    """What a tool returned, as text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):
            value = str(value)
    return clean_text(value)


async def _awaited(value: Any, seconds: float | None) -> Any:
    # A little longer than anybody waits, so that it is the caller who tells that it took too long.
    return await asyncio.wait_for(value, None if seconds is None else seconds + 1.0)


def _docstring(function: Any) -> tuple[str, dict[str, str]]:
    """The beginning of a docstring, up to its first section, on a line; and what it says of each parameter."""
    # inspect.getdoc would give a callable object the docstring of its class, and that of a class's parent.
    written = inspect.getdoc(function) if inspect.isroutine(function) else type(function).__doc__
    before: list[str] = []
    told: dict[str, str] = {}
    section, name, margin = "", "", 0
    for line in inspect.cleandoc(written or "").splitlines():
        if header := _SECTION.fullmatch(line):
            section, name, margin = header[1], "", 0
        elif not section:
            before.append(line)
        elif section in _PARAMETERS and line.strip():
            indent = len(line) - len(line.lstrip())
            margin = margin or indent
            found = _PARAMETER.fullmatch(line.strip())
            if found and indent <= margin:
                name, told[found[1]] = found[1], found[2]
            elif name:
                told[name] = f"{told[name]} {line.strip()}".strip()
    return " ".join(" ".join(before).split()), {name: text for name, text in told.items() if text}


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, protected_namespaces=())
    try:
        made: type[BaseModel] = create_model("Arguments", __config__=config, **fields)
        return made
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError) as error:
        told = " ".join(str(error).split())[:200]
        raise ToolError(f"The types of the tool {name} cannot be told as JSON: {told}") from error


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    with warnings.catch_warnings():
        # Of a default that JSON cannot hold; it is left out of the schema, and the function knows it.
        warnings.simplefilter("ignore")
        schema = model.model_json_schema()
    plain: dict[str, Any] = _plain(schema)
    return {"type": "object", "properties": {}, **{k: v for k, v in plain.items() if k != "additionalProperties"}}


def _plain(schema: Any, names: bool = False) -> Any:
    """A schema without the titles that pydantic adds, and without None where it only stands for "left out"."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _plain(value, key in ("properties", "$defs"))
        for key, value in schema.items()
        if names or key != "title"
    }  # fmt: skip
    if not names and "default" in kept and kept["default"] is None and "anyOf" in kept:
        others = [option for option in kept["anyOf"] if option != {"type": "null"}]
        if len(others) == 1 and len(others) < len(kept["anyOf"]):
            kept = {**others[0], **{key: value for key, value in kept.items() if key not in ("anyOf", "default")}}
    return kept


def _type_of(schema: Any) -> str:
    if not isinstance(schema, Mapping):  # "true" is a schema too, of anything
        return "any"
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "anyOf" in schema:
        return " | ".join(_type_of(option) for option in schema["anyOf"])
    kind = schema.get("type", "any")
    return " | ".join(kind) if isinstance(kind, list) else str(kind)


def _problems(error: ValidationError) -> str:
    told = []
    problems = error.errors(include_url=False, include_context=False)
    for problem in problems[:_MAX_PROBLEMS]:
        name = ".".join(str(part) for part in problem["loc"])[:_MAX_QUOTED]
        if problem["type"] == "missing":
            told.append(f"{name} is missing")
        elif problem["type"] == "extra_forbidden":
            told.append(f"there is no argument {name}")
        else:
            message = problem["msg"]
            told.append(f"{name} cannot be {_quoted(problem['input'])}: {message[0].lower()}{message[1:]}")
    more = len(problems) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _quoted(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
