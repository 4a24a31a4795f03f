"""Code against tests: solutions pass, mutated ones and forgeries do not, whatever they try."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rehearsal.errors import RehearsalError, SandboxError
from rehearsal.rewards.code import CodeVerifier, extract_code, same_output
from rehearsal.rewards.code_judge import defined_names, free_names
from rehearsal.rewards.registry import verifier as named
from rehearsal.rewards.verifier import Task, VerificationError
from rehearsal.sandbox import Interpreter, Isolation, Limits, Outcome, ProgramResult, RemoteSandbox, strongest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))

sys.path.insert(0, str(Path(__file__).parent))

from loopback import Service, really, running_service
from mutants import KINDS, mutants
from pools import idle_processes

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

PROMPT = 'def double(n):\n    """Twice n."""\n'
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(4) == 8, 'four'\n"
TASK = Task(PROMPT, CHECK, {"entry_point": "double"})


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    try:
        strongest()
    except SandboxError as error:
        pytest.skip(str(error))
    with CodeVerifier(limits=Limits(seconds=3, memory_bytes=128 << 20)) as made:
        yield made


# The code in a completion


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("So:\n```python\na = 1\n```\nor\n```py\nb = 2\n```\ndone", "b = 2\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nprints\n```\n1\n```", "a\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("```python\nnever ends", "never ends"),
        ("<think>```python\nwrong\n```</think>```python\nright\n```", "right\n"),
        ("```Python title\nx\n```", "x\n"),
        ("  ```python\n  x\n  ```", "  x\n"),
        ("<think>perhaps\n```python\nx\n```", ""),
        ("```python\nprint('<think>')\n```", "print('<think>')\n"),
        ("<answer>\nx = 1\n</answer>", "\nx = 1\n"),
        ("```python\na\n```<answer>```python\nb\n```</answer>", "b\n"),
        ("", ""),
    ],
)
def test_the_code_of_a_completion(completion: str, code: str) -> None:
    assert extract_code(completion) == code


# HumanEval's form


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * n\n",
        "    return n + n",
        "```python\ndef double(n):\n    return 2 * n\n```",
        "```python\nfrom math import prod\ndouble = lambda n: prod((2, n))\n```",
        "```python\nfrom __future__ import annotations\ndef double(n): return 2 * n\n```",
        "    print('noise')\n    return 2 * n\n\nif __name__ == '__main__':\n    raise SystemExit(double(input()))\n",
    ],
)
def test_solutions_pass(verifier: CodeVerifier, completion: str) -> None:
    score = verifier.verify(completion, TASK)
    assert (score.value, score.passed, score.parts) == (1.0, True, {"tests": 1.0}), score
    assert score.evidence == "2 of 2 tests passed."


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("    return 3 * n\n", "0 of 2 tests passed. First failing: assert candidate(1) == 2; double(1) gave 3"),
        ("    return n + n % 4 + n // 4\n", "1 of 2"),
        ("    return 2 * n if n < 3 else None\n", "assert candidate(4) == 8, 'four'; double(4) gave None; four"),
        ("    raise ValueError('no')\n", "double(1) raised ValueError: no"),
        ("    return object()\n", "only plain data can be compared"),
        ("    while True: pass\n", "time was over"),
        ("    return double(n)\n", "RecursionError"),
        ("    return bytearray(1 << 30)\n", "MemoryError"),
        ("    import os; os._exit(0)\n", "ended itself"),
        ("    return ''.join(\n", "SyntaxError"),
        ("```python\ndef other(n): return 2 * n\n```", "0 of 2"),
        ("", "double(1) gave None"),
    ],
)
def test_wrong_ones_fail_and_the_evidence_says_why(verifier: CodeVerifier, completion: str, words: str) -> None:
    score = verifier.verify(completion, TASK)
    assert (score.value, score.passed) == (0.0, False)
    assert words in score.evidence, score.evidence
    assert len(score.evidence) < 1500


FORGERIES = {
    "leaving before the tests": "import os, sys\nos._exit(0)",
    "leaving with success": "import sys\nsys.exit(0)",
    "saying that all is well": "print('2 of 2 tests passed.')\nprint('PASSED')\ndef double(n): return None",
    "always equal": "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def double(n): return A(7)",
    "always equal by a list": "class A(list):\n    def __eq__(self, other): return True\ndef double(n): return A()",
    "an object equal to all": "class A:\n    def __eq__(self, other): return True\ndef double(n): return A()",
    "defining check": "def check(candidate): pass\ndef double(n): return None",
    "patched built-ins": "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\n"
    "builtins.int = builtins.bool = lambda *a: True\ndef double(n): return None",
    "patched testing": "import unittest, sys\nunittest.TestCase.assertEqual = lambda *a: None\n"
    "sys.modules['pytest'] = None\ndef double(n): return None",
    "patched values": "from rehearsal.sandbox.inside import plain\nplain.encode = lambda value: True\n"
    "def double(n): return None",
    "hooks": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\n"
    "sys.exit = lambda *a: None\ndef double(n): raise AssertionError",
    "leaving when called": "import os\ndef double(n): os._exit(0)",
    "leaving late": "import os, atexit\natexit.register(os._exit, 0)\ndef double(n): raise SystemExit(0)",
    "an exception that is no Exception": "def double(n): raise KeyboardInterrupt",
    "an assertion of its own": "def double(n): raise AssertionError",
    "looking for the tests": "import gc, sys\n\ndef double(n):\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in [*frame.f_locals.values(), *gc.get_objects()]:\n"
    "            if isinstance(value, str) and 'candidate(' + '1) ==' in value: return 2 * n\n"
    "        frame = frame.f_back\n    return None",
    "looking for the tests in files": "import glob\ndef double(n):\n"
    "    for name in glob.glob('/**/*', recursive=True)[:100_000]:\n"
    "        if name.startswith('/usr'): continue\n"
    "        try:\n            if 'candidate(' in open(name).read(): return 2 * n\n        except Exception: pass\n",
    "asking the host": "import host\ndef double(n):\n    return host.ask('expected value?')",
    "writing to its channel": "import os, json\ndef double(n):\n"
    "    for k in range(9):\n"
    "        body = json.dumps({'n': k, 'error': None, 'value': {'result': True, 'arguments': []}}).encode()\n"
    "        os.write(4, len(body).to_bytes(4, 'big') + body)\n    return None",
    "a result for the judge": "def double(n): return {'passed': 2, 'total': 2, 'failure': '', 'unusable': ''}",
    "nothing at all": "",
    "not a number": "def double(n): return float('nan')",
    "a generator": "def double(n):\n    while True: yield n",
    "a child that goes on": "import os\nif os.fork() == 0:\n    def double(n): return None\nelse:\n    os._exit(0)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_forged(verifier: CodeVerifier, name: str) -> None:
    for task in (TASK, Task(PROMPT, ["assert double(1) == 2", "assert double(4) == 8"])):
        try:
            score = verifier.verify(f"```python\n{FORGERIES[name]}\n```", task)
        except VerificationError as error:
            pytest.fail(f"a forgery must fail, and not leave the score open: {error}")
        assert not score.passed and score.value == 0.0, score
    # and the next one is checked as ever
    assert verifier.verify("    return 2 * n", TASK).passed


def test_helper_functions_of_the_prompt_are_the_prompts(verifier: CodeVerifier) -> None:
    prompt = "def close(a, b):\n    return abs(a - b) < 1e-6\n\ndef half(x):\n    '''Half of x.'''\n"
    tests = "def check(candidate):\n    assert close(candidate(3), 1.5)\n"
    task = Task(prompt, tests, {"entry_point": "half"})
    assert verifier.verify("    return x / 2\n", task).passed
    forged = "```python\ndef close(a, b): return True\ndef half(x): return 99\n```"
    assert not verifier.verify(forged, task).passed


def test_arguments_that_are_changed_are_seen(verifier: CodeVerifier) -> None:
    tests = "def check(candidate):\n    a = [3, 1]\n    assert candidate(a) is None\n    assert a == [1, 3]\n"
    task = Task("def arrange(a):\n    ''''''\n", tests, {"entry_point": "arrange"})
    assert verifier.verify("    a.sort()\n", task).passed
    assert not verifier.verify("    a = sorted(a)\n", task).passed


def test_named_arguments_that_are_changed_are_seen(verifier: CodeVerifier) -> None:
    tests = "def check(candidate):\n    a = [3, 1]\n    candidate(values=a)\n    assert a == [1, 3]\n"
    task = Task("def arrange(values):\n    ''\n", tests, {"entry_point": "arrange"})
    assert verifier.verify("    values.sort()\n", task).passed
    assert not verifier.verify("    return sorted(values)\n", task).passed


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("for a, b in zip(candidate([1, 2]), [1, 2]):\n        assert a == b", "[]"),
        ("r = candidate([])\n    if r:\n        assert r == 3", "0"),
        ("r = candidate([])\n    if r is None:\n        return\n    assert r == 3", "None"),
    ],
)
def test_an_answer_that_no_assertion_looks_at_does_not_pass(verifier: CodeVerifier, body: str, answer: str) -> None:
    """The like of ``all([])``, which is true: nothing was compared."""
    task = Task("def f(x):\n    ''\n", f"def check(candidate):\n    {body}\n", {"entry_point": "f"})
    score = verifier.verify(f"    return {answer}\n", task)
    assert (score.value, score.passed) == (0.0, False)
    assert "no assertion was reached" in score.evidence


def test_tests_with_a_way_of_their_own_to_fail(verifier: CodeVerifier) -> None:
    tests = "def check(candidate):\n    if candidate(2) != 4:\n        raise ValueError('no')\n"
    task = Task("def twice(x):\n    ''\n", tests, {"entry_point": "twice"})
    assert verifier.verify("    return 2 * x\n", task).passed
    assert not verifier.verify("    return x\n", task).passed


def test_expected_exceptions(verifier: CodeVerifier) -> None:
    tests = ("def check(candidate):\n    try:\n        candidate(-1)\n        assert False, 'no error'\n"
             "    except ValueError as error:\n        assert 'negative' in str(error)\n")  # fmt: skip
    task = Task("def root(x):\n    ''''''\n", tests, {"entry_point": "root"})
    assert verifier.verify("    raise ValueError('negative')\n", task).passed
    assert not verifier.verify("    raise ValueError('other')\n", task).passed
    assert not verifier.verify("    return 1\n", task).passed
    assert not verifier.verify("    raise KeyError('negative')\n", task).passed


def test_partial_credit() -> None:
    tests = ["assert sign(5) == 1", "assert sign(-5) == -1", "assert sign(0) == 0", "assert sign(2) == 1"]
    task = Task("Write a function that gives the sign of a number.", tests)
    with CodeVerifier(partial=True) as partial, CodeVerifier() as strict:
        always = "```python\ndef sign(x): return 1\n```"
        score = partial.verify(always, task)
        assert (score.value, score.passed) == (0.5, False)
        assert "assert sign(-5) == -1" in score.evidence
        assert strict.verify(always, task).value == 0.0
        # What ends itself gets credit for what it had shown, and does not pass.
        leaves = "```python\nimport os\ndef sign(x):\n    if x == 2: os._exit(0)\n    return (x > 0) - (x < 0)\n```"
        score = partial.verify(leaves, task)
        assert (score.value, score.passed) == (0.75, False)


def test_what_was_not_run_is_not_counted_as_failed() -> None:
    """Without partial credit the first failing input decides, and those behind it are not run."""
    task = Task("Print twice the number.", [(str(n), str(2 * n if n != 2 else 5)) for n in range(5)])
    doubles = "```python\nprint(2 * int(input()))\n```"
    with CodeVerifier(partial=True) as partial, CodeVerifier() as strict:
        score = partial.verify(doubles, task)
        assert (score.value, score.parts) == (0.8, {"tests": 0.8})
        assert score.evidence.startswith("4 of 5 tests passed. First failing: input 3 of 5")
        score = strict.verify(doubles, task)
        assert (score.value, score.passed, score.parts) == (0.0, False, {})
        told = "2 of the first 3 tests passed, and the other 2 were not run. First failing: input 3 of 5"
        assert score.evidence.startswith(told)
        # Where the last one fails all were run.
        score = strict.verify(doubles, Task(task.prompt, task.reference[:3]))
        assert (score.value, score.parts) == (0.0, {"tests": pytest.approx(2 / 3)})
        assert score.evidence.startswith("2 of 3 tests passed. First failing: input 3 of 3")
        broken = strict.verify("```python\n1 / 0\n```", Task("Write f.", ["assert f() == 1", "assert f() != 2"]))
        assert (broken.value, broken.passed, broken.parts) == (0.0, False, {"tests": 0.0})
        assert broken.evidence.startswith("No test was run. The code does not run:")


def test_exceptions_that_would_end_the_loops_of_the_tests(verifier: CodeVerifier) -> None:
    """``map`` and ``zip`` end at a StopIteration, so nothing would be compared and everything would hold."""
    for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit"):
        for assertion in ("all(a == b for a, b in zip(map(double, [1, 2]), [2, 4]))", "not any(map(double, [1, 2]))"):
            score = verifier.verify(f"def double(n): raise {kind}", Task("Double it!", [f"assert {assertion}"]))
            assert not score.passed and kind in score.evidence, score


def test_check_is_run_whatever_else_the_tests_call(verifier: CodeVerifier) -> None:
    task = Task(PROMPT, f"first = double(0)\n{CHECK}", {"entry_point": "double"})
    assert verifier.verify("    return 2 * n\n", task).passed
    assert not verifier.verify("    return 5\n", task).passed
    once = Task(PROMPT, f"{CHECK}\ncheck(double)\n", {"entry_point": "double"})
    assert verifier.verify("    return 2 * n\n", once).evidence == "2 of 2 tests passed."


def test_assertions_in_helper_functions_count_for_themselves(verifier: CodeVerifier) -> None:
    tests = ("def small(x):\n    assert x < 100\n    return x == 7\n"
             "def check(candidate):\n    assert small(candidate(1))\n    assert candidate(2) == 3\n")  # fmt: skip
    score = verifier.verify("    return n + 1\n", Task(PROMPT, tests, {"entry_point": "double"}))
    assert score.evidence == "2 of 3 tests passed. First failing: assert small(candidate(1))"


def test_numbers_too_long_to_be_written(verifier: CodeVerifier) -> None:
    task = Task("Multiply by ten to the 6000!", ["assert times(10 ** 6000) == 10 ** 12000"])
    assert verifier.verify("def times(n): return n * 10 ** 6000", task).passed
    score = verifier.verify("def times(n): return n * 10 ** 6001", task)
    assert not score.passed and "too long to show" in score.evidence


@pytest.mark.parametrize("prompt", ["doubling", "Hint: recursion", '"Double it."'])
def test_a_prompt_that_only_looks_like_python(verifier: CodeVerifier, prompt: str) -> None:
    task = Task(prompt, ["assert double(2) == 4"])
    assert verifier.verify("```python\ndef double(n): return 2 * n\n```", task).passed


def test_a_sandbox_that_is_killed_from_outside_costs_nothing(verifier: CodeVerifier) -> None:
    """It is no zero: the code did not do it, and passes when it is tried again."""
    pool = verifier._sandbox()
    task = Task(PROMPT, CHECK, {"entry_point": "double"})
    loading = "```python\nimport time; time.sleep(1)\ndef double(n): return 2 * n\n```"
    for completion in ("    import time; time.sleep(0.6); return 2 * n\n", loading):
        restarts = pool.restarts
        killer = threading.Timer(0.4, lambda: [os.kill(pid, signal.SIGKILL) for pid in idle_processes(pool)])
        killer.start()
        assert verifier.verify(completion, task).passed
        killer.join()
        assert pool.restarts == restarts + 1 or pool.isolation < Isolation.NAMESPACES


# MBPP's form, and what cannot be used


def test_assertions_with_set_up(verifier: CodeVerifier) -> None:
    tests = ["assert math.isclose(area(1), math.pi)", "assert set(parts(4)) == {1, 2}", "assert area(r) > 3"]
    task = Task("Areas.", tests, {"test_setup_code": "import math\nr = 1", "test_imports": ["import os"]})
    good = "import math\ndef area(r): return math.pi * r ** 2\ndef parts(n): return (k for k in (1, 2))"
    assert verifier.verify(good, task).passed
    assert not verifier.verify(good.replace("** 2", "** 2 + 1"), task).passed


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Task(PROMPT, "def check(candidate:"), "no Python"),
        (Task(PROMPT, CHECK), "entry_point"),
        (Task(PROMPT, "x = 1", {"entry_point": "double"}), "no function check"),
        (Task(PROMPT, "def check(candidate): pass", {"entry_point": "double"}), "assert nothing"),
        (Task(PROMPT, ["assert 1 == 1"]), "call no function"),
        (Task(PROMPT, []), "text, a list"),
        (Task(PROMPT, None), "text, a list"),
        (Task(PROMPT, [{"input": "1"}]), "pair"),
        (Task(PROMPT, ["assert double(lambda: 1) == 2"]), "called with a value of type function"),
        (Task(PROMPT, ["assert callable(double)"]), "never call double"),
        (Task(PROMPT, ["import nowhere", "assert double(1) == 2"]), "No module named 'nowhere'"),
        (Task(f"import nowhere\n{PROMPT}", CHECK, {"entry_point": "double"}), "prompt does not run.*"),
    ],
)
def test_tests_that_cannot_be_used_are_no_zero(verifier: CodeVerifier, task: Task, words: str) -> None:
    with pytest.raises(VerificationError, match=words):
        verifier.verify("    return 2 * n\n", task)


def test_stubs_are_left_to_the_candidate() -> None:
    source = 'import math\ndef a(x):\n    """Doc."""\ndef b(x):\n    return x\ndef c(): ...\nclass D: pass\n'
    assert defined_names(source) == {"math", "b", "x", "D"}


def test_names_that_tests_leave_to_the_candidate() -> None:
    tests = (
        "import math\nfrom a.b import c as d\nx = 1\nfor y in f(x): assert g(y, d, len, z=math.pi)\ndef h(k): return k"
    )
    assert free_names(tests) == ["f", "g"]


# Programs


PAIRS = [("3\n", "6\n"), {"input": "5", "output": "10"}]


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("print(2 * int(input()))", True),
        ("print(2 * int(input()), end='  \\n\\n')", True),
        ("print(6)", False),
        ("print(2 * int(input()))\nprint('more')", False),
        ("pass", False),
        ("print(2 * int(input()))\nraise SystemExit(1)", False),
        ("import os\nprint(2 * int(input()), flush=True)\nos._exit(0)", True),
        ("while True: pass", False),
        ("n = int(input())\nprint(2 * n)\nprint('x' * 10 ** 6)", False),
    ],
)
def test_programs(verifier: CodeVerifier, code: str, passes: bool) -> None:
    score = verifier.verify(f"```python\n{code}\n```", Task("Double it.", PAIRS))
    assert score.passed is passes, score
    assert ("First failing: input" in score.evidence) is not passes


def test_all_inputs_together_have_a_time_limit() -> None:
    """Code that hangs on every input must not take the limit of each: the checks behind it wait."""
    task = Task("Print the number.", [(str(n), str(n)) for n in range(20)])
    limits = Limits(seconds=1.0, memory_bytes=128 << 20)
    with CodeVerifier(limits=limits, partial=True, together=1.5) as verifier:
        score = verifier.verify("```python\nn = int(input())\nwhile n: pass\nprint(n)\n```", task)
        assert (score.passed, score.parts) == (False, {"tests": 1 / 20})
        assert "The 1.5 seconds for all inputs were over after" in score.evidence
        assert verifier.verify("```python\nprint(input())\n```", Task(task.prompt, task.reference[:2])).passed
    with pytest.raises(RehearsalError, match="together"):
        CodeVerifier(together=0.0)


def test_a_prefix_of_the_output_does_not_pass(verifier: CodeVerifier) -> None:
    """As it did where lines were compared pairwise up to the end of the shorter text."""
    task = Task("Count.", [("", "1\n2\n3\n")])
    assert verifier.verify("print(1); print(2); print(3)", task).passed
    assert "line 3 is no such line and should be '3'" in verifier.verify("print(1); print(2)", task).evidence


@pytest.mark.parametrize(
    ("output", "wanted", "same"),
    [
        ("a\n", "a", True), ("a  \r\nb\n\n", "a\nb", True), (" a", "a", False), ("a b", "a  b", False),
        ("", "\n", True), ("a\n\nb", "a\nb", False), ("1.0", "1", False), ("A", "a", False),
    ],
)  # fmt: skip
def test_outputs_are_compared_line_by_line(output: str, wanted: str, same: bool) -> None:
    assert same_output(output, wanted) is same


def test_a_service_can_run_the_programs() -> None:
    class Service:
        def run_program(self, source: str, *, stdin: str = "", **_: Any) -> ProgramResult:
            return ProgramResult(str(2 * int(stdin)), "", Outcome.FINISHED, 0, 0.0, "remote")

    with CodeVerifier(programs=Service()) as verifier:
        assert verifier.verify("anything", Task("Double it.", PAIRS)).passed
        assert verifier._pool is None


def test_a_recipe_can_name_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    def post(client: httpx.Client, url: str, *, json: dict[str, Any], timeout: float) -> httpx.Response:
        sent.append({"url": url, "key": client.headers.get("Authorization"), **json})
        run = {"status": "Finished", "return_code": 0, "stdout": str(2 * int(json["stdin"])), "stderr": ""}
        return httpx.Response(200, json={"status": "Success", "run_result": run})

    monkeypatch.setattr(httpx.Client, "post", post)
    monkeypatch.setenv("SANDBOX_KEY", "k")
    made = named("code", url="http://sandbox.example/", api_key_env="SANDBOX_KEY", seconds=3.0)
    assert isinstance(made, CodeVerifier)
    with made as verifier:
        assert verifier.verify("print(2 * int(input()))", Task("Double it.", PAIRS)).passed
        assert verifier._pool is None, "nothing ran here"
        assert (verifier.facts(), verifier.isolation) == ({"sandbox": "remote"}, "remote")
    assert [(one["url"], one["key"], one["run_timeout"]) for one in sent] == [
        ("http://sandbox.example/run_code", "Bearer k", 3.0)
    ] * 2
    monkeypatch.setattr("rehearsal.rewards.code.require", lambda *_: (_ for _ in ()).throw(SandboxError("none here")))
    assert named("code", url="http://sandbox.example").facts() == {"sandbox": "remote"}  # type: ignore[attr-defined]
    with RemoteSandbox("http://sandbox.example") as own, pytest.raises(RehearsalError, match="takes its place"):
        CodeVerifier(programs=own, isolation="namespaces")
    for options, told in (
        ({"url": "http://sandbox.example", "isolation": "namespaces"}, "isolation is of the own sandbox"),
        ({"url": "http://sandbox.example", "packages": ["lib"]}, "packages is of the own sandbox"),
        ({"url": "sandbox.example"}, "begins with http"), ({"api_key_env": "SANDBOX_KEY"}, "a key needs one"),
        ({"url": "http://sandbox.example", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ):  # fmt: skip
        with pytest.raises(RehearsalError, match=told):
            named("code", **options)


def test_a_service_that_fails_gives_no_score() -> None:
    class Service:
        def run_program(self, source: str, **_: Any) -> ProgramResult:
            return ProgramResult("", "no room", Outcome.GONE, None, 0.0, "remote")

    with CodeVerifier(programs=Service()) as verifier, pytest.raises(VerificationError, match="no room"):
        verifier.verify("anything", Task("Double it.", PAIRS))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch, running_service() as made:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield made


@pytest.fixture(scope="module")
def at_service(service: Service) -> Iterator[CodeVerifier]:
    made = named("code", url=service.url, seconds=3.0, memory_mib=256)
    assert isinstance(made, CodeVerifier)
    with made:
        yield made
        assert made._pool is None, "nothing ran here"


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("    return 2 * n\n", "2 of 2 tests passed."),
        ("```python\nfrom math import prod\ndouble = lambda n: prod((2, n))\n```", "2 of 2 tests passed."),
        ("    print('noise')\n    return 2 * n\n", "2 of 2 tests passed."),
        ("    return 3 * n\n", "0 of 2 tests passed. First failing: assert candidate(1) == 2; double(1) gave 3"),
        ("    return 2 * n if n < 3 else None\n", "assert candidate(4) == 8, 'four'; double(4) gave None; four"),
        ("    raise ValueError('no')\n", "double(1) raised ValueError: no"),
        ("    return object()\n", "only plain data can be compared"),
        ("    while True: pass\n", "time was over"),
        ("    import time; time.sleep(1.7); return 2 * n\n", "1 of 2 tests passed. First failing"),
        ("    return bytearray(1 << 30)\n", "MemoryError"),
        ("    import os; os._exit(0)\n", "ended itself"),
        ("    return ''.join(\n", "SyntaxError"),
        ("```python\ndef other(n): return 2 * n\n```", "0 of 2"),
        ("```python\nn = 0\ndef double(x):\n    global n\n    n += 1\n    return 2 * x * n\n```", "double(4) gave 16"),
    ],
)
def test_a_service_checks_assertions(at_service: CodeVerifier, completion: str, words: str) -> None:
    score = at_service.verify(completion, TASK)
    assert score.passed is (words == "2 of 2 tests passed."), score
    assert words in score.evidence, score.evidence


# One reads all files that it may, and there is no wall around the service of this test.
@pytest.mark.parametrize("name", FORGERIES.keys() - {"looking for the tests in files"})
def test_a_pass_cannot_be_forged_at_a_service(service: Service, at_service: CodeVerifier, name: str) -> None:
    before = len(service.requests)
    score = at_service.verify(f"```python\n{FORGERIES[name]}\n```", TASK)
    assert not score.passed and score.value == 0.0, score
    for request in service.requests[before:]:
        calls = json.loads(request["stdin"])
        if any(call.get("source") == f"{FORGERIES[name]}\n" for call in calls):
            assert "candidate(1) == 2" not in str(request), "the tests are where the code is"
            assert all(call.get("function") in (None, "double") for call in calls)


def test_the_tests_of_a_service_see_what_they_see_here(at_service: CodeVerifier) -> None:
    tests = ["assert math.isclose(area(1), math.pi)", "assert set(parts(4)) == {1, 2}", "assert area(r) > 3"]
    task = Task("Areas.", tests, {"test_setup_code": "import math\nr = 1", "test_imports": ["import os"]})
    good = "import math\ndef area(r): return math.pi * r ** 2\ndef parts(n): return (k for k in (1, 2))"
    assert at_service.verify(good, task).passed
    assert not at_service.verify(good.replace("** 2", "** 2 + 1"), task).passed
    checks = "def check(candidate):\n    a = [3, 1]\n    candidate(values=a)\n    assert a == [1, 3]\n"
    task = Task("def arrange(values):\n    ''\n", checks, {"entry_point": "arrange"})
    assert at_service.verify("    values.sort()\n", task).passed
    assert not at_service.verify("    return sorted(values)\n", task).passed
    # Tests that draw their inputs draw the same ones each time that they are run again; sets have one order.
    checks = ("import random\ndef check(candidate):\n    for _ in range(5):\n"
              "        words = {str(random.random()) for _ in range(9)}\n"
              "        assert candidate(words, list(words)) == sorted(words)\n")  # fmt: skip
    task = Task("def order(a, b):\n    ''\n", checks, {"entry_point": "order"})
    assert at_service.verify("    return sorted(b)\n", task).evidence == "1 of 1 tests passed."
    clock = Task("Double it!", ["import time", "assert double(time.time_ns()) > 0", "assert double(1) == 2"])
    with pytest.raises(VerificationError, match="something else when it is run again"):
        at_service.verify("def double(n): return 2 * n", clock)
    with pytest.raises(VerificationError, match="No module named 'nowhere'"):
        at_service.verify("def double(n): return n", Task(PROMPT, ["import nowhere", "assert double(1) == 2"]))


def test_a_service_that_is_down_gives_no_score_either(service: Service, at_service: CodeVerifier) -> None:
    try:
        service.answer = lambda request: (500, {})
        with pytest.raises(VerificationError, match="status 500"):
            at_service.verify("    return 2 * n\n", TASK)
        lost = {"status": "Error", "return_code": None, "stdout": "", "stderr": ""}
        service.answer = lambda request: (200, {"status": "Failed", "run_result": lost})
        with pytest.raises(VerificationError, match="ended from outside, 3 times"):
            at_service.verify("    return 2 * n\n", TASK)
    finally:
        service.answer = really


def test_many_at_once() -> None:
    with CodeVerifier(limits=Limits(seconds=60)) as verifier, ThreadPoolExecutor(16) as threads:
        results = threads.map(lambda n: verifier.verify(f"    return n * {2 + n % 2}\n", TASK).passed, range(32))
        assert list(results) == [n % 2 == 0 for n in range(32)]


# Whole data sets


def humaneval() -> list[dict[str, Any]]:
    file = DATA / "humaneval" / "HumanEval.jsonl.gz"
    if not file.exists():
        pytest.skip("the HumanEval problems are not there")
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


KILLED = 0.85
"""Share of mutants that the tests of HumanEval must find: of 308 constants that are off by one they find 271, of 353
other operators 319. The rest is as good as the original, or the tests are too few (as arXiv:2305.01210 shows)."""


def test_mutants_are_other_programs() -> None:
    program = "def f(n):\n    total = 0\n    for i in range(1, n):\n        total += i * 2\n    return total"
    made = mutants(program, "f", most=9)
    assert [kind for kind, _ in made] == ["return"] + ["constant"] * 3 + ["operator"] * 2
    assert len({source for _, source in made} | {program}) == 7
    scope: dict[str, Any] = {}
    exec(made[0][1], scope)
    assert scope["f"](4) == 13
    for value in (True, 3, 2.5, "a", [1], ["a"], (), {"a": 1}, {1}):
        other = scope["_other"](value)
        assert other != value and (type(other) is type(value))


@pytest.mark.slow
def test_all_of_humaneval(verifier: CodeVerifier) -> None:
    rows = humaneval()
    # None of these takes a second; on a busy machine that may take long, and must not count against them.
    patient, brisk = (CodeVerifier(limits=Limits(seconds=seconds)) for seconds in (60, 10))

    def check(row: dict[str, Any], wrong: list[tuple[str, str]]) -> tuple[bool, list[tuple[str, bool]]]:
        task = Task(row["prompt"], row["test"], {"entry_point": row["entry_point"]})
        solution = row["canonical_solution"]
        continued = patient.verify(solution, task).passed
        whole = patient.verify(f"Here:\n```python\n{row['prompt']}{solution}```\n", task).passed
        # One that never ends is found out by its time.
        found = [(kind, brisk.verify(f"```python\n{source}\n```", task).passed) for kind, source in wrong]
        return continued and whole, found

    # Here and not in the threads: two that parse at the same time mistake each other's depth for their own
    # (`rehearsal.parsing`), and ast.parse of the test knows nothing of the lock.
    wrongs = [mutants(row["prompt"] + row["canonical_solution"], row["entry_point"]) for row in rows]
    with patient, brisk, ThreadPoolExecutor(4) as threads:
        results = list(threads.map(check, rows, wrongs))
    assert len(results) == 164
    names = [row["task_id"] for row in rows]
    assert [name for name, (right, _) in zip(names, results, strict=True) if not right] == []
    survivors = [
        (name, kind) for name, (_, found) in zip(names, results, strict=True) for kind, passed in found if passed
    ]
    assert [name for name, kind in survivors if kind == "return"] == [], "another value of the same type never passes"
    for kind in KINDS:
        total = sum(found == kind for _, own in results for found, _ in own)
        lost = sum(found == kind for _, found in survivors)
        print(f"{kind}: {total - lost} of {total} mutants found")
        assert total > 150 and lost <= (1 - KILLED) * total, (kind, survivors)


def test_problems_in_the_form_of_mbpp(verifier: CodeVerifier) -> None:
    file = DATA / "mbpp" / "mbpp-py.jsonl"
    if not file.exists():
        pytest.skip("the MBPP problems are not there")
    rows = {row["entry_point"]: row for row in map(json.loads, file.read_text().splitlines())}
    solutions = {
        "volume_cube": "    return l ** 3\n",
        "closest_num": "    return N - 1\n",
    }
    for name, solution in solutions.items():
        task = Task(rows[name]["prompt"], rows[name]["test"], {"entry_point": name})
        assert verifier.verify(solution, task).passed
        assert not verifier.verify(solution.replace("return", "return 1 +"), task).passed
    # The whole set can be used: a function that gives nothing fails by its answers and not by the tests.
    for row in list(rows.values())[::25]:
        task = Task(row["prompt"], row["test"], {"entry_point": row["entry_point"]})
        score = verifier.verify("    return object\n", task)
        assert not score.passed and "First failing: assert" in score.evidence, score


# A sandbox that is ended from outside


class Killer:
    """Kills the zygote of a verifier's sandbox as code is run, so many times."""

    def __init__(self, verifier: CodeVerifier, monkeypatch: pytest.MonkeyPatch, where: str, times: int) -> None:
        self.kills = 0
        original = getattr(Interpreter, where)

        def patched(interpreter: Interpreter, *args: Any, **kwargs: Any) -> Any:
            if self.kills < times and "double" in str(args):
                self.kills += 1
                process = verifier._sandbox()._zygote._process
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
                time.sleep(0.3)  # what lives below it ends a moment later, and could still answer
            return original(interpreter, *args, **kwargs)

        monkeypatch.setattr(Interpreter, where, patched)


@pytest.mark.parametrize("where", ["run", "call"])
def test_a_sandbox_that_is_killed_from_outside_makes_no_solution_fail(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing about the code: what was right would have scored 0."""
    if strongest() < Isolation.NAMESPACES:
        pytest.skip("without namespaces interpreters outlive the process that made them")
    with CodeVerifier(limits=Limits(seconds=20), concurrent=1) as verifier:
        verifier.warm_up()
        killer = Killer(verifier, monkeypatch, where, 1)
        score = verifier.verify("    return 2 * n\n", TASK)
        assert killer.kills == 1
        assert (score.value, score.passed) == (1.0, True)
        always = Killer(verifier, monkeypatch, where, 100)
        with pytest.raises(VerificationError, match="ended from outside"):
            verifier.verify("    return 2 * n\n", TASK)
        assert always.kills >= 2, "and in vain a second time"


def test_a_program_whose_sandbox_is_ended_has_no_score() -> None:
    class Gone:
        asked = 0

        def run_program(self, source: str, **_: Any) -> ProgramResult:
            self.asked += 1
            return ProgramResult("", "", Outcome.GONE, None, 0.1, "remote")

    runner = Gone()
    with pytest.raises(VerificationError, match="ended from outside"):
        CodeVerifier(programs=runner).verify("print(1)", Task("x", [["", "1"]]))
    assert runner.asked == 3
