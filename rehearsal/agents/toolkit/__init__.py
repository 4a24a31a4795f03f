"""Tools by name: those that come along, those that a user registers, and any ``package.module:name``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rehearsal.agents.toolbox import FunctionTools, ToolSource
from rehearsal.agents.tools import Tool
from rehearsal.errors import RehearsalError, ToolError
from rehearsal.naming import hint, import_named

Target = type[ToolSource] | Tool | Callable[..., Any]

_registered: dict[str, str | Target] = {
    "calculator": "rehearsal.agents.toolkit.calculator:Calculator",
    "mcp": "rehearsal.agents.toolkit.mcp:Mcp",
    "notebook": "rehearsal.agents.toolkit.notebook:Notebook",
    "python": "rehearsal.agents.toolkit.python:Python",
    "search": "rehearsal.agents.toolkit.search:Search",
}


def tool_names() -> list[str]:
    """The names that :func:`make_source` knows, sorted."""
    return sorted(_registered)


def register_tool(name: str, target: str | Target) -> None:
    """Give tools a name for recipes.

    Args:
        name: without a colon, not in use yet.
        target: a function with types and a docstring, a :class:`~rehearsal.agents.tools.Tool`, a class derived from
            :class:`~rehearsal.agents.toolbox.ToolSource`, or "package.module:name" of one of them.

    Raises:
        ToolError: for a name that is in use or not usable, or something else than a tool.
    """
    if not name or ":" in name or name != name.strip():
        raise ToolError(f"{name!r} cannot name a tool: a name is not empty, has no colon and no outer spaces.")
    if name in _registered:
        raise ToolError(f"There is a tool named {name!r} already; choose another name.")
    if not isinstance(target, str):
        _check(name, target)
    _registered[name] = target


def make_source(name: str, options: Mapping[str, Any] | None = None) -> ToolSource:
    """What makes the tools of a name.

    Args:
        name: one of :func:`tool_names`, or "package.module:name"; modules in the present folder are found too.
        options: arguments of a source's class; functions take none.

    Raises:
        ToolError: for an unknown name or option, an import that fails, or values that the source refuses.
    """
    target = _target(name)
    made = _check(name, import_named(target, "tool", ToolError)) if isinstance(target, str) else target
    options = dict(options or {})
    if not (isinstance(made, type) and issubclass(made, ToolSource)):
        if options:
            raise ToolError(f"The tool {name} is a function and has no options such as {next(iter(options))}.")
        return FunctionTools(made)
    parameters = inspect.signature(made).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ToolError(f"There is no option of the tool {name} called {option!r}; {hint(option, known)}")
    for parameter in parameters:
        if parameter.name in known and parameter.default is parameter.empty and parameter.name not in options:
            raise ToolError(f"The tool {name} needs the option {parameter.name}; give it a value.")
    try:
        return made(**options)
    except RehearsalError:
        raise
    except Exception as problem:
        raise ToolError(f"The tool {name} could not be made: {type(problem).__name__}: {problem}") from problem


def tool_path(name: str) -> str | None:
    """What :func:`make_source` takes for the same tools in another process; None where another could not find them,
    such as a function of the script that runs.

    Raises:
        ToolError: for an unknown name.
    """
    target = _target(name)
    if not isinstance(target, str):
        target = f"{getattr(target, '__module__', '__main__')}:{getattr(target, '__qualname__', '<object>')}"
    return None if target.startswith("__main__:") or "<" in target else target


def source_name(name: str) -> str:
    """What tools are called in every process of a run, whatever name they were registered by.

    Raises:
        ToolError: for an unknown name.
    """
    return tool_path(name) or name


def _target(name: str) -> str | Target:
    if ":" in name:
        return name
    if name not in _registered:
        raise ToolError(f"There is no tool {name!r}; {hint(name, tool_names())}")
    return _registered[name]


def _check(name: str, target: Any) -> Target:
    is_source = isinstance(target, type) and issubclass(target, ToolSource)
    if not is_source and not isinstance(target, Tool) and (isinstance(target, type) or not callable(target)):
        raise ToolError(
            f"{name} stands for {target!r}, which is no tool; give a function with types and a docstring, a Tool, or a "
            "class derived from ToolSource."
        )
    kept: Target = target
    return kept
