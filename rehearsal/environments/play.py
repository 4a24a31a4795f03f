"""Play an environment yourself, in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TextIO, TypeVar

from rich.align import Align
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError, RehearsalError

T = TypeVar("T")

_STYLES: dict[str, dict[str, str]] = {
    "frozenlake": {
        "P": "bold black on bright_cyan",
        "_": "bright_blue",
        "O": "bold red",
        "G": "bold yellow",
        "X": "bold white on red",
        "V": "bold black on bright_green",
    },
    "sokoban": {
        "P": "bold black on bright_cyan",
        "S": "bold black on bright_cyan",
        "_": "bright_black",
        "#": "white",
        "O": "bold yellow",
        "X": "bold magenta",
        "*": "bold black on bright_green",
    },
}

_KEYS = {"w": "up", "a": "left", "s": "down", "d": "right"}
_ARROWS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left"}


@dataclass(frozen=True)
class PlayResult:
    """How a game by hand ended.

    Attributes:
        reward: the sum over all steps.
        steps: actions taken.
        success: what the environment said, None where it says nothing.
        finished: False where the player quit.
    """

    reward: float
    steps: int
    success: bool | None
    finished: bool


def read_action(text: str, legal: Sequence[str] | None) -> str | None:
    """The action that a person means, or None.

    Understood are the name in any case, W A S D and the arrow keys where the actions are the four directions, and any
    beginning that fits one action alone. W A S D come first, so ``d`` is Right and not Down.
    """
    text = _ARROWS.get(text.strip(), text.strip())
    if legal is None:
        return text or None
    by_name = {action.casefold(): action for action in legal}
    typed = text.casefold()
    if typed in by_name:
        return by_name[typed]
    if set(_KEYS.values()) <= by_name.keys() and typed in _KEYS:
        return by_name[_KEYS[typed]]
    fitting = [action for name, action in by_name.items() if typed and name.startswith(typed)]
    return fitting[0] if len(fitting) == 1 else None


def play(
    env: TextEnv,
    *,
    seed: int | None = None,
    split: str = "train",
    input: Callable[[str], str] = input,
    output: TextIO | Console | None = None,
) -> PlayResult:
    """Let a person play one episode.

    Args:
        env: the environment.
        seed: of the episode; a new one each time if left out.
        split: where the task comes from.
        input: asks for one line, as the built-in function does. ``q`` or the end of input quits; ``?`` shows the best
            next action where the environment knows it.
        output: where to draw; standard output if left out.

    Returns:
        The score of the game.

    Raises:
        RecipeError: for a seed below 0.
        EnvironmentFault: if the environment raises something.
    """
    console = output if isinstance(output, Console) else Console(file=output)
    if seed is not None and seed < 0:
        raise RecipeError(f"A seed is a whole number from 0 on, not {seed}.")
    observation, info = _contained(env, "reset", lambda: env.reset(seed=seed, options={"split": split}))
    console.print(Panel(Text(env.instructions), title=env.name, border_style="cyan", expand=False))
    reward_sum, steps = 0.0, 0
    note = ""
    while True:
        console.print(_board(env.name, observation, steps, reward_sum, note))
        console.print(_help(env.legal_actions()))
        try:
            typed = input("> ")
        except (EOFError, KeyboardInterrupt):
            typed = "q"
        if typed.strip().casefold() in ("q", "quit"):
            console.print("You left the game.")
            return PlayResult(reward_sum, steps, info.get("success"), finished=False)
        if typed.strip() == "?":
            plan = env.oracle()
            note = f"best now: {plan[0]}" if plan else "nobody knows a good move here"
            continue
        wanted = read_action(typed, env.legal_actions())
        action = None if wanted is None else env.parse_action(wanted)
        if action is None:
            note = f"{typed.strip()!r} is not an action here"
            continue
        observation, reward, terminated, truncated, info = _contained(env, "step", partial(env.step, action))
        reward_sum += reward
        steps += 1
        note = f"{action}: reward {reward:+g}" + (", nothing changed" if info.get("effective") is False else "")
        if terminated or truncated:
            console.print(_board(env.name, observation, steps, reward_sum, note))
            success = info.get("success")
            words = (
                "The end." if success is None else "[bold green]Solved.[/]" if success else "[bold red]Not solved.[/]"
            )
            limit = " The steps are used up." if truncated and not terminated else ""
            console.print(f"{words}{limit} {steps} {'step' if steps == 1 else 'steps'}, reward {reward_sum:g}.")
            return PlayResult(reward_sum, steps, success, finished=True)


def _contained(env: TextEnv, method: str, call: Callable[[], T]) -> T:
    """What somebody else's code raises is told in a sentence."""
    try:
        return call()
    except RehearsalError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise EnvironmentFault(f"{type(env).__name__}.{method} raised {type(error).__name__}: {said}") from error


def _board(name: str, observation: str, steps: int, reward_sum: float, note: str) -> RenderableType:
    styles = _STYLES.get(name, {})
    text = Text()
    for line in observation.splitlines():
        # Only a row of single symbols is a grid; words that happen to have the same letters stay plain.
        is_grid = bool(styles) and all(len(cell) == 1 for cell in line.split(" "))
        for symbol in line:
            text.append(symbol, styles.get(symbol, "") if is_grid else "")
        text.append("\n")
    text.rstrip()
    parts: list[RenderableType] = [Align(text, "left")]
    if note:
        parts.append(Text(f"\n{note}", style="italic"))
    return Panel(Group(*parts), title=f"step {steps}", subtitle=f"reward {reward_sum:g}", expand=False, padding=(1, 3))


def _help(legal: Sequence[str] | None) -> Text:
    if legal is None:
        return Text("Type your answer; ? for a hint, q to quit.", style="dim")
    names = {action.casefold(): action for action in legal}
    if set(_KEYS.values()) <= names.keys():
        listed = ", ".join(f"{key} {names[direction]}" for key, direction in _KEYS.items())
    else:
        listed = ", ".join(legal)
    return Text(f"{listed}; ? for a hint, q to quit.", style="dim")
