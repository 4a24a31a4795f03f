"""Commands that show something: runs, recipes and environments."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def play_command(options: argparse.Namespace) -> int:
    from rehearsal.environments.play import play
    from rehearsal.environments.registry import make

    play(make(options.environment, **options.dotted), seed=options.seed, split=options.split)
    return 0


def report_command(options: argparse.Namespace) -> int:
    from rehearsal.reports import write_report

    Console().print(str(write_report(options.run_folder)), highlight=False, markup=False, soft_wrap=True)
    return 0


def diagnose_command(options: argparse.Namespace) -> int:
    from rehearsal.reports.diagnosis import diagnose, figure_words

    found = diagnose(options.run_folder)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    console = Console()
    if found.damaged:
        lines = "1 line" if found.damaged == 1 else f"{found.damaged} lines"
        console.print(f"[yellow]note[/] {lines} of metrics.jsonl could not be read and left out.", highlight=False)
    for one in found.verdicts:
        when = f"since step {one.began}" if one.ended is None else f"steps {one.began} to {one.ended}"
        console.print(f"[bold yellow]{escape(one.rule.title)}[/] ({when}, called at step {one.called})")
        console.print(f"  {escape(one.evidence)} {escape(one.rule.sentence)}", highlight=False)
        console.print(f"  [dim]Try:[/] {escape(one.rule.suggestion)}", highlight=False)
    if not found.verdicts:
        console.print(f"Nothing was found wrong in {found.steps} steps.", highlight=False)
    if found.unjudged:
        console.print(f"[dim]Not judged, for want of figures: {', '.join(found.unjudged)}.[/]", highlight=False)
    if found.too_early:
        console.print(f"[dim]Too early to judge: {', '.join(found.too_early)}.[/]", highlight=False)
    if found.steered:
        console.print(
            f"[dim]Not judged, because the curriculum chooses tasks by success: {', '.join(found.steered)}.[/]",
            highlight=False,
        )
    table = Table("", "start", "end", box=None, padding=(0, 2, 0, 0))
    for name, (start, end) in found.figures.items():
        table.add_row(figure_words(name), f"{start:.3g}", f"{end:.3g}")
    if found.figures:
        console.print(table)
    if found.ceiling:
        console.print(f"[yellow]note[/] What thoughts say of their prompt: {escape(found.ceiling)}", highlight=False)
    return 0


def envs_command(options: argparse.Namespace) -> int:
    from rehearsal.environments.registry import describe_all

    table = Table("name", "what it is", "parameters", box=None, padding=(0, 2, 0, 0))
    for name, text, params in describe_all():
        table.add_row(escape(name), escape(text), escape(params))
    Console().print(table)
    return 0


def recipes_command(options: argparse.Namespace) -> int:
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


def check_command(options: argparse.Namespace) -> int:
    from rehearsal.environments.check import check_env
    from rehearsal.environments.registry import make

    env = make(options.environment, **options.dotted)
    report = check_env(env)
    Console().print(str(report), highlight=False, markup=False, soft_wrap=True)
    return 0 if report.ok else 2
