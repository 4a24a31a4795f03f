"""Code against tests, in a way that the code cannot forge.

Three forms of tests, told apart by the task's ``reference``:

- a text: HumanEval's form, source with a function ``check(candidate)``; ``data["entry_point"]`` names the function;
- a list of texts: MBPP's form, one assertion each; ``data["test_setup_code"]`` or ``data["test_imports"]`` may hold
  source that they need;
- a list of pairs (input, output), or of mappings with these keys: a program that reads standard input and writes
  standard output.

Assertions belong to the same program as what they check, by nature, and whoever shares a process with them can make
them pass: by leaving with ``os._exit(0)``, by an ``__eq__`` that always says yes, by patched built-in functions, by
reading the tests. So here they do not share one. The candidate runs in one sandbox and is only ever asked to call a
function with plain arguments; the tests run in another one (:mod:`rehearsal.rewards.code_judge`) and see plain values.
A program's output is compared on the host. Helper functions that stand in the prompt are taken from the prompt and not
from the candidate, which could have defined them anew.

What remains possible: a candidate that knows the answers by heart (from its training data, or from examples in the
prompt), and one that answers by the arguments or the number of calls. No sandbox can tell these from a solution; tests
that the model has not seen can. What cannot be tested: functions that take or give other things than plain data
(numbers, texts, bytes, lists, tuples, sets, dictionaries, iterators over these), such as functions or objects of own
classes.

Outputs are compared line by line: white space at the end of lines and empty lines at the end do not count, everything
else does, the number of lines included. The program must end with status 0.
"""

from __future__ import annotations

import ast
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from rehearsal.errors import RewardError, SandboxError
from rehearsal.parsing import ALONE, parse_python
from rehearsal.rewards import code_judge
from rehearsal.rewards.answers import ANSWER
from rehearsal.rewards.code_judge import defined_names, free_names
from rehearsal.rewards.verifier import Score, Task, VerificationError
from rehearsal.sandbox import (
    CallResult,
    Interpreter,
    InterpreterPool,
    Isolation,
    Limits,
    Outcome,
    ProgramResult,
    ProgramRunner,
    RemoteSandbox,
    require,
    service_at,
)
from rehearsal.sandbox.inside import plain
from rehearsal.usage import merged

_JUDGE = Path(code_judge.__file__).read_text(encoding="utf-8")
_SECONDS_OF_THE_JUDGE = 5.0
"""The judge's own work, beyond the candidate's time."""
_WELL = (Outcome.FINISHED, Outcome.OUTPUT)
_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_LONGEST_EVIDENCE = 1000
_PROGRAMS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)

_TRIES, _PAUSE = 3, 0.2
"""How often a check is begun whose sandbox was ended from outside, and seconds between: its processes do not all end in
the same moment."""

Result = TypeVar("Result", CallResult, ProgramResult)


class _Gone(Exception):
    """The sandbox was ended from outside: the code has no score yet."""


class CodeVerifier:
    """Runs code against the tests of its task; see the module's text. Thread-safe. Close it after use.

    Args:
        limits: of a candidate: ``seconds`` for all assertions of a task together, or for each input of a program.
        together: seconds for all inputs of a program together; those that it does not come to count as failed. Three
            times ``limits.seconds`` if None.
        isolation: the level of the sandbox, or its name; the strongest one there is if None.
        partial: the value is the share of tests that pass. Otherwise it is 1 if all do, and else 0; inputs behind the
            first one that fails are then not run, so the score has no part ``tests``, the share that passed.
        concurrent: how many completions are checked at one time.
        packages: folders of packages that code may import, beside the standard library.
        python: the Python to run inside; this one if None.
        programs: what runs programs in place of the own sandbox. A :class:`rehearsal.sandbox.RemoteSandbox` checks
            assertions too, the code in one of its interpreters and the tests in another one; for anything else they are
            checked here.
        url: of a service, for which a :class:`rehearsal.sandbox.RemoteSandbox` is made and closed.
        api_key_env: name of the environment variable with the service's key, which is sent as a bearer token.

    Raises:
        RewardError, SandboxError: for both a url and ``programs``, for options of the own sandbox beside a service, for
            a URL that is none, and for a key that is not set or has no service.
        SandboxError: at the first use, if the level is not to be had.
    """

    name = "code"
    runs_in = "thread"

    def __init__(
        self, *, limits: Limits | None = None, together: float | None = None,
        isolation: Isolation | str | None = None, partial: bool = False, concurrent: int = 4,
        packages: Sequence[str | PathLike[str]] = (), python: str | None = None,
        programs: ProgramRunner | None = None, url: str | None = None, api_key_env: str | None = None,
    ) -> None:  # fmt: skip
        if url is not None and programs is not None:
            raise RewardError("The url names a service that runs programs, so nothing else can run them.")
        self.limits = limits or Limits()
        self.together = 3 * self.limits.seconds if together is None else float(together)
        if not 0 < self.together < float("inf"):
            raise RewardError(f"together, the seconds for all inputs of a program, must be above 0, not {together}.")
        self.partial = partial
        self._options: dict[str, Any] = {"isolation": isolation, "packages": packages, "python": python}
        self._made = service_at(url, api_key_env, limits=self.limits, **self._options)
        self._programs = programs or self._made
        self._service = self._programs if isinstance(self._programs, RemoteSandbox) else None
        if self._service is not None and any(self._options.values()):
            raise RewardError("Isolation, packages and python are of the own sandbox, and a service takes its place.")
        self._concurrent = concurrent
        # Each check needs two interpreters: whoever has one must be sure of the other.
        self._turns = threading.BoundedSemaphore(concurrent)
        self._lock = threading.Lock()
        self._pool: InterpreterPool | None = None

    def warm_up(self) -> None:
        """Start the sandbox, where it is on this machine."""
        if self._service is None:
            self._sandbox()

    @property
    def isolation(self) -> Isolation | str:
        """The level in force, or ``remote`` for a service."""
        return self._sandbox().isolation if self._service is None else self._service.isolation

    def facts(self) -> dict[str, str]:
        """The level of isolation of the sandbox, found without starting it; ``remote`` for a service. Where something
        else runs programs, its level too, and alone where this machine has no sandbox and none is asked for.

        Raises:
            SandboxError: if the level is not to be had.
        """
        if self._service is not None:
            return {"sandbox": self._service.isolation}
        try:
            own = require(self._options["isolation"], self._options["python"]).value
        except SandboxError:
            if self._programs is None or self._options["isolation"] is not None:
                raise
            own = ""
        elsewhere = getattr(self._programs, "isolation", "") if self._programs is not None else ""
        return merged([{"sandbox": own}, {"sandbox": str(getattr(elsewhere, "value", elsewhere))}])

    def verify(self, completion: str, task: Task) -> Score:
        """Check the code of a completion.

        Args:
            completion: with the code in its last fenced block of Python, or code as a whole. It may define the function
                anew or continue the prompt.
            task: see the module's text. ``data["code_prompt"]`` is the code that the completion continues, where the
                prompt says more than that.

        Raises:
            VerificationError: if the tests cannot be used, or the sandbox is gone.
        """
        code = extract_code(completion)
        with self._turns:
            for tries_left in reversed(range(_TRIES)):
                try:
                    return self._checked(code, task)
                except _Gone as error:  # whoever ended it, it was not the code
                    if not tries_left:
                        why = f" ({error})" if str(error) else ""
                        raise VerificationError(
                            f"The sandbox was ended from outside, {_TRIES} times, as it checked the code{why}."
                        ) from error
                    time.sleep(_PAUSE)
                except SandboxError as error:
                    raise VerificationError(f"The sandbox could not check the code: {error}") from error
        raise AssertionError("unreachable: the last try returns or raises")

    def close(self) -> None:
        """End the sandbox."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None
        if self._made is not None:
            self._made.close()

    def __enter__(self) -> CodeVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sandbox(self) -> InterpreterPool:
        with self._lock:
            if self._pool is None:
                self._pool = InterpreterPool(2 * self._concurrent, limits=self.limits, **self._options)
            return self._pool

    def _interpreter(self) -> AbstractContextManager[Interpreter]:
        if self._service is not None:
            return self._service.interpreter(limits=self.limits)
        return self._sandbox().interpreter()

    def _checked(self, code: str, task: Task) -> Score:
        if isinstance(task.reference, str):
            return self._functions(code, task, task.reference, check=True)
        if isinstance(task.reference, Sequence) and task.reference:
            if all(isinstance(test, str) for test in task.reference):
                return self._functions(code, task, "\n".join(task.reference), check=False)
            return self._program(code, [_pair(test) for test in task.reference])
        raise VerificationError("The tests of a task are a text, a list of assertions or a list of inputs and outputs.")

    # --- assertions ---------------------------------------------------------------------------------------------------

    def _functions(self, code: str, task: Task, tests: str, *, check: bool) -> Score:
        prompt = str(task.data.get("code_prompt", task.prompt))
        code_given = prompt if _is_code(prompt) else ""
        given = code_given
        for key in ("test_setup_code", "test_imports"):
            extra = task.data.get(key) or ""
            given += "\n" + (extra if isinstance(extra, str) else "\n".join(extra))
        names = self._names(task, tests, given, check)
        with self._interpreter() as candidate:
            _there(candidate.run("__name__ = 'solution'"))
            if code_given:
                asked = _there(candidate.run(code_given))
                if asked.outcome not in _WELL:
                    raise VerificationError(f"The code of the prompt does not run: {asked.error}")
            loaded = _there(candidate.run(_whole(code, code_given, names[0])))
            if loaded.outcome not in _WELL:
                evidence = f"No test was run. The code does not run: {loaded.error}"
                return Score(0.0, False, {"tests": 0.0}, evidence[:_LONGEST_EVIDENCE])
            with self._interpreter() as judge:
                return self._judged(candidate, judge, [tests, given, names, check])

    def _names(self, task: Task, tests: str, given: str, check: bool) -> list[str]:
        """The functions that are the candidate's, the one under test first."""
        try:
            with ALONE:
                free = [name for name in free_names(tests) if name not in defined_names(given)]
        except SyntaxError as error:
            raise VerificationError(f"The tests are no Python: {error}.") from error
        entry = task.data.get("entry_point")
        if check and not isinstance(entry, str):
            raise VerificationError('A task with a function check names the one under test as data["entry_point"].')
        names = list(dict.fromkeys([*([str(entry)] if entry else []), *free]))
        if not names:
            raise VerificationError("The assertions call no function of the completion.")
        return names

    def _judged(self, candidate: Interpreter, judge: Interpreter, arguments: list[Any]) -> Score:
        deadline = time.monotonic() + self.limits.seconds
        gone: list[str] = []
        asked = 0

        def answer(question: str) -> str:
            nonlocal asked
            asked += 1
            # A service makes all calls so far again with each, so there the limit of each is that of all together.
            left = deadline - time.monotonic() if self._service is None else self.limits.seconds
            if left <= 0 and not gone:
                gone.append(f"its time of {self.limits.seconds:g} seconds was over")
            if not gone:
                reply = _called(candidate, json.loads(question), left)
                if "gone" not in reply:
                    return json.dumps(reply)
                gone.append(reply["gone"])
            return json.dumps({"gone": gone[0]})

        _there(judge.run(_JUDGE))
        seconds = self.limits.seconds + _SECONDS_OF_THE_JUDGE
        said = _there(judge.call("judge", arguments, seconds=seconds, answer=answer))
        report = (said.value or {}).get("result")
        if report is None:
            why = (said.value or {}).get("error") or said.error or said.outcome.value
            if asked == 0:
                raise VerificationError(f"The tests did not come to an end: {why}.")
            return self._score(0, 1, f"The tests did not come to an end with what the code gave: {why}")
        if report["unusable"]:
            raise VerificationError(f"The tests cannot be used: {report['unusable']}.")
        if report["total"] == 0:
            raise VerificationError("The tests assert nothing.")
        failure = report["failure"] or (gone[0] if gone else "")
        return self._score(report["passed"], report["total"], failure and f"First failing: {failure}", bool(gone))

    # --- programs -----------------------------------------------------------------------------------------------------

    def _program(self, code: str, pairs: Sequence[tuple[str, str]]) -> Score:
        passed, failure = 0, ""
        runner = self._programs or self._sandbox()
        # Code that hangs on every input would otherwise hold up all the checks behind it.
        deadline = time.monotonic() + self.together
        for number, (given, wanted) in enumerate(pairs, 1):
            seconds = min(self.limits.seconds, deadline - time.monotonic())
            if seconds <= 0:
                over = f"The {self.together:g} seconds for all inputs were over after {number - 1} of {len(pairs)}."
                return self._score(passed, len(pairs), f"{over} {failure}".rstrip())
            result = _there(runner.run_program(code, stdin=given, limits=replace(self.limits, seconds=seconds)))
            said = _complaint(result.outcome, result.stderr) or _difference(result.stdout, wanted)
            if not said:
                passed += 1
            elif not failure:
                failure = f"First failing: input {number} of {len(pairs)}, {_short(given)!r}: {said}"
                if not self.partial and number < len(pairs):
                    told = f"{passed} of the first {number} tests passed, and the other {len(pairs) - number} were not"
                    return Score(0.0, False, {}, f"{told} run. {failure[:_LONGEST_EVIDENCE]}")
        return self._score(passed, len(pairs), failure)

    def _score(self, passed: int, total: int, failure: str, gone: bool = False) -> Score:
        all_pass = passed == total and not gone and not failure
        share = passed / total
        evidence = f"{passed} of {total} tests passed. {failure[:_LONGEST_EVIDENCE]}".rstrip()
        return Score(share if self.partial else float(all_pass), all_pass, {"tests": share}, evidence)


def extract_code(completion: str) -> str:
    """The code of a completion: its last fenced block of Python, or else the last without a language, or else all.

    What a model thought first (up to ``</think>``, or all of it where the thought never ends) does not count, and where
    there is an ``<answer>…</answer>`` only the last of them does. A block that never ends goes on to the end.
    """
    text = completion.rpartition("</think>")[2]
    before = text.partition("```")[0]
    if "<think>" in before:
        text = before.partition("<think>")[0]
    text = (ANSWER.findall(text) or [text])[-1]
    blocks = [(match[1].lower(), match[2]) for match in _FENCED.finditer(text)]
    for languages in (("python", "py", "python3"), ("",)):
        found = [block for language, block in blocks if language in languages]
        if found:
            return found[-1]
    return text


def same_output(output: str, wanted: str) -> bool:
    """Whether outputs are the same but for white space at the end of lines and empty lines at the end."""
    return _lines(output) == _lines(wanted)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _difference(output: str, wanted: str) -> str:
    if same_output(output, wanted):
        return ""
    mine, its = _lines(output), _lines(wanted)
    place = next((i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its)))
    shown = [_short(repr(lines[place])) if place < len(lines) else "no such line" for lines in (mine, its)]
    return f"line {place + 1} is {shown[0]} and should be {shown[1]}."


def _complaint(outcome: Outcome, errors: str) -> str:
    if outcome is Outcome.FINISHED:
        return ""
    last = (errors.strip().splitlines() or [""])[-1]
    return " ".join(part for part in (f"the program ended with {outcome.value}.", _short(last)) if part)


def _there(result: Result) -> Result:
    if result.outcome is Outcome.GONE:
        # A service tells why; an interpreter that is gone has nothing to say.
        raise _Gone(_short(result.stderr) if isinstance(result, ProgramResult) else "")
    return result


def _called(candidate: Interpreter, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What the candidate says to one call, in coded plain values."""
    positional, named = plain.decode(question["arguments"])
    result = _there(candidate.call(question["function"], positional, named, seconds=seconds))
    if result.outcome not in _WELL or result.value is None:
        if result.outcome is Outcome.RAISED and result.error is not None:  # there is no such function
            kind, _, said = result.error.splitlines()[-1].partition(": ")
            return {"raised": kind, "said": said}
        return {"gone": result.error or "it gave no answer"}
    if "result" not in result.value:
        return result.value
    return {key: plain.encode(result.value[key]) for key in ("result", "arguments")}


def _whole(code: str, prompt: str, entry: str) -> str:
    """The candidate's program, which runs where the code of the prompt has run, for its imports and helper functions.
    Code that is complete by itself stands alone, so that it may begin with ``from __future__ import``; code that is not
    continues the prompt."""
    if not prompt:
        return code
    name = re.escape(entry)
    if _parses(code) is not None and re.search(rf"^(?:async )?(?:def|class) {name}\b|^{name}\s*=", code, re.MULTILINE):
        return code
    return prompt + code


def _parses(source: str) -> ast.Module | None:
    try:
        return parse_python(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_code(prompt: str) -> bool:
    """Whether a prompt is a program. Some plain English can be parsed as one: "palindrome", "Hint: recursion"."""
    tree = _parses(prompt)
    return tree is not None and any(isinstance(node, _PROGRAMS) for node in tree.body)


def _pair(test: Any) -> tuple[str, str]:
    if isinstance(test, Mapping) and {"input", "output"} <= test.keys():
        return str(test["input"]), str(test["output"])
    if isinstance(test, Sequence) and not isinstance(test, str) and len(test) == 2:
        return str(test[0]), str(test[1])
    raise VerificationError("A test of a program is a pair of input and output, or a mapping with these keys.")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
