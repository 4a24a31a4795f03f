"""Play by hand, with a scripted player in the person's place."""

import io

import pytest

from rehearsal.environments import make, play
from rehearsal.environments.play import read_action

COMPASS = ["Up", "Down", "Left", "Right"]


def run(env, lines, **kwargs):
    lines = iter(lines)
    output = io.StringIO()

    def ask(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return play(env, input=ask, output=output, **kwargs), output.getvalue()


@pytest.mark.parametrize(
    ("typed", "legal", "action"),
    [
        ("left", COMPASS, "Left"),
        (" LEFT ", COMPASS, "Left"),
        ("l", COMPASS, "Left"),
        ("w", COMPASS, "Up"),
        ("a", COMPASS, "Left"),
        ("s", COMPASS, "Down"),
        ("d", COMPASS, "Right"),
        ("do", COMPASS, "Down"),
        ("\x1b[A", COMPASS, "Up"),
        ("\x1b[D", COMPASS, "Left"),
        ("x", COMPASS, None),
        ("", COMPASS, None),
        ("w", ["Clerk", "Pirate"], None),
        ("p", ["Clerk", "Pirate"], "Pirate"),
        ("s", ["Storm", "Stone"], None),
        ("stor", ["Storm", "Stone"], "Storm"),
        (" 3 + 5 ", None, "3 + 5"),
        ("", None, None),
    ],
)
def test_what_a_person_types_is_understood(typed, legal, action):
    assert read_action(typed, legal) == action


@pytest.mark.parametrize("name", ["frozenlake", "sokoban", "bandit", "countdown", "helpdesk"])
def test_a_game_that_is_won(name):
    env = make(name)
    env.reset(seed=5)
    plan = env.oracle()
    result, screen = run(env, plan, seed=5)
    assert (result.finished, result.success, result.steps) == (True, True, len(plan))
    assert "Solved." in screen
    assert env.instructions.split()[0] in screen


def test_the_board_the_note_and_the_hint_are_shown():
    env = make("frozenlake")
    board, _ = env.reset(seed=2)
    hint = env.oracle()[0]
    result, screen = run(env, ["fly", "?", "q"], seed=2)
    assert all(row in screen for row in board.split("\n"))
    assert "'fly' is not an action here" in screen
    assert f"best now: {hint}" in screen
    assert "w Up" in screen
    assert (result.finished, result.steps, result.reward) == (False, 0, 0.0)


def test_the_end_of_input_leaves_the_game():
    result, screen = run(make("sokoban"), [], seed=0)
    assert not result.finished
    assert "left the game" in screen


def test_running_out_of_steps_is_told():
    env = make("sokoban", max_steps=2, min_solution=2, max_solution=2)
    env.reset(seed=0)
    away = {"Up": "Down", "Down": "Up", "Left": "Right", "Right": "Left"}[env.oracle()[0]]
    result, screen = run(env, [env.oracle()[0], away], seed=0)
    assert result.finished
    assert result.success is False
    assert result.reward == pytest.approx(-0.2)
    assert "Not solved. The steps are used up. 2 steps" in screen


def test_words_that_look_like_markup_are_shown_as_they_are():
    env = make("countdown")
    result, screen = run(env, ["[bold]oops[/nope]"], seed=0)
    assert "[bold]oops[/nope]" in screen
    assert result.success is False
