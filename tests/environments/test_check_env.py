"""The checker, against a failing fake for every finding."""

import itertools
import math
import random
import threading
import time
from types import MappingProxyType

import gymnasium as gym
import numpy as np
import pytest

from rehearsal.agents.play import PlayResult, _step
from rehearsal.environments import SPLITS, GymTextAdapter, TextEnv, check_env, make
from rehearsal.environments.contract import step_faults
from rehearsal.errors import EnvironmentFault


class Fine(TextEnv):
    """Guess a digit that is shown; ends after three steps at the latest."""

    name = "fine"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        split = (options or {}).get("split", "train")
        digits = {"train": range(6), "validation": (6, 7), "test": (8, 9)}[split]
        self.digit = str(self.np_random.choice(list(digits)))
        self.split = split
        self.steps, self.over = 0, False
        return f"say {self.digit}", {"task": self.digit, "split": split, "state": self.digit, "success": False}

    def step(self, action):
        if self.over:
            raise gym.error.ResetNeeded("reset first")
        if action not in self.legal_actions():
            raise ValueError("not a digit")
        self.steps += 1
        right = action == self.digit
        self.over = right or self.steps == 3
        return "next", float(right), right, self.over and not right, {"success": right, "effective": True}

    def legal_actions(self):
        return list("0123456789")

    def oracle(self):
        return [] if self.over else [self.digit]

    def optimal_success(self):
        return 1.0


def broken(**methods):
    """A Fine environment with some methods replaced; each gets the original method as its second argument."""

    def replace(name, function):
        original = getattr(Fine, name)
        return lambda self, *args, **kwargs: function(self, original, *args, **kwargs)

    return type("Broken", (Fine,), {name: replace(name, function) for name, function in methods.items()})


def stepped(change):
    """A step whose result went through ``change``."""
    return broken(step=lambda self, original, action: change(*original(self, action)))


def reset_with(change):
    return broken(reset=lambda self, original, **kwargs: change(*original(self, **kwargs)))


counter = itertools.count()


def forgetful_reset(self, original, **kwargs):
    observation, info = original(self, **kwargs)
    return f"{observation} ({next(counter)})", info


def chancy_step(self, original, action):
    observation, *rest = original(self, action)
    return f"{observation} {random.random()}", *rest


def lax_step(self, original, action):
    return original(self, action if action in self.legal_actions() else "0")


def endless_step(self, original, action):
    self.over = False
    return original(self, action)


def strict_step(self, original, action):
    if action == "7":
        raise ValueError("seven is not a digit")
    return original(self, action)


def wrong_error_at_the_end(self, original, action):
    if self.over:
        raise RuntimeError("over")
    return original(self, action)


def same_tasks_everywhere(self, original, *, seed=None, options=None):
    observation, info = original(self, seed=seed)
    return observation, {**info, "split": (options or {}).get("split", "train")}


def deaf_to_splits(self, original, *, seed=None, options=None):
    return original(self, seed=seed)


def refuses_no_seed(self, original, *, seed=None, options=None):
    return original(self, seed=seed + 0, options=options)


def crash(*_, **__):
    raise ZeroDivisionError("inside the environment")


def leave(*_, **__):
    raise SystemExit(3)


class Listed(Fine):
    """Its tasks are the digits of each split, by number."""

    digits = MappingProxyType({"train": "012345", "validation": "67", "test": "89"})

    def task_count(self, split):
        return len(self.digits[split])

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        index = (options or {}).get("index")
        if index is None:
            return observation, info
        self.digit = self.digits[self.split][self.number(index, seed)]
        return f"say {self.digit}", {**info, "task": self.digit, "state": self.digit}

    def number(self, index, seed):
        return index


def luck_in_the_task(self, original, *, seed=None, options=None):
    observation, info = original(self, seed=seed, options=options)
    return f"{observation} ({(options or {}).get('chance', 0)})", info


class Die:
    """A generator inside something else, as simulators have it."""

    def __init__(self, seed):
        self._generator = random.Random(seed)

    def random(self):
        return self._generator.random()


def luck_from(make_dice):
    """A Fine environment that shows the throw of a die after each step."""

    def reset(self, original, *, seed=None, options=None):
        self.dice = make_dice(self, seed, (options or {}).get("chance", 0))
        return original(self, seed=seed, options=options)

    def step(self, original, action):
        observation, *rest = original(self, action)
        dice = self.dice["deep"][0] if isinstance(self.dice, dict) else self.dice
        return f"{observation} {dice.random():.3f}", *rest

    return broken(reset=reset, step=step)


class OwnDice(gym.Env):
    """A Gymnasium environment that draws from a generator that Gymnasium knows nothing of."""

    action_space = gym.spaces.Text(max_length=9)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dice = random.Random(seed)
        return "start", {}

    def step(self, action):
        return f"{self.dice.random():.3f}", 0.0, self.dice.random() < 0.3, False, {}


FAKES = {
    "reset-type": [
        broken(reset=lambda self, original, **kwargs: original(self, **kwargs)[0]),
        reset_with(lambda observation, info: (None, info)),
    ],
    "info-type": [
        reset_with(lambda observation, info: (observation, [])),
        reset_with(lambda observation, info: (observation, {**info, "task": 3})),
        stepped(lambda o, r, te, tr, info: (o, r, te, tr, {"success": 1})),
        stepped(lambda o, r, te, tr, info: (o, r, te, tr, {**info, "parts": {"speed": "fast"}})),
        stepped(lambda o, r, te, tr, info: (o, r, te, tr, {**info, "violations": "ran"})),
    ],
    "unicode": [
        reset_with(lambda observation, info: (observation + "\ud800", info)),
        reset_with(lambda observation, info: (observation, {**info, "state": "\udfff"})),
        stepped(lambda o, *rest: ("caf\udce9", *rest)),
        type("Broken", (Fine,), {"instructions": "Guess.\ud83d"}),
    ],
    "step-type": [stepped(lambda o, r, te, tr, info: (o, r, te, info)), stepped(lambda o, *rest: (b"bytes", *rest))],
    "reward-type": [stepped(lambda o, r, *rest: (o, None, *rest)), stepped(lambda o, r, *rest: (o, r > 0, *rest))],
    "reward-finite": [
        stepped(lambda o, r, *rest: (o, math.nan, *rest)),
        stepped(lambda o, r, *rest: (o, -math.inf, *rest)),
    ],
    "flag-type": [stepped(lambda o, r, te, tr, info: (o, r, int(te), tr, info))],
    "legal-type": [broken(legal_actions=lambda self, original: tuple(original(self)))],
    "legal-empty": [broken(legal_actions=lambda self, original: [])],
    "legal-refused": [broken(step=strict_step)],
    "illegal-accepted": [broken(step=lax_step)],
    "parse": [broken(parse_action=lambda self, original, text: original(self, text) or "0")],
    "seed-task": [broken(reset=forgetful_reset)],
    "seed-episode": [broken(step=chancy_step)],
    "task-key": [reset_with(lambda observation, info: (observation, {**info, "task": "the one"}))],
    "after-end": [broken(step=endless_step), broken(step=wrong_error_at_the_end)],
    "split": [broken(reset=deaf_to_splits)],
    "split-overlap": [broken(reset=same_tasks_everywhere)],
    "oracle": [
        broken(
            oracle=lambda self, original: ["0"],
            optimal_success=lambda self, original: None,
            legal_actions=lambda self, original: ["0"],
        ),
        broken(oracle=lambda self, original: [str((int(self.digit) + 1) % 10)]),
        broken(oracle=lambda self, original: ["ten"]),
    ],
    "count-type": [type("Broken", (Listed,), {"task_count": lambda self, split: 2.0})],
    "index": [
        type("Broken", (Listed,), {"number": lambda self, index, seed: 0}),
        type("Broken", (Listed,), {"number": lambda self, index, seed: (index + seed) % 2}),
        type("Deaf", (Fine,), {"task_count": lambda self, split: 100}),
    ],
    "oracle-type": [broken(oracle=lambda self, original: "5")],
    "luck-task": [broken(reset=luck_in_the_task)],
    "luck-seed": [luck_from(lambda self, seed, chance: random.Random() if chance else random.Random(seed))],
    "luck": [
        luck_from(lambda self, seed, chance: random.Random(seed)),
        luck_from(lambda self, seed, chance: np.random.default_rng(seed)),
        luck_from(lambda self, seed, chance: {"deep": [Die(seed)]}),
        lambda: GymTextAdapter(OwnDice(), name="own dice"),
    ],
    "instructions-type": [type("Broken", (Fine,), {"instructions": None})],
    "limits": [type("Broken", (Fine,), {"max_turns": 0})],
    "raises": [broken(step=crash), broken(reset=refuses_no_seed), broken(oracle=crash), broken(step=leave)],
    "make": [crash, "frozenlak"],
    "contract": [object, gym.Env],
}


def test_a_sound_environment_has_no_problems():
    report = check_env(Fine)
    assert report.ok, str(report)
    assert len(report) == 0
    assert "no problems" in str(report)
    assert len(report.checked) == 8
    assert not report.skipped
    assert check_env(Listed).ok


@pytest.mark.parametrize(("code", "fake"), [(code, fake) for code, fakes in FAKES.items() for fake in fakes])
def test_each_fault_is_found_and_told_in_a_sentence(code, fake):
    report = check_env(fake, n_seeds=4)
    assert code in [problem.code for problem in report], str(report)
    assert all(problem.message.strip() and "\n" not in problem.message for problem in report)
    assert str(report).count("\n- ") == len(report)


def test_instances_classes_factories_and_names_are_taken():
    for target in (Fine(), Fine, lambda: Fine(), "bandit"):
        assert check_env(target).ok


def test_an_environment_that_hangs_is_reported_in_time():
    release = threading.Event()

    class Hangs(Fine):
        def step(self, action):
            release.wait(20)
            return super().step(action)

    start = time.perf_counter()
    report = check_env(Hangs, time_limit=0.3)
    assert time.perf_counter() - start < 15
    release.set()
    assert [problem.code for problem in report] == ["hang"]
    assert "step(" in str(report)


def test_an_environment_that_would_end_the_program_is_reported():
    class Leaves(Fine):
        def step(self, action):
            raise SystemExit(3)

    class NeverComes(Fine):
        def __init__(self):
            raise SystemExit(3)

    assert [problem.code for problem in check_env(Leaves)] == ["raises"]
    assert [problem.code for problem in check_env(NeverComes)] == ["make"]


def test_luck_that_differs_is_no_problem():
    own = luck_from(lambda self, seed, chance: np.random.default_rng([seed or 0, chance]))
    plain = broken(step=lambda self, original, action: (f"{self.np_random.random():.3f}", *original(self, action)[1:]))
    for environment in (own, plain, "frozenlake", lambda: make("frozenlake", slip=0.5)):
        report = check_env(environment)
        assert report.ok, str(report)
        assert "luck" in report.checked


def test_numbers_and_flags_of_numpy_are_what_they_are():
    numpy_types = stepped(
        lambda o, r, te, tr, info: (
            o, np.float32(r), np.bool_(te), np.bool_(tr), {**info, "success": np.bool_(info["success"])},
        )
    )  # fmt: skip
    report = check_env(numpy_types)
    assert report.ok, str(report)


def test_what_the_check_refuses_training_refuses_and_nothing_else():
    """One rule for both: an environment that passes the check does not fail in training for what it returns."""
    base = ("Went.", 0.5, False, False, {"success": False})
    values = {
        0: ["Went.", "caf\xe9", "\U0001f600", "\ud800", b"x", None, 3],
        1: [1, 0.5, np.float32(1), np.float64(-2), np.int64(3), True, np.bool_(True), math.nan, math.inf, "1", None],
        2: [True, np.bool_(False), 0, 1, None, "no", np.int64(1)],
        4: [
            {}, None, [], {"success": None}, {"success": np.bool_(True)}, {"success": 1}, {"success": "yes"},
            {"task": 3}, {"task": None}, {"state": "s"}, {"state": 5}, {"effective": np.bool_(False)},
            {"effective": 0}, {"parts": {"a": np.float32(1)}}, {"parts": {"a": math.nan}}, {"parts": [1]},
            {"violations": ["ran"]}, {"violations": "ran"}, {"category": 1}, {"foreseeable": 2},
        ],
    }  # fmt: skip
    refused = 0
    for place, tried in values.items():
        for value in tried:
            returned = (*base[:place], value, *base[place + 1 :])
            checked = bool(list(step_faults("step()", returned)))
            try:
                _step(Answers(returned), "go", PlayResult())
            except EnvironmentFault:
                played = True
            else:
                played = False
            assert checked == played, returned
            refused += played
            report = check_env(Answers(returned), n_seeds=1)
            codes = {problem.code for problem in report} & RETURNED
            assert bool(codes) == played, (returned, str(report))
    assert refused == 27


RETURNED = {"step-type", "reward-type", "reward-finite", "flag-type", "info-type", "unicode"}


class Answers(TextEnv):
    """Every step returns the same."""

    name = "answers"

    def __init__(self, returned):
        self.returned = returned

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Start.", {}

    def step(self, action):
        return self.returned


def test_what_could_not_be_checked_is_said():
    class Silent(Fine):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0], {}

        def legal_actions(self):
            return None

        def oracle(self):
            return None

        def step(self, action):
            if self.over:
                raise gym.error.ResetNeeded("reset first")
            self.over = True
            return "done", 0.0, True, False, {}

    report = check_env(Silent)
    assert report.ok, str(report)
    assert len(report.skipped) == 3
    assert "split" in str(report)


def test_a_report_is_not_mistaken_for_a_verdict():
    with pytest.raises(TypeError, match=r"report\.ok"):
        bool(check_env(Fine))


def test_the_fake_uses_all_splits():
    assert {Fine().reset(seed=0, options={"split": split})[1]["split"] for split in SPLITS} == set(SPLITS)
