"""Notes that an agent makes for itself within an episode."""

from __future__ import annotations

from collections.abc import Sequence

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.tools import Tool, ToolFailure, tool_from
from rehearsal.environments.episode import whole_number


class Notebook(ToolSource):
    """The tools ``write_note``, ``read_note`` and ``list_notes``. Every episode begins with an empty notebook.

    Args:
        max_notes: in an episode.
        max_characters: of a note.
    """

    fast = True

    def __init__(self, max_notes: int = 50, max_characters: int = 4000) -> None:
        self.max_notes = whole_number("max_notes", max_notes, 1, 10_000)
        self.max_characters = whole_number("max_characters", max_characters, 1, 1_000_000)

    def open(self) -> Sequence[Tool]:
        notes = Notes(self.max_notes, self.max_characters)
        return [tool_from(function, fast=True) for function in (notes.write_note, notes.read_note, notes.list_notes)]


class Notes:
    """The notes of one episode."""

    def __init__(self, max_notes: int, max_characters: int) -> None:
        self._notes: dict[str, str] = {}
        self._max_notes, self._max_characters = max_notes, max_characters

    def write_note(self, title: str, text: str) -> str:
        """Keeps a note for later; one of the same title is replaced.

        Args:
            title: what to find it by
            text: what to remember
        """
        title = _plain(title)
        if len(text) > self._max_characters:
            raise ToolFailure(f"the note has {len(text)} characters, and {self._max_characters} are allowed")
        if title not in self._notes and len(self._notes) >= self._max_notes:
            raise ToolFailure(f"the notebook is full with {self._max_notes} notes; write over one of them")
        self._notes[title] = text
        return f"Kept, {len(self._notes)} in all."

    def read_note(self, title: str) -> str:
        """Gives back a note.

        Args:
            title: as it was written
        """
        title = _plain(title)
        if title not in self._notes:
            raise ToolFailure(f"there is no note {title[:60]!r}; {self.list_notes()}")
        return self._notes[title]

    def list_notes(self) -> str:
        """Lists the titles of all notes."""
        return "Notes: " + "; ".join(self._notes) if self._notes else "There are no notes."


def _plain(title: str) -> str:
    title = " ".join(title.split())
    if not title:
        raise ToolFailure("a note needs a title")
    return title
