"""Episodes on disk: one Parquet file a phase and step, one row an episode, nothing lost on the way.

Any Parquet reader can open the files; ``docs/trajectories.md`` shows how. The columns:

=================== ==================== =============================================================================
column              type                 meaning
=================== ==================== =============================================================================
phase               string               "train" or "eval"
step                int64                the training step that the episodes were played at
group, sample       int32                which group of the file, and which episode of that group
environment         string               id of the environment
seed                int64                what the environment was reset with
split, task         string               the split, and the key of the task's content
reward              double               sum over turns, penalties included; null for a failed episode
success             bool                 null where the environment cannot tell
stop_reason, error  string               why it ended, and a sentence if it failed
n_turns             int32                exchanges
n_tokens, n_sampled int32                tokens of all segments, and those that the policy sampled
policy_step         int64                the optimiser step of the policy that played it
segments            list<struct>         token_ids list<int32>, logprobs list<float32> (NaN where not sampled), kinds
                                         list<int8> (``rehearsal.trajectory.Kind``), turns list<int16>
turns               list<struct>         observation, notice, response, thought (string), actions, executed
                                         (list<string>), rewards (list<double>), penalty (double), valid (bool), stop,
                                         state (string), calls (list<struct>: name, arguments as JSON, result, error
                                         (string) and cost (double)), parts, shaping (map<string, double>),
                                         violations, obligations (list<string>); older files lack some of these
final_observation   string               the environment's last words
counters            map<string, double>  numbers worth adding up, by name
advantage           double               of the episode; null where it has none
=================== ==================== =============================================================================

Columns that the caller adds follow at the end. The schema's metadata holds ``rehearsal.format`` (the version of this
layout) and ``rehearsal.groups`` (the size of every group, empty ones included, as a JSON list).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rehearsal.errors import CheckpointError
from rehearsal.training.storage import replacing, storage_errors
from rehearsal.trajectory import Group, SampleStop, Segment, StopReason, ToolCall, Trajectory, Turn, all_trajectories

FORMAT = 1
"""Version of the layout; a file of a later version is refused rather than misread."""

_SEGMENT_ARRAYS: dict[str, pa.DataType] = {
    "token_ids": pa.int32(),
    "logprobs": pa.float32(),
    "kinds": pa.int8(),
    "turns": pa.int16(),
}
_TEXTS = pa.list_(pa.string())
_NUMBERS = pa.map_(pa.string(), pa.float64())
_CALL = pa.struct(
    {"name": pa.string(), "arguments": pa.string(), "result": pa.string(), "error": pa.string(), "cost": pa.float64()}
)
_TURN_FIELDS: dict[str, pa.DataType] = {
    "observation": pa.string(),
    "notice": pa.string(),
    "response": pa.string(),
    "thought": pa.string(),
    "actions": _TEXTS,
    "executed": _TEXTS,
    "rewards": pa.list_(pa.float64()),
    "penalty": pa.float64(),
    "valid": pa.bool_(),
    "stop": pa.string(),
    "state": pa.string(),
    "calls": pa.list_(_CALL),
    "parts": _NUMBERS,
    "violations": _TEXTS,
    "obligations": _TEXTS,
    "shaping": _NUMBERS,
}
_ADDED_LATER = {"calls", "parts", "violations", "obligations", "shaping"}
"""Fields of a turn that files of this version may lack."""
_SCALARS: dict[str, tuple[pa.DataType, Callable[[Trajectory], Any]]] = {
    "environment": (pa.string(), lambda one: one.environment),
    "seed": (pa.int64(), lambda one: int(one.seed)),
    "split": (pa.string(), lambda one: one.split),
    "task": (pa.string(), lambda one: one.task),
    "topic": (pa.string(), lambda one: one.topic),
    "category": (pa.string(), lambda one: one.category),
    "reward": (pa.float64(), lambda one: None if one.failed else one.reward),
    "success": (pa.bool_(), lambda one: None if one.success is None else bool(one.success)),
    "stop_reason": (pa.string(), lambda one: one.stop_reason.value),
    "error": (pa.string(), lambda one: one.error),
    "n_turns": (pa.int32(), lambda one: len(one.turns)),
    "n_tokens": (pa.int32(), lambda one: one.n_tokens),
    "n_sampled": (pa.int32(), lambda one: one.n_sampled),
    "policy_step": (pa.int64(), lambda one: int(one.policy_step)),
}
_STORED = (
    "environment", "seed", "split", "task", "topic", "category", "success", "error", "policy_step", "final_observation",
)  # fmt: skip
"""The fields of a trajectory that are read back as they are."""
_STORED_LATER = {"category"}
"""Those of them that files of this version may lack."""


def write_trajectories(
    path: str | Path,
    groups: Sequence[Group],
    phase: str,
    step: int,
    extra: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
) -> None:
    """Write groups to a Parquet file (zstd), atomically.

    Text that UTF-8 cannot hold (half of a surrogate pair) is stored as its escape, ``\\udc80``; everything else comes
    back from :func:`read_trajectories` as it was.

    Args:
        path: the file; its folder is made if it is missing.
        groups: in the order in which they should come back.
        phase: "train" or "eval".
        step: the training step.
        extra: columns by name, each with one value an episode in the order of
            :func:`rehearsal.trajectory.all_trajectories`: "advantage", "kept" or anything else that Arrow has a type
            for. NaN becomes null.

    Raises:
        CheckpointError: if the file cannot be written; an earlier file of that name is then still there.
        ValueError: if an extra column has the wrong length or the name of a fixed one.
    """
    path = Path(path)
    episodes = all_trajectories(groups)
    columns: dict[str, pa.Array] = {
        "phase": pa.array([phase] * len(episodes), pa.string()),
        "step": pa.array([step] * len(episodes), pa.int64()),
        "group": pa.array([index for index, group in enumerate(groups) for _ in group], pa.int32()),
        "sample": pa.array([one.sample for one in episodes], pa.int32()),
    }
    for name, (type_, get) in _SCALARS.items():
        columns[name] = _array([get(one) for one in episodes], type_)
    columns["segments"] = _segments_array(episodes)
    columns["turns"] = _turns_array(episodes)
    columns["final_observation"] = _array([one.final_observation for one in episodes], pa.string())
    columns["counters"] = pa.array(
        [[(key, float(value)) for key, value in one.counters.items()] for one in episodes],
        pa.map_(pa.string(), pa.float64()),
    )
    columns["advantage"] = pa.nulls(len(episodes), pa.float64())
    for name, values in (extra or {}).items():
        if name in columns and name != "advantage":
            raise ValueError(f"{name!r} is a fixed column of trajectory files and cannot be an extra one")
        if len(values) != len(episodes):
            raise ValueError(f"the extra column {name!r} has {len(values)} values for {len(episodes)} episodes")
        type_ = pa.float64() if name == "advantage" else None
        columns[name] = pa.array(values, type=type_, from_pandas=True)
    metadata = {"rehearsal.format": str(FORMAT), "rehearsal.groups": json.dumps([len(group) for group in groups])}
    table = pa.table(columns).replace_schema_metadata(metadata)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        # Dictionaries pay for texts that repeat; for token arrays they cost time and save nothing over zstd.
        texts = [column.name for column in table.schema if column.type == pa.string()]
        pq.write_table(table, aside, compression="zstd", use_dictionary=texts, write_statistics=texts)


def read_trajectories(path: str | Path) -> list[Group]:
    """Read what :func:`write_trajectories` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged or of a later version.
    """
    path = Path(path)
    table = read_table(path)
    try:
        sizes = json.loads((table.schema.metadata or {})[b"rehearsal.groups"])
        episodes = _episodes(table.combine_chunks())
        if sum(sizes) != len(episodes):
            raise ValueError(f"{len(episodes)} episodes, but groups of {sizes}")
    except (pa.ArrowException, KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is not a whole trajectory file; remove it to go on without it.") from error
    bounds = np.cumsum([0, *sizes])
    return [Group(episodes[start:stop]) for start, stop in itertools.pairwise(bounds)]


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The file as an Arrow table; with ``columns``, only these are read from disk.

    Raises:
        CheckpointError: if the file is missing, damaged, of a later version, or lacks one of ``columns``.
    """
    path = Path(path)
    try:
        with storage_errors(path, writing=False), pq.ParquetFile(path) as file:
            version = int((file.schema_arrow.metadata or {}).get(b"rehearsal.format", b"0"))
            missing = set(columns or ()) - set(file.schema_arrow.names)
            table = file.read(columns=None if columns is None else list(columns))
    except CheckpointError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no Parquet file and cannot be read; remove it to go on without it."
        ) from error
    if version < 1:
        raise CheckpointError(f"{path} is a Parquet file, but none with trajectories; check the name.")
    if version > FORMAT:
        raise CheckpointError(f"{path} was written by a later version of Rehearsal; update to read it.")
    if missing:
        raise CheckpointError(f"{path} has no column {sorted(missing)[0]!r}.")
    return table


def _calls_to_store(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [{**vars(call), "arguments": json.dumps(dict(call.arguments), default=str)} for call in calls]


def _calls_from_store(calls: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
    return [ToolCall(**{**call, "arguments": json.loads(call["arguments"])}) for call in calls]


def _pairs(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, float(number)) for name, number in numbers.items()]


_TO_STORE: dict[str, Callable[[Any], Any]] = {
    "stop": lambda stop: stop.value, "calls": _calls_to_store, "parts": _pairs, "shaping": _pairs,
}  # fmt: skip
_FROM_STORE: dict[str, Callable[[Any], Any]] = {
    "stop": SampleStop, "calls": _calls_from_store, "parts": dict, "shaping": dict,
}  # fmt: skip


def _array(values: list[Any], type_: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, type_)
    except UnicodeEncodeError:
        return pa.array(_without_surrogates(values), type_)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32), pa.int32())


def _segments_array(episodes: Sequence[Trajectory]) -> pa.Array:
    """Built from whole token arrays rather than Python numbers: this is where nearly all of the data is."""
    segments = [segment for one in episodes for segment in one.segments]
    offsets = _offsets([len(segment) for segment in segments])
    lists = []
    for name, type_ in _SEGMENT_ARRAYS.items():
        parts = [getattr(segment, name) for segment in segments]
        flat = np.concatenate(parts) if parts else np.empty(0, type_.to_pandas_dtype())
        lists.append(pa.ListArray.from_arrays(offsets, pa.array(flat, type_)))
    structs = pa.StructArray.from_arrays(lists, names=list(_SEGMENT_ARRAYS))
    return pa.ListArray.from_arrays(_offsets([len(one.segments) for one in episodes]), structs)


def _turns_array(episodes: Sequence[Trajectory]) -> pa.Array:
    turns = [turn for one in episodes for turn in one.turns]
    arrays = []
    for name, type_ in _TURN_FIELDS.items():
        values = [_TO_STORE[name](getattr(turn, name)) if name in _TO_STORE else getattr(turn, name) for turn in turns]
        arrays.append(_array(values, type_))
    structs = pa.StructArray.from_arrays(arrays, names=list(_TURN_FIELDS))
    return pa.ListArray.from_arrays(_offsets([len(one.turns) for one in episodes]), structs)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _bounds(array: pa.Array) -> Iterator[slice]:
    offsets = array.offsets.to_numpy()
    return (slice(int(start), int(stop)) for start, stop in itertools.pairwise(offsets))


def _episodes(table: pa.Table) -> list[Trajectory]:
    stored = [name for name in _STORED if name not in _STORED_LATER or name in table.column_names]
    columns = {name: table.column(name).to_pylist() for name in (*stored, "sample", "stop_reason", "counters")}
    segments, turns = _read_segments(_column(table, "segments")), _read_turns(_column(table, "turns"))
    return [
        Trajectory(
            **{name: columns[name][row] for name in stored},
            sample=columns["sample"][row],
            stop_reason=StopReason(columns["stop_reason"][row]),
            counters=dict(columns["counters"][row]),
            segments=segments[row],
            turns=turns[row],
        )
        for row in range(table.num_rows)
    ]


def _read_segments(column: pa.ListArray) -> list[list[Segment]]:
    structs = column.values
    arrays = {name: structs.field(name).values.to_numpy() for name in _SEGMENT_ARRAYS}
    # Copies, so that one kept segment does not keep the whole file in memory, and can be written to.
    segments = [
        Segment(**{name: values[part].copy() for name, values in arrays.items()})
        for part in _bounds(structs.field("token_ids"))
    ]
    return [segments[part] for part in _bounds(column)]


def _read_turns(column: pa.ListArray) -> list[list[Turn]]:
    structs = column.values
    # Files from before a field was added have turns without it.
    stored = {structs.type.field(index).name for index in range(structs.type.num_fields)}
    missing = set(_TURN_FIELDS) - stored - _ADDED_LATER
    if missing:
        raise ValueError(f"turns without {sorted(missing)[0]}")
    values = {name: structs.field(name).to_pylist() for name in _TURN_FIELDS if name in stored}
    for name, convert in _FROM_STORE.items():
        if name in values:
            values[name] = [convert(value) for value in values[name]]
    turns = [Turn(**dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True)]
    return [turns[part] for part in _bounds(column)]
