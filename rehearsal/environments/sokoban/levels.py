"""Levels from text files in the XSokoban format, which the public Boxoban sets use too.

Symbols: ``#`` wall, ``.`` target, ``$`` box, ``*`` box on target, ``@`` player, ``+`` player on target, space (or
``-`` or ``_``) floor. A line that starts with ``;`` and an empty line end a level; lines in other characters are
titles and comments.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rehearsal.environments.sokoban.rules import Level
from rehearsal.errors import RecipeError
from rehearsal.texts import open_text, suffix_of

_SYMBOLS = frozenset("#.$*@+ -_")


def parse_level(text: str) -> Level:
    """One level from its rows.

    What the player can never reach is filled with walls, so that levels that play alike read alike; a box outside
    that already stands on a target goes with it.

    Raises:
        RecipeError: where the board is not closed, has no single player, or boxes and targets that do not match.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    lines = [line[indent:] for line in lines]
    # A border of one cell around everything keeps floods and neighbours inside the numbering of cells.
    width, height = max(map(len, lines), default=0) + 2, len(lines) + 2
    walls = targets = boxes = 0
    players = []
    for row, line in enumerate(lines, start=1):
        for column, symbol in enumerate(line, start=1):
            cell = row * width + column
            if symbol not in _SYMBOLS:
                raise RecipeError(f"A Sokoban level has the unknown symbol {symbol!r}.")
            walls |= (symbol == "#") << cell
            targets |= (symbol in ".*+") << cell
            boxes |= (symbol in "$*") << cell
            if symbol in "@+":
                players.append(cell)
    if len(players) != 1:
        raise RecipeError(f"A Sokoban level must have one player, not {len(players)}.")
    inside, grown = 0, 1 << players[0]
    everywhere = (1 << width * height) - 1
    while grown != inside:
        inside = grown
        grown |= (inside << 1 | inside >> 1 | inside << width | inside >> width) & everywhere & ~walls
    if inside & _border(width, height):
        raise RecipeError("A Sokoban level must be closed in by walls.")
    if (boxes & ~inside) != (targets & ~inside):
        raise RecipeError("A Sokoban level has a box or a target that the player can never get to.")
    targets, boxes = targets & inside, boxes & inside
    if boxes.bit_count() != targets.bit_count() or not boxes:
        raise RecipeError(
            f"A Sokoban level must have as many boxes as targets, not {boxes.bit_count()} and {targets.bit_count()}."
        )
    if boxes == targets:
        raise RecipeError("A Sokoban level must not be solved from the start.")
    return _cropped(Level(width, height, everywhere & ~inside, targets, boxes, players[0]))


def parse_levels(text: str) -> list[Level]:
    """All levels of a text, in order; see the module for the format."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() and set(line.rstrip()) <= _SYMBOLS and "#" in line:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [parse_level("\n".join(block)) for block in blocks if block]


def read_levels(path: str | Path) -> tuple[Level, ...]:
    """All levels of a file, or of the ``.txt``, ``.xsb`` and ``.sok`` files of a folder and its sub-folders.

    A level that occurs twice is kept once. Files are read again only when they have changed.

    Raises:
        RecipeError: where there is no such file, it has no levels, or one of them is broken (file and level named).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if suffix_of(file) in (".txt", ".xsb", ".sok") and file.is_file()
        )
    elif path.is_file():
        files = [path]
    else:
        raise RecipeError(f"There is no file or folder of Sokoban levels at {path}.")
    levels: dict[str, Level] = {}
    for file in files:
        found = file.stat()
        for level in _read_file(str(file), found.st_mtime_ns, found.st_size):
            levels.setdefault(level.content, level)
    if not levels:
        raise RecipeError(f"There are no Sokoban levels in {path}.")
    return tuple(levels.values())


@lru_cache(maxsize=64)
def _read_file(path: str, modified: int, size: int) -> tuple[Level, ...]:
    """The levels of a file; its time and size are there to notice a change."""
    try:
        with open_text(Path(path)) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"The Sokoban levels in {path} cannot be read: {problem}.") from problem
    try:
        return tuple(parse_levels(text))
    except RecipeError as problem:
        raise RecipeError(f"In {path}: {problem}") from problem


def _border(width: int, height: int) -> int:
    row = (1 << width) - 1
    side = sum(1 << r * width | 1 << ((r + 1) * width - 1) for r in range(height))
    return row | row << (height - 1) * width | side


def _cropped(level: Level) -> Level:
    """The level with a single ring of walls around its floor."""
    cells = [divmod(cell, level.width) for cell in range(level.width * level.height) if level.floor >> cell & 1]
    top, bottom = min(r for r, _ in cells) - 1, max(r for r, _ in cells) + 1
    left, right = min(c for _, c in cells) - 1, max(c for _, c in cells) + 1
    width, height = right - left + 1, bottom - top + 1

    def cropped(mask: int) -> int:
        rows = range(top, bottom + 1)
        return sum(((mask >> (row * level.width + left)) & ((1 << width) - 1)) << (row - top) * width for row in rows)

    row, column = divmod(level.player, level.width)
    return Level(
        width,
        height,
        cropped(level.walls),
        cropped(level.targets),
        cropped(level.boxes),
        (row - top) * width + column - left,
    )
