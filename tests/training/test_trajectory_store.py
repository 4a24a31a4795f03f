"""Trajectory files give back exactly what they were given, and say so when they cannot."""

import contextlib
import errno
import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rehearsal.errors import CheckpointError
from rehearsal.training import storage
from rehearsal.training.trajectory_store import read_table, read_trajectories, write_trajectories
from rehearsal.trajectory import Group, Kind, SampleStop, Segment, StopReason, ToolCall, Trajectory, Turn

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(allow_nan=False)


@st.composite
def a_segment(draw: st.DrawFn) -> Segment:
    size = draw(st.integers(0, 6))
    return Segment(
        draw(hnp.arrays(np.int32, size)),
        draw(hnp.arrays(np.float32, size, elements=st.floats(width=32))),
        draw(hnp.arrays(np.int8, size, elements=st.integers(0, 5))),
        draw(hnp.arrays(np.int16, size)),
    )


A_TURN = st.builds(
    Turn,
    observation=TEXT,
    notice=TEXT,
    response=TEXT,
    thought=TEXT,
    actions=st.lists(TEXT, max_size=3),
    executed=st.lists(TEXT, max_size=3),
    rewards=st.lists(NUMBER, max_size=3),
    penalty=NUMBER,
    valid=st.booleans(),
    stop=st.sampled_from(SampleStop),
    state=TEXT,
    calls=st.lists(
        st.builds(
            ToolCall, name=TEXT, arguments=st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT, max_size=2)),
            result=TEXT, error=TEXT, cost=NUMBER,
        ),
        max_size=2,
    ),
    parts=st.dictionaries(TEXT, NUMBER, max_size=2),
    violations=st.lists(TEXT, max_size=2),
    obligations=st.lists(TEXT, max_size=2),
    shaping=st.dictionaries(TEXT, NUMBER, max_size=2),
)  # fmt: skip
AN_EPISODE = st.builds(
    Trajectory,
    environment=TEXT,
    seed=st.integers(-(2**63), 2**63 - 1),
    split=TEXT,
    task=TEXT,
    topic=TEXT,
    category=TEXT,
    sample=st.integers(0, 1000),
    segments=st.lists(a_segment(), max_size=3),
    turns=st.lists(A_TURN, max_size=3),
    stop_reason=st.sampled_from(StopReason),
    success=st.sampled_from([None, True, False]),
    error=TEXT,
    final_observation=TEXT,
    counters=st.dictionaries(TEXT, NUMBER, max_size=3),
    policy_step=st.integers(0, 2**40),
)


def comparable(group: Group) -> list[dict[str, Any]]:
    """Plain values with arrays as bytes and type, so that NaN equals NaN and a lost bit does not pass."""
    rows = []
    for episode in group:
        row = asdict(episode)
        for segment in row["segments"]:
            for name, values in segment.items():
                bits = np.where(np.isnan(values), np.float32(0.25), values) if name == "logprobs" else values
                nan = np.isnan(values).tolist() if name == "logprobs" else None
                segment[name] = (str(values.dtype), bits.tobytes(), nan)
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(AN_EPISODE, max_size=3).map(Group), max_size=3))
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, groups: list[Group]) -> None:
    file = tmp_path_factory.mktemp("store") / "train_000001.parquet"
    write_trajectories(file, groups, "train", 1)
    back = read_trajectories(file)
    assert [comparable(group) for group in back] == [comparable(group) for group in groups]
    for group in back:
        for episode in group:
            assert isinstance(episode.stop_reason, StopReason)
            assert all(isinstance(turn.stop, SampleStop) for turn in episode.turns)


def lake_episode(sample: int = 0, **changes: Any) -> Trajectory:
    kinds = np.array([Kind.SYSTEM, Kind.OBSERVATION, Kind.THOUGHT, Kind.ACTION])
    segment = Segment(np.arange(4), np.array([np.nan, np.nan, -0.5, -0.25]), kinds, np.zeros(4))
    turn = Turn("S F\nF G", response="<think>go</think>Right", thought="go", actions=["Right"], rewards=[1.0])
    values: dict[str, Any] = {"segments": [segment], "turns": [turn], "success": True, "sample": sample}
    return Trajectory("frozenlake", 7, task="SFFG", **{**values, **changes})


def test_columns_are_those_that_the_page_promises(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "eval_000010.parquet"
    failed = lake_episode(1, stop_reason=StopReason.ERROR, error="it raised", success=None)
    groups = [Group([lake_episode(), failed]), Group([lake_episode()])]
    write_trajectories(file, groups, "eval", 10, {"advantage": [0.5, math.nan, -0.5], "kept": [True, False, True]})
    table = read_table(file)
    assert table.column("phase").to_pylist() == ["eval"] * 3
    assert table.column("step").to_pylist() == [10] * 3
    assert table.column("group").to_pylist() == [0, 0, 1]
    assert table.column("reward").to_pylist() == [1.0, None, 1.0]
    assert table.column("success").to_pylist() == [True, None, True]
    assert table.column("n_tokens").to_pylist() == [4, 4, 4]
    assert table.column("n_sampled").to_pylist() == [2, 2, 2]
    assert table.column("advantage").to_pylist() == [0.5, None, -0.5]
    assert table.column("kept").to_pylist() == [True, False, True]
    segment = table.schema.field("segments").type.value_type
    assert {one.name: one.type.value_type for one in segment} == {
        "token_ids": pa.int32(),
        "logprobs": pa.float32(),
        "kinds": pa.int8(),
        "turns": pa.int16(),
    }
    assert table.schema.field("counters").type == pa.map_(pa.string(), pa.float64())
    compression = pq.ParquetFile(file).metadata.row_group(0).column(0).compression
    assert compression == "ZSTD"
    assert len(read_trajectories(file)) == 2
    frame = table.to_pandas()
    assert frame["turns"][0][0]["observation"] == "S F\nF G"


@pytest.fixture
def in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files that the page reads: three episodes trained on, of which one answer was of no use, and
    two held out, of which one succeeded."""
    stored = tmp_path / "runs" / "lake" / "trajectories"
    unusable = lake_episode(1, turns=[Turn("S F", response="What?", valid=False)], success=False)
    write_trajectories(
        stored / "train_000010.parquet", [Group([lake_episode(), unusable, lake_episode(2)])], "train", 10
    )
    write_trajectories(
        stored / "eval_000010.parquet", [Group([lake_episode()]), Group([lake_episode(success=False)])], "eval", 10
    )
    monkeypatch.chdir(tmp_path)


def blocks_of_the_page(language: str) -> list[str]:
    page = Path(__file__).resolve().parents[2] / "docs" / "trajectories.md"
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("in_a_project")
def test_duckdb_answers_the_queries_of_the_page() -> None:
    duckdb = pytest.importorskip("duckdb")
    (block,) = blocks_of_the_page("sql")
    by_step, unusable = [duckdb.sql(query).fetchall() for query in block.split(";") if query.strip()]
    assert by_step == [(10, 0.5, 2)]
    assert unusable == [(10, "What?")]


@pytest.mark.usefixtures("in_a_project")
def test_the_python_of_the_page_reads_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    printed = []
    for block in blocks_of_the_page("python"):
        exec(block, {})
        printed.append(capsys.readouterr().out)
    objects, frame, arrays = printed
    assert objects.splitlines() == ["SFFG True [[]]", "SFFG False [[]]"]
    assert frame.split() == ["success", "reward", "phase", "step", "eval", "10", "0.500000", "1.000000", "train", "10",
                             "0.666667", "0.666667"]  # fmt: skip
    assert arrays.split() == 3 * ["-0.375"]


def test_arrays_that_come_back_can_be_written_to(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "f.parquet", [Group([lake_episode()])], "train", 1)
    segment = read_trajectories(tmp_path / "f.parquet")[0].trajectories[0].segments[0]
    segment.token_ids[0] = 9
    assert segment.token_ids.base is None


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    episode = lake_episode(final_observation="bad \udc80 byte", turns=[Turn("\ud800", actions=["\udfff"])])
    write_trajectories(tmp_path / "f.parquet", [Group([episode])], "train", 1)
    back = read_trajectories(tmp_path / "f.parquet")[0].trajectories[0]
    assert back.final_observation == "bad \\udc80 byte"
    assert (back.turns[0].observation, back.turns[0].actions) == ("\\ud800", ["\\udfff"])


def test_extra_columns_are_checked(tmp_path: Path) -> None:
    groups = [Group([lake_episode()])]
    with pytest.raises(ValueError, match="2 values for 1 episodes"):
        write_trajectories(tmp_path / "f.parquet", groups, "train", 1, {"kept": [True, False]})
    with pytest.raises(ValueError, match="fixed column"):
        write_trajectories(tmp_path / "f.parquet", groups, "train", 1, {"reward": [1.0]})
    assert not list(tmp_path.iterdir())


@settings(max_examples=25, deadline=None)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 10**6))
def test_a_damaged_file_is_a_sentence(tmp_path_factory: pytest.TempPathFactory, cut: float, flip: int) -> None:
    file = tmp_path_factory.mktemp("damaged") / "f.parquet"
    write_trajectories(file, [Group([lake_episode()])], "train", 1)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(CheckpointError):
        read_trajectories(file)
    flipped = bytearray(whole)
    flipped[flip % len(whole)] ^= 0xFF
    file.write_bytes(bytes(flipped))
    # A flipped bit inside a value may pass unseen; whatever is seen must be a sentence.
    with contextlib.suppress(CheckpointError):
        read_trajectories(file)


def test_what_is_no_trajectory_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be read"):
        read_trajectories(tmp_path / "missing.parquet")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(CheckpointError, match="none with trajectories"):
        read_trajectories(other)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"rehearsal.format": "99"}), other)
    with pytest.raises(CheckpointError, match="later version"):
        read_trajectories(other)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"rehearsal.format": "1"}), other)
    with pytest.raises(CheckpointError, match="not a whole trajectory file"):
        read_trajectories(other)
    with pytest.raises(CheckpointError, match="no column 'b'"):
        read_table(other, ["b"])
    sizes = {"rehearsal.format": "1", "rehearsal.groups": json.dumps([2])}
    write_trajectories(tmp_path / "f.parquet", [Group([lake_episode()])], "train", 1)
    pq.write_table(pq.read_table(tmp_path / "f.parquet").replace_schema_metadata(sizes), other)
    with pytest.raises(CheckpointError, match="not a whole trajectory file"):
        read_trajectories(other)


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.parquet"
    write_trajectories(file, [Group([lake_episode()])], "train", 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_trajectories(file, [], "train", 1)
    assert len(read_trajectories(file)) == 1
    assert os.listdir(tmp_path) == ["f.parquet"]


@pytest.mark.parametrize(
    ("rewards", "total"), [([1e308, 1e308], math.inf), ([math.inf, -math.inf], math.nan), ([0.1] * 10, 1.0)]
)
def test_rewards_beyond_a_float_are_added_all_the_same(rewards: list[float], total: float) -> None:
    turns = [Turn("", rewards=[reward]) for reward in rewards]
    assert lake_episode(turns=turns).reward == pytest.approx(total, nan_ok=True, abs=0)
    assert Turn("", rewards=rewards).reward == pytest.approx(total, nan_ok=True, abs=0)


def test_files_from_before_turns_told_more_are_still_read(tmp_path: Path) -> None:
    turn = Turn("o", response="r", actions=["a"], rewards=[1.0], calls=[ToolCall("t", {"x": [1, None]}, "2", "", 0.5)])
    episode = Trajectory("e", seed=1, turns=[turn, Turn("p")])
    path = tmp_path / "new.parquet"
    write_trajectories(path, [Group([episode])], "train", 0)
    (group,) = read_trajectories(path)
    assert group.trajectories[0].turns == episode.turns
    table = pq.read_table(path)
    column = table.column("turns").combine_chunks()
    later = ("calls", "parts", "violations", "obligations", "shaping")
    kept = [field.name for field in column.type.value_type if field.name not in later]
    structs = pa.StructArray.from_arrays([column.values.field(name) for name in kept], names=kept)
    old = pa.ListArray.from_arrays(column.offsets, structs)
    path = tmp_path / "old.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("turns"), "turns", old), path)
    (group,) = read_trajectories(path)
    first, second = group.trajectories[0].turns
    assert (first.response, first.rewards, first.calls, second.calls) == ("r", [1.0], [], [])
    assert (first.parts, first.violations, first.obligations, first.shaping) == ({}, [], [], {})
    # A file that lacks anything else is damaged.
    kept.remove("response")
    structs = pa.StructArray.from_arrays([column.values.field(name) for name in kept], names=kept)
    broken = table.set_column(
        table.schema.get_field_index("turns"), "turns", pa.ListArray.from_arrays(column.offsets, structs)
    )
    pq.write_table(broken, path)
    with pytest.raises(CheckpointError, match="not a whole trajectory file"):
        read_trajectories(path)


def test_files_from_before_tasks_had_kinds_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "new.parquet"
    write_trajectories(path, [Group([lake_episode(category="wide")])], "train", 0)
    (group,) = read_trajectories(path)
    assert group.trajectories[0].category == "wide"
    pq.write_table(pq.read_table(path).drop_columns(["category"]), path)
    (group,) = read_trajectories(path)
    assert group.trajectories[0].category == ""
