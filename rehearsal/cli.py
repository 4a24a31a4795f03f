"""The command line: ``rehearsal train``, ``eval``, ``play``, ``report``, ``diagnose`` and the rest."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rehearsal import __version__
from rehearsal.errors import RecipeError, RehearsalError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 where the user can mend what is wrong, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, flags = _parser()
    plain, dotted = _without_dotted(given, flags)
    options, rest = parser.parse_known_args(plain)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    console = Console(stderr=True)
    try:
        if (dotted or rest) and not getattr(options, "takes_dotted", False):
            raise RecipeError(f"{[*dotted, *rest][0]} is not an option of `rehearsal {given[0]}`; try --help.")
        options.dotted = _dotted([*dotted, *rest])
        options.command_line = "rehearsal " + shlex.join(given)
        return int(options.run(options) or 0)
    except RehearsalError as error:
        console.print(f"[bold red]error[/] {escape(_as_sentence(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped.", highlight=False)
        return 130
    except BrokenPipeError:
        return 0


def _as_sentence(error: RehearsalError) -> str:
    # Some end with what a library said, which may bring its own lines and no full stop.
    text = " ".join(str(error).split())
    return text if text.endswith((".", "?", "!")) else f"{text}."


class _CommandParser(argparse.ArgumentParser):
    """Remembers its own flags, to tell them from the options of a recipe or an environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flags: set[str] = set()
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        self.flags.update(name for name in names if name.startswith("-"))
        return super().add_argument(*names, **kwargs)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, set[str]]]:
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

    train = command("train", "Train an agent in an environment.", _train, dotted=True)
    train.add_argument("recipe", nargs="?", help="a built-in recipe or a TOML file; without one the defaults")
    train.add_argument("--output", type=Path, help="run folder; runs/NAME if left out")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run")
    train.add_argument("--overwrite", action="store_true", help="delete an earlier run in --output first")
    train.add_argument("--dry-run", action="store_true", help="show the resolved recipe and its memory, and stop")
    train.add_argument("--options", action="store_true", help="list all dotted options, and stop")
    train.epilog = "Any option of the recipe can be given by its dotted name: --training.steps 30"

    evaluate = command("eval", "Play held-out tasks with a policy.", _eval, dotted=True)
    evaluate.add_argument("policy", help="a run folder, a Hugging Face folder, or base")
    evaluate.add_argument("--recipe", help="where environment and limits come from; a run folder brings its own")
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument("--episodes", type=int, default=256)
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

    probe = command("probe", "Say what a policy knows of its world.", _probe, dotted=True)
    probe.add_argument("policy", help="a run folder, a Hugging Face folder, or base")
    probe.add_argument("--recipe", help="where environment and limits come from; a run folder brings its own")
    probe.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    probe.add_argument("--episodes", type=int, default=200, help="that gaps are made in")
    probe.add_argument("--json", type=Path, help="write the figures here")

    play = command("play", "Play an environment yourself.", _play, dotted=True)
    play.add_argument("environment", help="a built-in name or package.module:Class")
    play.add_argument("--seed", type=int)
    play.add_argument("--split", default="train", choices=("train", "validation", "test"))

    report = command("report", "Write the HTML report of a run.", _report)
    report.add_argument("run_folder", metavar="RUN", type=Path)

    diagnose = command("diagnose", "Say what is wrong with a run, and what to try.", _diagnose)
    diagnose.add_argument("run_folder", metavar="RUN", type=Path)
    diagnose.add_argument("--json", action="store_true", help="print JSON")

    command("envs", "List the environments.", _envs)
    command("recipes", "List the recipes that come along.", _recipes)

    check = command("check", "Say what is wrong with an environment.", _check, dotted=True)
    check.add_argument("environment", help="a built-in name or package.module:Class")

    base = command("base", "Make the small base model.", _base, dotted=True)
    base.add_argument("--output", type=Path, default=Path("base"), help="folder for the model; ./base if left out")
    return parser, flags


def _without_dotted(words: Sequence[str], flags: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
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


def _dotted(rest: Sequence[str]) -> dict[str, Any]:
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


# Commands


def _train(options: argparse.Namespace) -> int:
    from rehearsal.display import TerminalObserver, closing_line
    from rehearsal.reports import write_report
    from rehearsal.training.recipe import resolve_recipe
    from rehearsal.training.run import train
    from rehearsal.training.runs import RunFolder

    console = Console()
    if options.options:
        _list_options(console)
        return 0
    resume = options.resume is not None
    output = options.resume if resume else options.output
    if resume and options.output is not None:
        raise RecipeError("--resume already names the run folder; leave --output out.")
    source: Any = options.recipe
    if resume:
        RunFolder.open(options.resume)
        source = options.resume / "recipe.toml" if source is None else source
    recipe = resolve_recipe(source, options.dotted)
    if options.dry_run:
        from rehearsal.training.plan import describe_plan

        console.print(recipe.to_toml(), highlight=False, markup=False)
        console.print(describe_plan(recipe), highlight=False, markup=False)
        return 0
    if options.overwrite and output is not None and not resume:
        _remove_run(output)
    observer = TerminalObserver(console)
    try:
        result = train(recipe, output=output, resume=resume, observer=observer, command=options.command_line)
    finally:
        observer.close()
    report = write_report(result.path)
    console.print(closing_line(result.summary, report), highlight=False, markup=False, soft_wrap=True)
    return 0


def _remove_run(path: Path) -> None:
    if not path.is_dir():
        return  # what else may be there is told when the run begins
    if not (path / "run.json").is_file() and any(path.iterdir()):
        raise RecipeError(f"{path} is not a run folder, so --overwrite does not delete it; choose another --output.")
    from rehearsal.training.runs import RunFolder

    if (path / "run.json").is_file() and RunFolder.open(path).in_use:
        raise RecipeError(f"Another process writes to {path}; stop it first, or choose another --output.")
    shutil.rmtree(path)


def _list_options(console: Console) -> None:
    from rehearsal.training.recipe import option_names

    table = Table("option", "type", "default", "what it does", box=None, padding=(0, 2, 0, 0))
    for name, info in option_names().items():
        default = info.get_default(call_default_factory=True)
        table.add_row(
            f"--{name}", _type_name(info.annotation), "" if default is None else str(default), info.description
        )
    console.print(table)


def _type_name(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if getattr(annotation, "__origin__", None) in (dict, list):
        return str(annotation.__origin__.__name__)
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return "|".join(arguments)
    if arguments:
        return "|".join(_type_name(argument) for argument in arguments)
    return str(getattr(annotation, "__name__", annotation))


def _eval(options: argparse.Namespace) -> int:
    from rehearsal.reports.evaluation import check_page, evaluation_parts, write_evaluation_page

    if options.page is not None:
        check_page(options.page)
    figures = _mint(options) if options.protocol == "mint" else _plain_evaluation(options)
    console = Console()
    for part in evaluation_parts(figures, options.against or ""):
        headless = not any(part.columns)
        table = Table(
            *part.columns, box=None, show_header=not headless, padding=(0, 2, 0, 0),
            title=None if part.title == "Result" else part.title, title_justify="left", title_style="bold",
        )  # fmt: skip
        for row in part.rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.page is not None:
        about = {"policy": options.policy, "recipe": options.recipe, "split": options.split, "against": options.against,
                 "command": options.command_line}  # fmt: skip
        write_evaluation_page(options.page, figures, {name: str(value) for name, value in about.items() if value})
    return 0


def _plain_evaluation(options: argparse.Namespace) -> dict[str, float]:
    from rehearsal.evaluation.run import evaluate_policy

    for name in ("turns", "proposals", "feedback", "feedback_model", "feedback_key_env"):
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} goes with --protocol mint.")
    if options.verifier_options is not None and options.verifier is None:
        raise RecipeError("--verifier-options needs a --verifier.")
    if options.verifier is not None and options.samples < 2:
        raise RecipeError("A --verifier picks among several samples of a task: add --samples 4.")
    return evaluate_policy(
        options.policy, recipe=options.recipe, overrides=options.dotted, split=options.split, episodes=options.episodes,
        temperature=1.0 if options.temperature is None else options.temperature, samples=options.samples,
        against=options.against, url=options.url, api_key_env=options.api_key_env, verifier=options.verifier,
        verifier_options=_object("--verifier-options", options.verifier_options),
    )  # fmt: skip


def _mint(options: argparse.Namespace) -> dict[str, float]:
    from rehearsal.evaluation.run import evaluate_mint

    for name in ("against", "verifier", "verifier_options"):
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} does not go with --protocol mint.")
    given = {name: getattr(options, name) for name in ("turns", "proposals", "feedback", "temperature")}
    return evaluate_mint(
        options.policy, recipe=options.recipe, overrides=options.dotted, split=options.split, episodes=options.episodes,
        feedback_model=options.feedback_model, feedback_key_env=options.feedback_key_env, samples=options.samples,
        url=options.url, api_key_env=options.api_key_env,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


def _object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as problem:
        raise RecipeError(f"{flag} is not JSON: {problem}.") from problem
    if not isinstance(value, dict):
        raise RecipeError(f'{flag} must be an object, such as \'{{"pattern": "[0-9]+"}}\'.')
    return value


def _probe(options: argparse.Namespace) -> int:
    from rehearsal.display import probe_tables
    from rehearsal.evaluation.probe import probe_policy

    figures = probe_policy(
        options.policy, recipe=options.recipe, overrides=options.dotted, split=options.split, count=options.episodes
    )
    console = Console()
    for table in probe_tables(figures):
        console.print(table, highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _play(options: argparse.Namespace) -> int:
    from rehearsal.environments.play import play
    from rehearsal.environments.registry import make

    play(make(options.environment, **options.dotted), seed=options.seed, split=options.split)
    return 0


def _report(options: argparse.Namespace) -> int:
    from rehearsal.reports import write_report

    Console().print(str(write_report(options.run_folder)), highlight=False, markup=False, soft_wrap=True)
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from rehearsal.reports.diagnosis import diagnose, figure_words

    found = diagnose(options.run_folder)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    console = Console()
    if found.damaged:
        console.print(f"[yellow]note[/] {found.damaged} lines of metrics.jsonl could not be read and were left out.")
    for one in found.verdicts:
        when = f"since step {one.began}" if one.ended is None else f"steps {one.began} to {one.ended}"
        console.print(f"[bold yellow]{escape(one.rule.title)}[/] ({when}, called at step {one.called})")
        console.print(f"  {escape(one.evidence)} {escape(one.rule.sentence)}", highlight=False)
        console.print(f"  [dim]Try:[/] {escape(one.rule.suggestion)}", highlight=False)
    if not found.verdicts:
        console.print(f"Nothing was found wrong in {found.steps} steps.", highlight=False)
    if found.unjudged:
        console.print(f"[dim]Not judged, for want of figures: {', '.join(found.unjudged)}.[/]", highlight=False)
    table = Table("", "start", "end", box=None, padding=(0, 2, 0, 0))
    for name, (start, end) in found.figures.items():
        table.add_row(figure_words(name), f"{start:.3g}", f"{end:.3g}")
    if found.figures:
        console.print(table)
    return 0


def _envs(options: argparse.Namespace) -> int:
    from rehearsal.environments.registry import describe_all

    table = Table("name", "what it is", "parameters", box=None, padding=(0, 2, 0, 0))
    for name, text, params in describe_all():
        table.add_row(escape(name), escape(text), escape(params))
    Console().print(table)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from rehearsal.training.recipe import built_in_recipes, read_recipe

    table = Table("name", "environment", "algorithm", "steps", box=None, padding=(0, 2, 0, 0))
    for name in built_in_recipes():
        values = read_recipe(name)
        table.add_row(
            name, values.get("environment", {}).get("name", "frozenlake"),
            values.get("algorithm", {}).get("name", "grpo"), str(values.get("training", {}).get("steps", "")),
        )  # fmt: skip
    Console().print(table)
    return 0


def _check(options: argparse.Namespace) -> int:
    from rehearsal.environments.check import check_env
    from rehearsal.environments.registry import make

    env = make(options.environment, **options.dotted)
    report = check_env(env)
    Console().print(str(report), highlight=False, markup=False, soft_wrap=True)
    return 0 if report.ok else 2


def _base(options: argparse.Namespace) -> int:
    from rehearsal.training.base_model import make_base_command

    return make_base_command(options.output, options.dotted)


if __name__ == "__main__":
    sys.exit(main())
