"""The command line: ``rehearsal train``, ``eval``, ``play``, ``report``, ``diagnose`` and the rest."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from rehearsal.cli.parser import dotted_options, make_parser, without_dotted
from rehearsal.errors import RecipeError, RehearsalError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 where the user can mend what is wrong, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, flags = make_parser()
    plain, dotted = without_dotted(given, flags)
    options, rest = parser.parse_known_args(plain)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    console = Console(stderr=True)
    try:
        if (dotted or rest) and not getattr(options, "takes_dotted", False):
            raise RecipeError(f"{[*dotted, *rest][0]} is not an option of `rehearsal {given[0]}`; try --help.")
        options.dotted = dotted_options([*dotted, *rest])
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
