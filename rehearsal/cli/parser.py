"""What can be typed: the commands with their flags, and the dotted options of recipes and environments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal import __version__
from rehearsal.cli.evaluation import eval_command, probe_command
from rehearsal.cli.inspection import (
    check_command,
    diagnose_command,
    envs_command,
    play_command,
    recipes_command,
    report_command,
)
from rehearsal.cli.training import base_command, export_command, train_command
from rehearsal.errors import RecipeError


class _CommandParser(argparse.ArgumentParser):
    """Remembers its own flags, to tell them from the options of a recipe or an environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flags: set[str] = set()
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        self.flags.update(name for name in names if name.startswith("-"))
        return super().add_argument(*names, **kwargs)


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, set[str]]]:
    """The parser, and each command's own flags."""
    parser = argparse.ArgumentParser(
        prog="rehearsal",
        description="Train language-model agents that keep learning, and know whether the learning signal is real.",
    )
    parser.add_argument("--version", action="version", version=f"rehearsal {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_CommandParser)
    flags: dict[str, set[str]] = {}

    def command(name: str, text: str, run: Any, dotted: bool = False) -> _CommandParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run, takes_dotted=dotted)
        flags[name] = sub.flags
        return sub

    train = command("train", "Train an agent in an environment.", train_command, dotted=True)
    train.add_argument("recipe", nargs="?", help="a built-in recipe or a TOML file; without one the defaults")
    train.add_argument("--output", type=Path, help="run folder; runs/NAME if left out")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, by its own recipe")
    train.add_argument("--overwrite", action="store_true", help="delete an earlier run in --output first")
    train.add_argument("--dry-run", action="store_true", help="show the resolved recipe and its memory, and stop")
    train.add_argument("--options", action="store_true", help="list all dotted options, and stop")
    train.epilog = "Any option of the recipe can be given by its dotted name: --training.steps 30"

    evaluate = command("eval", "Play held-out tasks with a policy.", eval_command, dotted=True)
    evaluate.add_argument("policy", help="a run folder, a Hugging Face folder, or base")
    evaluate.add_argument("--recipe", help="where environment and limits come from; a run folder brings its own")
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"), help="of the tasks")
    evaluate.add_argument("--episodes", type=int, default=256, help="tasks to play; 256 if left out")
    evaluate.add_argument("--temperature", type=float, help="1 if left out, 0 with --protocol mint")
    evaluate.add_argument("--samples", type=int, default=1, help="episodes of each task, for pass@k")
    evaluate.add_argument("--against", help="another policy, compared on the same tasks")
    evaluate.add_argument("--verifier", help="picks the best of several samples; a name or package.module:Class")
    evaluate.add_argument("--verifier-options", metavar="JSON", help="of the verifier, as an object")
    evaluate.add_argument(
        "--protocol", default="plain", choices=("plain", "mint"), help="mint: success after k turns, with feedback"
    )
    evaluate.add_argument("--turns", type=int, help="mint: the most turns; 5 if left out")
    evaluate.add_argument("--proposals", type=int, help="mint: answers to a task; 2 if left out")
    evaluate.add_argument(
        "--feedback", metavar="USER", help="mint: scripted (if left out), none, or the address of a server"
    )
    evaluate.add_argument("--feedback-model", help="mint: the model's name on that server")
    evaluate.add_argument("--feedback-key-env", help="mint: environment variable with that server's key")
    evaluate.add_argument("--url", help="of a server that speaks the OpenAI API; POLICY is the model's name there")
    evaluate.add_argument(
        "--api-key-env", help="environment variable with the server's key; OPENAI_API_KEY if there is one"
    )
    evaluate.add_argument("--json", type=Path, help="write the figures here")
    evaluate.add_argument("--page", type=Path, help="write an HTML page here")

    probe = command("probe", "Say what a policy knows of its world.", probe_command, dotted=True)
    probe.add_argument("policy", help="a run folder, a Hugging Face folder, or base")
    probe.add_argument("--recipe", help="where environment and limits come from; a run folder brings its own")
    probe.add_argument(
        "--split", default="validation", choices=("train", "validation", "test"), help="of the tasks that are played"
    )
    probe.add_argument("--episodes", type=int, default=200, help="that gaps are made in")
    probe.add_argument("--json", type=Path, help="write the figures here")

    play = command("play", "Play an environment yourself.", play_command, dotted=True)
    play.add_argument("environment", help="a built-in name or package.module:Class")
    play.add_argument("--seed", type=int, help="of the task; another one each time if left out")
    play.add_argument("--split", default="train", choices=("train", "validation", "test"), help="of the task")

    export = command("export", "Write the policy of a run's checkpoint as a Hugging Face folder.", export_command)
    export.add_argument("run_folder", metavar="RUN", type=Path, help="the run folder; the run may be at work")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="to write; must not exist yet")
    export.add_argument("--step", type=int, help="of the checkpoint; the newest if left out")

    report = command("report", "Write the HTML report of a run.", report_command)
    report.add_argument("run_folder", metavar="RUN", type=Path, help="the run folder; report.html is written there")

    diagnose = command("diagnose", "Say what is wrong with a run, and what to try.", diagnose_command)
    diagnose.add_argument("run_folder", metavar="RUN", type=Path, help="the run folder, of a finished run or not")
    diagnose.add_argument("--json", action="store_true", help="print JSON")

    command("envs", "List the environments.", envs_command)
    command("recipes", "List the recipes that come along.", recipes_command)

    check = command("check", "Say what is wrong with an environment.", check_command, dotted=True)
    check.add_argument("environment", help="a built-in name or package.module:Class")

    base = command("base", "Make the small base model.", base_command, dotted=True)
    base.add_argument("--output", type=Path, default=Path("base"), help="folder for the model; ./base if left out")
    return parser, flags


def without_dotted(words: Sequence[str], flags: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """Take ``--a.b value`` out of the words, before the value could pass for an argument of the command.

    Whatever is not one of the command's own flags is an option of the recipe or the environment.
    """
    if not words or words[0] not in flags:
        return list(words), []
    plain: list[str] = []
    dotted: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or name in flags[words[0]]:
            plain.append(word)
            continue
        dotted.append(word)
        if not equals and position < len(words) and not words[position].startswith("--"):
            dotted.append(words[position])
            position += 1
    return plain, dotted


def dotted_options(rest: Sequence[str]) -> dict[str, Any]:
    """``--a.b 3`` and ``--a.b=3`` as {"a.b": 3}; a flag without a value is true."""
    from rehearsal.training.recipe import parse_value

    values: dict[str, Any] = {}
    position = 0
    while position < len(rest):
        word = rest[position]
        if not word.startswith("--") or len(word) < 3:
            raise RecipeError(f"{word} is out of place: options look like --training.steps 30.")
        name, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            if position < len(rest) and not rest[position].startswith("--"):
                value = rest[position]
                position += 1
            else:
                value = "true"
        values[name.replace("-", "_")] = parse_value(value)
    return values
