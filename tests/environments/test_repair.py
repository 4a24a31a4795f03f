"""Repair: programs that are right, bugs that matter, edits as they are written, and programs that mean no good."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.environments import SPLITS, make
from rehearsal.environments.repair import (
    EditError,
    Repair,
    apply_edit,
    draw_program,
    edits_between,
    possible_bugs,
    running,
    with_bugs,
)
from rehearsal.environments.repair.bugs import KINDS, draw_bugs
from rehearsal.environments.repair.families import FAMILIES
from rehearsal.environments.repair.programs import _NAMES
from rehearsal.environments.repair.running import Answer, ProgramRunner, Where, run_own
from rehearsal.environments.splits import content_split
from rehearsal.errors import RecipeError, RehearsalError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))

from loopback import running_service

WANTED = {
    "sum above": ({"k": 3}, ([1, 3, 4, 9],), 13),
    "count multiples": ({"k": 3}, ([3, 4, 0, -6],), 3),
    "largest": ({}, ([2, 7, -1],), 7),
    "spread": ({}, ([2, 7, -1],), 8),
    "factorial": ({}, (5,), 120),
    "fibonacci": ({}, (7,), 13),
    "recursive sum": ({}, ([2, -7, 9],), 4),
    "power": ({}, (-2, 3), -8),
    "digit sum": ({}, (907,), 16),
    "in base": ({"k": 2}, (10,), "1010"),
    "reverse": ({}, ("abc",), "cba"),
    "vowels": ({}, ("abcide",), 3),
    "palindrome": ({}, ("abcba",), True),
    "index": ({}, ([5, 3, 3], 3), 1),
    "running totals": ({}, ([2, -1, 4],), [2, 1, 5]),
    "differences": ({}, ([2, 5, 1],), [3, -4]),
    "clamp": ({"low": 0, "high": 5}, (9,), 5),
    "grade": ({"low": 2, "high": 6}, (6,), "high"),
    "greatest divisor": ({}, (12, 18), 6),
    "prime": ({}, (9,), False),
    "halving": ({}, (6,), 8),
    "distinct": ({}, ([2, 1, 2, 0, 1],), [2, 1, 0]),
    "pairs": ({"k": 4}, ([1, 3, 3, 2, 2],), 3),
    "longest word": ({}, (["a", "bcd", "efg"],), "bcd"),
    "initials": ({}, (["ab", "c"],), "AC"),
    "long words": ({"k": 2}, (["ab", "abc", ""],), ["abc"]),
    "weighted sum": ({}, ([5, 0, 2],), 11),
    "every one": ({"k": 2}, ([1, 2, 3, 4, 5],), [1, 3, 5]),
    "rotated": ({"k": 1}, ([1, 2, 3],), [2, 3, 1]),
    "longest run": ({}, ([1, 2, 2, 2, 1],), 3),
    "merged": ({}, ([1, 4], [2, 3, 5]), [1, 2, 3, 4, 5]),
    "even and odd": ({}, ([2, 3, 4],), 3),
    "sorted": ({}, ([3, 1, 2],), [1, 2, 3]),
    "all between": ({"low": 0, "high": 6}, ([0, 6, 7],), False),
}


@pytest.fixture(scope="module")
def env() -> Iterator[Repair]:
    made = Repair()
    yield made
    made.close()


@pytest.fixture(scope="module")
def runner() -> Iterator[ProgramRunner]:
    made = ProgramRunner(interpreters=1)
    yield made
    made.close()


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_correct_program_is_correct(family):
    numbers, arguments, value = WANTED[family.name]
    roles = {name: name for name in ["f", *_NAMES]}
    assert set(numbers) == set(family.numbers)
    run = run_own("f", family.source.format(**roles, **numbers), [arguments])
    assert run.answers == (Answer(repr(value)),)


def test_programs_are_drawn_with_room_for_their_inputs():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(400):
        program = draw_program(rng)
        seen[program.family] += 1
        assert len(program.calls) >= 6, program
        assert len({repr(call) for call in program.calls}) == len(program.calls)
        run = run_own(program.function, program.source, program.calls)
        assert all(answer.is_value for answer in run.answers), (program, run)
    assert len(seen) == len(FAMILIES)
    assert max(seen.values()) < 5 * min(seen.values())


def test_programs_are_many():
    rng = np.random.default_rng(1)
    assert len({draw_program(rng).source for _ in range(1000)}) > 800


# --- bugs -------------------------------------------------------------------------------------------------------------


def test_every_bug_is_a_program_that_differs():
    rng = np.random.default_rng(2)
    kinds = Counter()
    for _ in range(200):
        program = draw_program(rng)
        for bug in possible_bugs(program.lines):
            broken = with_bugs(program.lines, [bug])
            assert broken != program.lines
            compile("\n".join(broken), "program", "exec")
            kinds[bug.kind] += 1
    assert set(kinds) == set(KINDS)


def test_bugs_of_a_program_are_in_different_lines():
    rng = np.random.default_rng(3)
    for _ in range(100):
        program = draw_program(rng)
        bugs = draw_bugs(rng, program.lines, 3)
        if bugs is not None:
            assert all(one.last <= other.first for one, other in pairwise(bugs))
    assert draw_bugs(rng, ["def f(x):", "    return x"], 3) is None


def test_a_bug_that_never_ends_is_bounded():
    begun = time.thread_time()
    run = run_own("f", "def f(x):\n    while True:\n        x += 1", [(1,)] * 10)
    assert [answer.text for answer in run.answers] == ["no end"] * 10
    assert time.thread_time() - begun < 5
    assert sys.gettrace() is None or "coverage" in repr(sys.gettrace())


# --- edits ------------------------------------------------------------------------------------------------------------

LINES = ("def f(x):", "    if x:", "        return 1", "    return 2")


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        ("replace 3: return 5", (*LINES[:2], "        return 5", LINES[3])),
        (" Replace 3 :return 5 ", (*LINES[:2], "        return 5", LINES[3])),
        ("replace 4:     return 5", (*LINES[:3], "    return 5")),
        ("replace 3:     return 5", (*LINES[:2], "    return 5", LINES[3])),
        ("insert 2: y = 1", (LINES[0], "    y = 1", *LINES[1:])),
        ("insert 3: y = 1", (*LINES[:2], "        y = 1", *LINES[2:])),
        ("insert 5: y = 1", (*LINES, "    y = 1")),
        ("insert 1: y = 1", ("y = 1", *LINES)),
        ("delete 2", (LINES[0], *LINES[2:])),
        ("replace 2:", (LINES[0], "", *LINES[2:])),
        ("replace 4: x = 'a: b'", (*LINES[:3], "    x = 'a: b'")),
    ],
)  # fmt: skip
def test_what_an_edit_does(edit, lines):
    assert apply_edit(LINES, edit) == lines


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("replace 5: x", "There is no line 5 to replace; the program has 4 lines"),
        ("insert 6: x", "no line 6 to insert"), ("delete 0", "no line 0"), ("delete 2: x", "takes no text"),
        ("replace 2", "needs a colon"), ("submit", "This is no edit"), ("", "This is no edit"),
        ("replace two: x", "no edit"), ("replace 2: x\ny", "one line"), ("replace 2: " + "x" * 201, "200 characters"),
        ("replace 99999999999999999999: x", "no edit"),
    ],
)  # fmt: skip
def test_what_is_no_edit(edit, told):
    with pytest.raises(EditError, match=told):
        apply_edit(LINES, edit)


def test_a_program_grows_only_so_long():
    with pytest.raises(EditError, match="no more than 60 lines"):
        apply_edit(["x"] * 60, "insert 3: y")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "    a = 1", "        b", "    c", "x"])), st.data())
def test_edits_lead_from_any_program_to_a_correct_one(lines, data):
    correct = draw_program(np.random.default_rng(data.draw(st.integers(0, 1000)))).lines
    mixed = [line for line in correct if data.draw(st.booleans())]
    for begun in (lines, mixed, [*mixed, *lines], [*lines, *mixed]):
        now = tuple(begun)
        for edit in edits_between(now, correct):
            now = apply_edit(now, edit)
        assert now == correct


# --- the environment --------------------------------------------------------------------------------------------------


def test_every_bug_shows_in_a_visible_test():
    env = Repair(bugs=2, visible=3)
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        assert "fails:" in observation and observation.count("fails: ") + observation.count("passes: ") == 3
        task = env._present
        for bug in task.bugs:
            alone = run_own(task.program.function, "\n".join(with_bugs(task.program.lines, [bug])), task.calls)
            assert alone.answers[:3] != task.wanted[:3]
        assert len(task.calls) >= 6


def test_programs_of_a_split_are_in_no_other():
    env = Repair()
    for split in SPLITS:
        for seed in range(60):
            env.reset(seed=seed, options={"split": split})
            assert content_split(env.describe()["solution"]) == split


def test_a_repair(env):
    env.reset(seed=0)
    text = env.describe()["program"].replace("\n", "|")
    first, info = env.reset(seed=0)
    assert info["success"] is False and text.split("|")[0] in first
    (edit,) = env.oracle()
    observation, reward, terminated, truncated, info = env.step(edit)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert observation.endswith("All tests pass.") and "fails" not in observation
    assert env.describe()["program"] == env.describe()["solution"]


def test_what_cannot_be_done_is_told_and_costs_an_edit(env):
    env.reset(seed=0)
    program = env.describe()["program"]
    observation, reward, terminated, _, info = env.step("do something")
    assert observation.startswith("This is no edit. Write replace 3:")
    assert (reward, terminated, info["effective"]) == (0.0, False, False)
    assert env.describe()["program"] == program and env.steps_left == 5
    observation, *_ = env.step("replace 2: return (")
    assert "The program does not run: SyntaxError" in observation
    # Three edits are left, and the oracle knows what is to be done from here on.
    for edit in env.oracle():
        *_, info = env.step(edit)
    assert info["success"]


def test_an_episode_ends_with_its_edits(env):
    env.reset(seed=1)
    for turn in range(6):
        _, reward, terminated, truncated, info = env.step("nothing")
        assert (reward, terminated, truncated) == (0.0, False, turn == 5)
    assert not info["success"] and env.oracle() == [] and env.optimal_success() == 0.0


def test_visible_tests_known_by_heart_are_no_solution(env):
    env.reset(seed=3)
    task = env._present
    known = dict(zip(map(repr, task.calls[:3]), [answer.text for answer in task.wanted[:3]], strict=True))
    table = "{" + ", ".join(f"{key!r}: {value}" for key, value in known.items()) + "}"
    head = task.program.lines[0]
    arguments = head[head.index("(") + 1 : head.index(")")]
    env._lines = (head, "    pass")
    observation, reward, terminated, _, info = env.step(f"replace 2: return {table}.get(repr(({arguments},)), 0)"[:200])
    assert observation.endswith("Hidden tests fail."), observation
    assert (reward, terminated, info["success"]) == (0.0, False, False)


def test_a_copy_goes_on_by_itself(env):
    env.reset(seed=5)
    other = copy.deepcopy(env)
    assert env.step(env.oracle()[0])[1] == other.step(other.oracle()[0])[1] == 1.0
    other.close()


def test_the_sandbox_ends_with_the_last_environment():
    one, other = Repair(isolation=None), make("repair")
    for user in (one, other):
        user.reset(seed=7)
        user.step("replace 1: pass")
    runner = running._runners[Where()]
    users = list(running._users[Where()])
    one.close()
    one.close()
    assert running._runners[Where()] is runner
    for user in users:
        user.close()
    assert Where() not in running._runners
    one.reset(seed=7)
    assert "does not run" in one.step("replace 1: pass (")[0]
    one.close()


def test_a_service_runs_the_programs(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_service() as service:
        env, other = (Repair(bugs=2, turns=8, url=service.url) for _ in range(2))
        assert env.facts() == {"sandbox": "remote"}
        env.reset(seed=3)
        assert "does not run" in env.step("replace 1: pass (")[0]
        env.reset(seed=3)
        while edits := env.oracle():
            _, reward, terminated, _, _ = env.step(edits[0])
        assert terminated and reward == 1.0
        sent, where = len(service.requests), Where(url=service.url)
        assert sent > 0 and where in running._runners
        runner = running.shared_runner(where, other)
        for name in ("for ever", "leaves", "an object", "recursion"):
            source, told = HOSTILE[name]
            assert told in runner.run("f", source, [(1,), (2,)]).answers[0].text
        assert runner.run("f", GOOD, [(1,), (2,)]).answers == AFTER
        assert len(json.loads(service.requests[-1]["stdin"])) == 2, "no program is run with another one"
        env.close()
        other.close()
    assert where not in running._runners


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"bugs": 4}, "bugs"), ({"bugs": 0}, "bugs"), ({"visible": 0}, "visible"), ({"turns": 0}, "turns"),
        ({"bugs": 3, "visible": 2}, "as many visible tests"), ({"bugs": 2, "turns": 1}, "turns"),
        ({"isolation": "strong"}, "isolation must be one of rlimits"),
    ],
)  # fmt: skip
def test_parameters_out_of_range(params, told):
    with pytest.raises(RecipeError, match=told):
        Repair(**params)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"api_key_env": "KEY"}, "a key needs one"), ({"url": "sandbox.example"}, "begins with http"),
        ({"url": "http://sandbox.example", "isolation": "filters"}, "of the own sandbox"),
        ({"url": "http://sandbox.example", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_services_that_are_none(params, told):
    with pytest.raises(RehearsalError, match=told):
        Repair(**params)


# --- programs that mean no good ---------------------------------------------------------------------------------------

GOOD = "def f(x):\n    return x + 1"
AFTER = (Answer("2"), Answer("3"))

HOSTILE = {
    "leaves": ("import os\ndef f(x):\n    os._exit(0)", "the program ended itself"),
    "leaves politely": ("def f(x):\n    raise SystemExit", "SystemExit in line 2"),
    "leaves at once": ("raise SystemExit(0)", "SystemExit: 0 in line 1"),
    "for ever": ("def f(x):\n    while True: pass", "no end"),
    "for ever at once": ("while True: pass", "no end"),
    "for ever without a line": ("def f(x):\n    return sum(iter(int, 1))", "no end"),
    "for ever, catching": ("def f(x):\n    while True:\n        try:\n            x\n        except: pass", "no end"),
    "memory": ("def f(x):\n    return [0] * 10 ** 9", "MemoryError in line 2"),
    "recursion": ("def f(x):\n    return f(x)", "RecursionError"),
    "processes": ("import os\ndef f(x):\n    return os.fork()", "BlockingIOError"),
    "files": ("def f(x):\n    with open('kept', 'w') as file: file.write('x' * 100)", "OSError"),
    "a number too long": ("def f(x):\n    return 10 ** 9999", "a value too large to show"),
    "a number that is long": ("def f(x):\n    return int('9' * 1000)", None),
    "an equal of everything": (
        "class A(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return '2'\n"
        "def f(x):\n    return A(7)",
        "7",
    ),
    "an object": ("def f(x):\n    return object()", "a value of type object"),
    "an endless text": ("def f(x):\n    while True: print('x' * 1000)", "no end"),
    "forged answers": ("import os\ndef f(x):\n    for n in range(3, 64):\n        try: os.write(n, b'[]')\n"
                       "        except OSError: pass", None),
    "a bad exception": ("class E(Exception):\n    def __str__(self): raise self\ndef f(x):\n    raise E",
                        "cannot be shown"),
    "nothing": ("", "it does not define f"),
    "no function": ("f = 3", "TypeError"),
    "not even text": ("def f(x):\n    return '\\ud800'", None),
    "deep": ("def f(x):\n    return " + "(" * 150 + "x" + ")" * 150, None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_programs_that_mean_no_good_are_answered(name, runner):
    source, told = HOSTILE[name]
    run = runner.run("f", source, [(1,), (2,)])
    assert len(run.answers) == 2
    assert run.answers != AFTER
    if told is not None:
        assert told in run.answers[0].text
    assert runner.run("f", f"{GOOD}  # {name}", [(1,), (2,)]).answers == AFTER


def test_what_a_program_leaves_behind_does_not_meet_the_next(runner):
    nasty = (
        "import builtins, json, sys, os\n"
        "builtins.len = lambda x: 99\n"
        "json.dumps = lambda x: '{\"value\": 2}'\n"
        "sys.modules['math'] = None\n"
        "os.environ['LEFT'] = 'here'\n"
        "def f(x):\n    return 0"
    )
    runner.run("f", nasty, [(1,)])
    probe = "import math, os\ndef f(x):\n    return [len([]), 'LEFT' in os.environ]"
    assert runner.run("f", probe, [(1,)]).answers == (Answer("[0, False]"),)


def test_a_program_that_ends_the_sandbox_costs_only_itself(runner):
    killer = "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    return x"
    assert not runner.run("f", killer, [(1,)]).answers[0].is_value
    assert runner.run("f", f"{GOOD}  # after it", [(1,), (2,)]).answers == AFTER


def test_a_program_that_sleeps_is_ended_by_the_clock(runner):
    begun = time.monotonic()
    run = runner.run("f", "import time\ndef f(x):\n    time.sleep(1000)", [(1,)])
    assert run.answers == (Answer("no end", False),)
    assert time.monotonic() - begun < 30


def test_the_same_run_is_made_once(runner, monkeypatch):
    first = runner.run("f", f"{GOOD}  # once", [(1,)])
    monkeypatch.setattr(runner, "_tried", None)
    assert runner.run("f", f"{GOOD}  # once", [(1,)]) == first


def test_arguments_are_the_tests_own(runner):
    taking = "def f(x):\n    x.append(1)\n    return len(x)"
    assert runner.run("f", taking, [([],), ([],)]).answers == (Answer("1"), Answer("1"))


def test_a_process_ends_that_closed_nothing():
    script = "from rehearsal.environments import make\ne = make('repair')\ne.reset(seed=0)\ne.step('replace 1: x')\n"
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
