"""Tasks from files of JSON lines and from Hugging Face data sets, and whether splits overlap."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import prompt_key
from rehearsal.rewards.verifier import Task
from rehearsal.texts import find_file, open_text, stem_of, suffix_of

_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Fields:
    """Where in a row the parts of a task stand.

    Attributes:
        prompt: name of a field, or a template with fields in braces, such as "Question: {question}".
        reference: name of a field; None for tasks without one.
        data: names of further fields for the verifier; all that are left if None.
    """

    prompt: str = "prompt"
    reference: str | None = "reference"
    data: Sequence[str] | None = None

    def task(self, row: Mapping[str, Any], where: str) -> Task:
        """The task of a row.

        Args:
            row: names and values.
            where: of the row, for messages.

        Raises:
            RewardError: for a field that is missing, or a prompt that is not a text.
        """
        prompt_fields = _template_fields(self.prompt)
        wanted = [*(prompt_fields or [self.prompt]), *(self.data or ())]
        if self.reference is not None:
            wanted.append(self.reference)
        for name in wanted:
            if name not in row:
                raise RewardError(f"{where} has no field {name!r}; it has: {', '.join(map(str, row)) or 'none'}.")
        prompt = self.prompt.format_map(row) if prompt_fields else row[self.prompt]
        if not isinstance(prompt, str) or not prompt.strip():
            raise RewardError(f"{where} has no text in the field {self.prompt!r}, from which the prompt comes.")
        used = {*(prompt_fields or [self.prompt]), self.reference}
        names = self.data if self.data is not None else [name for name in row if name not in used]
        reference = None if self.reference is None else row[self.reference]
        return Task(prompt, reference, {name: row[name] for name in names})


def load_tasks(
    source: str | Path, *, prompt: str = "prompt", reference: str | None = "reference",
    data: Sequence[str] | None = None, split: str = "train", config: str | None = None, limit: int | None = None,
) -> list[Task]:  # fmt: skip
    """Tasks of one split.

    Args:
        source: a file of JSON lines; a folder with one for each split, called ``SPLIT.jsonl``; or the name of a Hugging
            Face data set, or a folder that ``datasets`` saved. Files may be compressed, with ``.gz`` behind their name.
        prompt: name of the field with the prompt, or a template with fields in braces.
        reference: name of the field with the reference; None for tasks without one.
        data: further fields for the verifier; all that are left if None.
        split: of a folder or a data set; a file is one split, whatever this says.
        config: of a Hugging Face data set that has several.
        limit: the most tasks, from the start.

    Raises:
        RewardError: for a source, split, line or field that cannot be used, and where ``datasets`` is needed and not
            installed.
    """
    fields = Fields(prompt, reference, data)
    tasks: list[Task] = []
    for where, row in _rows(source, split, config):
        if limit is not None and len(tasks) >= limit:
            break
        tasks.append(fields.task(row, where))
    if not tasks:
        raise RewardError(f"There are no tasks in {source}.")
    return tasks


@dataclass(frozen=True)
class Overlap:
    """Prompts that two splits share.

    Attributes:
        first, second: names of the splits.
        pairs: positions in both, for each shared prompt the first of each.
        example: one shared prompt, "" if there is none.
    """

    first: str
    second: str
    pairs: tuple[tuple[int, int], ...]
    example: str


def overlaps(splits: Mapping[str, Sequence[Task]]) -> list[Overlap]:
    """The pairs of splits that share prompts, compared without case, spaces and punctuation at the ends."""
    positions: dict[str, dict[bytes, int]] = {}
    for name, tasks in splits.items():
        found: dict[bytes, int] = {}
        for index, task in enumerate(tasks):
            found.setdefault(hashlib.sha256(prompt_key(task.prompt).encode("utf-8", "surrogatepass")).digest(), index)
        positions[name] = found
    names = list(splits)
    result = []
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            shared = positions[first].keys() & positions[second].keys()
            if shared:
                pairs = sorted((positions[first][key], positions[second][key]) for key in shared)
                result.append(Overlap(first, second, tuple(pairs), splits[first][pairs[0][0]].prompt))
    return result


def check_disjoint(splits: Mapping[str, Sequence[Task]]) -> None:
    """Refuse splits that share prompts.

    Raises:
        RewardError: naming the splits, how many prompts they share, and one of them.
    """
    for overlap in overlaps(splits):
        raise RewardError(
            f"The splits {overlap.first} and {overlap.second} share {len(overlap.pairs)} prompts, such as "
            f"{overlap.example[:80]!r}; leave those out of one of them with without_overlap."
        )


def without_overlap(tasks: Sequence[Task], held_out: Sequence[Task]) -> list[Task]:
    """The tasks whose prompts are not in ``held_out``."""
    known = {prompt_key(task.prompt) for task in held_out}
    return [task for task in tasks if prompt_key(task.prompt) not in known]


def _template_fields(prompt: str) -> list[str]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as problem:
        raise RewardError(f"The template {prompt!r} cannot be read ({problem}); write {{{{ for a brace.") from problem
    for name in fields:
        if not name.isidentifier():
            raise RewardError(f"The template {prompt!r} needs plain names of fields in its braces, not {name!r}.")
    return fields


def _rows(source: str | Path, split: str, config: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        file = find_file(path / f"{split}.jsonl")
        if file is not None:
            yield from _json_lines(file)
            return
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            files = (found for found in path.glob("*.jsonl*") if suffix_of(found) == ".jsonl")
            there = ", ".join(sorted({stem_of(found) for found in files})) or "none"
            raise RewardError(f"There is no split {split!r} in {source}; files of JSON lines there: {there}.")
    elif path.is_file():
        yield from _json_lines(path)
        return
    elif suffix_of(path) in _SUFFIXES:
        raise RewardError(f"There is no file {source}.")
    yield from _data_set(source, split, config)


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"Line {number} of {path.name}"
                try:
                    row = json.loads(line)
                except ValueError as problem:
                    raise RewardError(f"{where} is not JSON ({problem}); each line must be one object.") from problem
                if not isinstance(row, dict):
                    raise RewardError(f"{where} is no JSON object but {type(row).__name__}.")
                yield where, row
    except UnicodeDecodeError as problem:
        raise RewardError(f"{path.name} is not text in UTF-8 ({problem.reason} at byte {problem.start}).") from problem
    except OSError as problem:
        raise RewardError(f"{path} cannot be read: {problem.strerror or problem}.") from problem


def _data_set(source: str | Path, split: str, config: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as problem:
        raise RewardError(
            f"{source} is no file; loading Hugging Face data sets needs: pip install 'rehearsal[datasets]'."
        ) from problem
    try:
        if Path(source).is_dir():
            loaded: Any = datasets.load_from_disk(str(source))
            if isinstance(loaded, Mapping):
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(str(source), config, split=split)
    except KeyError as problem:
        raise RewardError(f"The data set {source} has no split {split!r}; it has: {', '.join(loaded)}.") from problem
    except Exception as problem:
        told = str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__
        raise RewardError(f"The data set {source} cannot be loaded: {told}") from problem
    for number, row in enumerate(loaded):
        yield f"Row {number} of {source}", row
