"""Verifiers by name, and tasks from files and data sets."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonschema")

from rehearsal.errors import RewardError
from rehearsal.rewards import registry
from rehearsal.rewards.code import CodeVerifier
from rehearsal.rewards.mathematics import LastNumber
from rehearsal.rewards.registry import register_verifier, verifier, verifiers
from rehearsal.rewards.tasks import check_disjoint, load_tasks, overlaps, without_overlap
from rehearsal.rewards.verifier import Score, Task, Verifier

sys.path.insert(0, str(Path(__file__).parent))
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


# Names


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.mark.parametrize(
    ("name", "options", "completion", "task"),
    [
        ("math", {"boxed": True}, "\\boxed{1/2}", Task("x", "0.5")),
        ("last-number", {}, "18", Task("x", "18")),
        ("question", {"metric": "f1"}, "The Beatles", Task("x", "Beatles")),
        ("json-schema", {"schema": {"type": "array"}}, "[]", Task("x")),
        ("pattern", {"pattern": "a+"}, "aaa", Task("x")),
        ("instructions", {"mode": "loose"}, "abc",
         Task("x", data={"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})),
        ("strange:Strange", {}, "long enough", Task("x")),
    ],
)  # fmt: skip
def test_verifiers_by_name(name: str, options: dict[str, Any], completion: str, task: Task) -> None:
    made = verifier(name, **options)
    assert isinstance(made, Verifier)
    assert made.verify(completion, task).passed


def test_judges_by_name() -> None:
    made = verifier("rubric", base_url="http://localhost:1/v1", model="judge", criteria=["is polite"], max_retries=0)
    assert (made.name, getattr(made, "runs_in", None)) == ("rubric", "thread")
    assert verifier("pair", base_url="http://localhost:1/v1", model="judge").name == "pair"


def test_code_by_name() -> None:
    made = verifier("code", partial=True, seconds=2.0, memory_mib=64)
    assert isinstance(made, CodeVerifier)
    assert (made.partial, made.limits.seconds, made.limits.memory_bytes) == (True, 2.0, 64 << 20)
    made.close()


def test_every_name_can_be_imported() -> None:
    for name in verifiers():
        assert callable(registry._factory(name))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maths", {}, "There is no verifier 'maths'; did you mean math?"),
        ("zzz", {}, "There is no verifier 'zzz'; there are: code, instructions, json-schema, last-number, math"),
        ("math", {"box": True}, "The verifier math has no option 'box'; did you mean boxed?"),
        ("question", {"metric": "bleu"}, '"exact" or "f1"'),
        ("rubric", {"model": "judge"}, "missing 1 required"),
        ("rubric", {"base_url": "http://x/v1", "model": "j", "colour": 1}, "has no option 'colour'"),
        ("no_module:Class", {}, "cannot be imported"),
        ("rehearsal.errors:Nothing", {}, "There is no Nothing in rehearsal.errors"),
        ("rehearsal.errors:__name__", {}, "neither a class nor a function"),
        ("rehearsal.errors:RewardError", {}, "which is no verifier"),
        ("reward-model", {"folder": "/nowhere"}, "There is no folder"),
    ],
)
def test_names_and_options_that_do_not_exist(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message)):
        verifier(name, **options)


@pytest.mark.usefixtures("clean_registry")
def test_a_name_for_ones_own() -> None:
    register_verifier("mine", LastNumber)
    assert verifier("mine", name="own").name == "own"
    assert "mine" in verifiers()
    with pytest.raises(RewardError, match="already"):
        register_verifier("mine", LastNumber)
    for name in ("", "a:b", " a"):
        with pytest.raises(RewardError, match="cannot name a verifier"):
            register_verifier(name, LastNumber)


# Tasks


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


ROWS = [{"question": "3 + 5?", "answer": 8, "level": 1}, {"question": "9 - 2?", "answer": 7, "level": 2}]


def test_tasks_from_json_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "tasks.jsonl", ROWS[0], "", ROWS[1])
    tasks = load_tasks(file, prompt="question", reference="answer")
    assert tasks == [Task("3 + 5?", 8, {"level": 1}), Task("9 - 2?", 7, {"level": 2})]
    assert load_tasks(file, prompt="question", reference="answer", limit=1) == tasks[:1]
    shown = load_tasks(file, prompt="Level {level}: {question} {{answer}}", reference=None, data=["answer"])
    assert shown[1] == Task("Level 2: 9 - 2? {answer}", None, {"answer": 7})


def test_tasks_of_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[0])
    write(tmp_path / "test.jsonl", ROWS[1])
    given: dict[str, Any] = {"prompt": "question", "reference": "answer"}
    assert load_tasks(tmp_path, **given)[0].reference == 8
    assert load_tasks(str(tmp_path), split="test", **given)[0].reference == 7
    with pytest.raises(RewardError, match=r"no split 'validation' in .*; files of JSON lines there: test, train"):
        load_tasks(tmp_path, split="validation", **given)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["{'a': 1}"], {}, "Line 1 of tasks.jsonl is not JSON"),
        ([{"question": "x", "answer": 1}, "[1]"], {}, "Line 2 of tasks.jsonl is no JSON object but list"),
        ([{"question": "x"}], {}, "Line 1 of tasks.jsonl has no field 'answer'; it has: question"),
        ([{"question": 3, "answer": 1}], {}, "has no text in the field 'question'"),
        ([{"question": " ", "answer": 1}], {}, "has no text in the field 'question'"),
        (ROWS, {"data": ["colour"]}, "has no field 'colour'"),
        (ROWS, {"prompt": "{colour}"}, "has no field 'colour'"),
        (ROWS, {"prompt": "{question"}, "cannot be read"),
        (ROWS, {"prompt": "{question.upper}"}, "plain names of fields"),
        (ROWS, {"prompt": "{}"}, "plain names of fields"),
        ([""], {}, "There are no tasks"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "tasks.jsonl", *rows)
    with pytest.raises(RewardError, match=re.escape(message)):
        load_tasks(file, **{"prompt": "question", "reference": "answer", **options})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="There is no file"):
        load_tasks(tmp_path / "nothing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(RewardError, match="not text in UTF-8"):
        load_tasks(tmp_path / "binary.jsonl")


def test_compressed_files(tmp_path: Path) -> None:
    given: dict[str, Any] = {"prompt": "question", "reference": "answer"}
    plain = write(tmp_path / "plain.jsonl", *ROWS)
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_tasks(packed, **given) == load_tasks(plain, **given) == load_tasks(tmp_path, **given)
    with pytest.raises(RewardError, match=r"no split 'test' in .*; files of JSON lines there: plain, train"):
        load_tasks(tmp_path, split="test", **given)
    with pytest.raises(RewardError, match="There is no file"):
        load_tasks(tmp_path / "nothing.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(RewardError, match="damaged or cut off"):
        load_tasks(packed, **given)
    packed.write_bytes(plain.read_bytes())
    with pytest.raises(RewardError, match="cannot be read: Not a gzipped file"):
        load_tasks(packed, **given)
    packed.write_bytes(gzip.compress(b"\xff\xfe{"))
    with pytest.raises(RewardError, match="not text in UTF-8"):
        load_tasks(packed, **given)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not there")
def test_humaneval_as_it_is_published() -> None:
    tasks = load_tasks(SHARED / "humaneval" / "HumanEval.jsonl.gz", reference="test")
    assert len(tasks) == 164 and tasks[0].data["entry_point"] == "has_close_elements"


def test_tasks_from_a_data_set_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    )
    made.save_to_disk(str(tmp_path / "both"))
    made["test"].save_to_disk(str(tmp_path / "one"))
    given: dict[str, Any] = {"prompt": "question", "reference": "answer"}
    assert load_tasks(tmp_path / "both", **given) == [Task("3 + 5?", 8, {"level": 1})]
    assert load_tasks(tmp_path / "both", split="test", **given) == load_tasks(tmp_path / "one", **given)
    with pytest.raises(RewardError, match="no split 'validation'; it has: train, test"):
        load_tasks(tmp_path / "both", split="validation", **given)
    with pytest.raises(RewardError, match=r"Row 0 of .* has no field 'reference'"):
        load_tasks(tmp_path / "one", prompt="question")


def test_without_datasets_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RewardError, match=re.escape("pip install 'rehearsal[datasets]'")):
        load_tasks("someone/something")


def test_overlap_of_splits_is_found_and_mended() -> None:
    train = [Task("What is 3 + 5?"), Task("Name a  town!"), Task("Why?")]
    test = [Task("name a town"), Task("What is 3 - 5?"), Task("Name a Town.")]
    (found,) = overlaps({"train": train, "test": test, "validation": [Task("Who?")]})
    assert (found.first, found.second, found.pairs, found.example) == ("train", "test", ((1, 0),), "Name a  town!")
    with pytest.raises(RewardError, match="The splits train and test share 1 prompts, such as 'Name a  town!'"):
        check_disjoint({"train": train, "test": test})
    cleaned = without_overlap(train, test)
    assert [task.prompt for task in cleaned] == ["What is 3 + 5?", "Why?"]
    check_disjoint({"train": cleaned, "test": test})


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="GSM8K is not here")
def test_gsm8k_in_a_line() -> None:
    given: dict[str, Any] = {"prompt": "question", "reference": "answer"}
    splits = {split: load_tasks(SHARED / "gsm8k", split=split, **given) for split in ("train", "test")}
    assert {name: len(tasks) for name, tasks in splits.items()} == {"train": 7473, "test": 1319}
    check_disjoint(splits)
    task = splits["test"][0]
    assert LastNumber().verify("So it is $18.", task) == Score(1.0, True, evidence="18 is 18")
