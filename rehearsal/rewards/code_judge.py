"""The judge of assertions: it runs the tests of a task in a sandbox of its own, where the candidate is not.

The text of this module is sent into an interpreter of :mod:`rehearsal.sandbox`, so it uses the standard library and
:mod:`rehearsal.sandbox.inside` alone. The functions under test are replaced by stand-ins that ask the host, which calls
the candidate in another sandbox; what comes back is plain data. So the candidate sees the arguments of the calls and
nothing else: not the tests, not the expected values, not the comparison, not the counting.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rehearsal.sandbox.inside import plain

_LONGEST_SHOWN = 300
_OF_OTHER_USE = (UnicodeError, StopIteration, StopAsyncIteration)
"""Exceptions that a candidate cannot raise here: one takes more than a message, the others would end the loops of the
tests (``map``, ``zip``) before anything is compared."""
Ask = Callable[[str], str]


class CandidateError(Exception):
    """The candidate raised something that is no built-in exception, or answered with what is no plain data."""


class CandidateGone(BaseException):
    """The candidate answers no more. Tests that catch exceptions do not catch this one."""


class UnusableTest(BaseException):
    """The tests give the candidate an argument that cannot cross."""


class _Record:
    """What the assertions of a test came to; called with the number of one, it gives the context for it."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.passed: dict[int, bool] = {}
        self.first_failure = ""
        self.last_call = ""
        self.calls = 0

    def __call__(self, index: int) -> _Assertion:
        return _Assertion(self, index)


class _Assertion:
    """One assertion while it is tried. A helper function that it calls may hold others."""

    def __init__(self, record: _Record, index: int) -> None:
        self._record, self._index = record, index

    def __enter__(self) -> None:
        self._record.last_call = ""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        record, held = self._record, kind is None
        record.passed[self._index] = record.passed.get(self._index, True) and held
        if error is not None and not isinstance(error, Exception):
            return False
        if error is not None and not record.first_failure:
            why = f"{type(error).__name__}: {error}".rstrip(": ") if kind is not AssertionError else str(error)
            parts = (record.texts[self._index], record.last_call, why)
            record.first_failure = "; ".join(part for part in parts if part)
        return True


class _Marker(ast.NodeTransformer):
    """Puts each assertion that may fail into its context, so that those after it are tried as well. One whose errors
    the tests themselves catch stays as it is."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.other_ways = False
        """Whether the tests can fail by something else than a marked assertion."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.other_ways = True
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        if node.handlers:
            self.other_ways |= any(isinstance(part, ast.Assert) for body in node.body for part in ast.walk(body))
            node.handlers = [self.visit(handler) for handler in node.handlers]
            node.orelse = [self.visit(statement) for statement in node.orelse]
            node.finalbody = [self.visit(statement) for statement in node.finalbody]
            return node
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        if isinstance(node.test, ast.Constant):
            self.other_ways |= not node.test.value
            return node
        self.texts.append(_short(ast.unparse(node)))
        context = ast.Call(ast.Name("__record__", ast.Load()), [ast.Constant(len(self.texts) - 1)], [])
        return ast.copy_location(ast.With([ast.withitem(context)], [node]), node)


def judge(tests: str, given: str, names: list[str], check: bool) -> dict[str, Any]:
    """Run tests against the candidate.

    Args:
        tests: source with assertions; at the top or in a function ``check(candidate)``.
        given: source that the task itself comes with, such as helper functions; it is trusted.
        names: the functions that the candidate defines; the first is given to ``check``.
        check: whether there must be a function ``check``.

    Returns:
        ``passed`` and ``total`` (assertions), ``failure`` (the first one, in words; empty if all hold), ``unusable``
        (why the tests cannot be used; empty if they can).
    """
    import host  # a module of the interpreter

    report: dict[str, Any] = {"passed": 0, "total": 0, "failure": "", "unusable": ""}
    space: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(given, "given", "exec", dont_inherit=True), space)
        marker = _Marker()
        tree = ast.fix_missing_locations(marker.visit(ast.parse(tests)))
        calls_check = _calls(tree, "check")
        code = compile(tree, "tests", "exec", dont_inherit=True)
    except Exception as error:
        return report | {"unusable": f"{type(error).__name__}: {error}"}
    record = _Record(marker.texts)
    stands_in = {name: _stand_in(name, host.ask, record) for name in names}
    space |= stands_in
    space["__record__"] = record
    ended = True
    try:
        exec(code, space)
        if check and not callable(space.get("check")):
            return report | {"unusable": "there is no function check"}
        if callable(space.get("check")) and not calls_check:
            space["check"](stands_in[names[0]])
    except UnusableTest as error:
        return report | {"unusable": str(error)}
    except (CandidateGone, Exception) as error:
        ended = False
        gone = isinstance(error, CandidateGone)
        if not record.calls:
            return report | {"unusable": f"{type(error).__name__}: {error}"}
        words = str(error) if gone else f"the tests stopped: {type(error).__name__}: {error}"
        record.first_failure = "; ".join(part for part in (record.first_failure, record.last_call, words) if part)
    if record.passed and not record.calls:
        return report | {"unusable": f"they never call {names[0]}"}
    if ended and not record.passed and record.calls:
        if marker.other_ways or not record.texts:
            return report | {"passed": 1, "total": 1}  # they have a way of their own to fail, and came to their end
        # A loop over an empty answer, or a branch that it avoids: what is never compared is not right.
        reached = "; ".join(part for part in (record.texts[0], record.last_call, "no assertion was reached") if part)
        return report | {"total": len(record.texts), "failure": reached}
    total = len(record.passed) if ended else max(1, len(record.texts))
    return report | {"passed": sum(record.passed.values()), "total": total, "failure": record.first_failure}


def _stand_in(name: str, ask: Ask, record: _Record) -> Callable[..., Any]:
    def stand_in(*arguments: Any, **named: Any) -> Any:
        try:
            coded = plain.encode((list(arguments), named))
        except plain.PlainError as error:
            raise UnusableTest(f"{name} is called with {error}") from None
        shown = _short(f"{name}({', '.join(map(_shown, arguments))})")
        record.calls += 1
        record.last_call = f"called {shown}"
        answer = json.loads(ask(json.dumps({"function": name, "arguments": coded})))
        if "gone" in answer:
            raise CandidateGone(answer["gone"])
        if "raised" in answer:
            kind = getattr(builtins, answer["raised"], CandidateError)
            usable = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _OF_OTHER_USE)
            record.last_call = _short(f"{shown} raised {answer['raised']}: {answer['said']}")
            raise (kind if usable else CandidateError)(answer["said"])
        if "unusable" in answer:
            record.last_call = f"{shown} gave {answer['unusable']}"
            raise CandidateError(f"it gave {answer['unusable']}, and only plain data can be compared")
        result, left = plain.decode(answer["result"]), plain.decode(answer["arguments"])
        for mine, its in zip((*arguments, *named.values()), left):  # noqa: B905 - Python 3.9 has no strict
            _update(mine, its)
        record.last_call = f"{shown} gave {_short(_shown(result))}"
        return result

    return stand_in


def _update(mine: Any, its: Any) -> None:
    """Arguments that the candidate changed are changed for the tests too. What was inside them is not: whether it was
    changed or moved cannot be told."""
    if type(mine) is not type(its):
        return
    if isinstance(mine, (list, bytearray)):
        mine[:] = its
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(its)


def _calls(tree: ast.AST, name: str) -> bool:
    """Whether source calls a function of a name somewhere."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == name for call in calls)


def free_names(tests: str) -> list[str]:
    """Names that tests use and neither define nor find among the built-in ones, in order of appearance.

    Raises:
        SyntaxError: for what is not Python.
    """
    tree = ast.parse(tests)
    bound = set(dir(builtins)) | _bound(tree)
    used = {node.id: None for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return [name for name in used if name not in bound]


def defined_names(source: str) -> set[str]:
    """Names that source gives a meaning: not those of functions that have a docstring and nothing else, as the function
    that a prompt asks for.

    Raises:
        SyntaxError: for what is not Python.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not _is_stub(node)]
    return _bound(tree)


def _bound(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return names


def _is_stub(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and all(
        isinstance(part, ast.Pass) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in node.body
    )


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no whole numbers of more than 4300 digits
        return "a number too long to show"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
