"""Commands that make a model: ``train``, ``export`` and ``base``."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from rehearsal.errors import RecipeError


def train_command(options: argparse.Namespace) -> int:
    from rehearsal.display import TerminalObserver, closing_line
    from rehearsal.reports import write_report
    from rehearsal.training.recipe import resolve_recipe
    from rehearsal.training.resuming import resumed_recipe
    from rehearsal.training.run import train

    console = Console()
    if options.options:
        _list_options(console)
        return 0
    resume = options.resume is not None
    output = options.resume if resume else options.output
    if resume and options.output is not None:
        raise RecipeError("--resume already names the run folder; leave --output out.")
    if resume and options.recipe is not None:
        raise RecipeError(
            f"--resume goes on with the recipe that is stored in {output}; leave {options.recipe} out, and give only "
            "options that change, such as --training.steps 120."
        )
    if options.overwrite and options.output is None:
        raise RecipeError("--overwrite deletes an earlier run in --output: name its folder.")
    recipe = resumed_recipe(output, None, options.dotted) if resume else resolve_recipe(options.recipe, options.dotted)
    if options.dry_run:
        from rehearsal.training.plan import describe_plan

        console.print(recipe.to_toml(), highlight=False, markup=False)
        console.print(describe_plan(recipe), highlight=False, markup=False)
        return 0
    observer = TerminalObserver(console)
    try:
        result = train(
            recipe, output=output, resume=resume, overwrite=options.overwrite, observer=observer,
            command=options.command_line,
        )  # fmt: skip
    finally:
        observer.close()
    report = write_report(result.path)
    console.print(closing_line(result.summary, report), highlight=False, markup=False, soft_wrap=True)
    return 0


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


def export_command(options: argparse.Namespace) -> int:
    from rehearsal.training.export import export_policy

    folder = export_policy(options.run_folder, options.folder, options.step)
    Console().print(str(folder), highlight=False, markup=False, soft_wrap=True)
    return 0


def base_command(options: argparse.Namespace) -> int:
    from rehearsal.training.base_model import make_base_command

    return make_base_command(options.output, options.dotted)
