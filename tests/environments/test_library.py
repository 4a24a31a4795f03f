"""Lookup in documents of one's own and in the Factbook."""

import gzip
import json
import re
from pathlib import Path

import pytest

from rehearsal.environments import SPLITS, check_env, make
from rehearsal.environments.factbook import read_factbook
from rehearsal.environments.library import read_library
from rehearsal.errors import EnvironmentFault, RecipeError

FACTBOOK = Path(__file__).resolve().parents[3] / "shared" / "data" / "factbook"


def lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def country(number):
    name = f"Land{number}"
    return {
        "region": "nowhere", "code": f"x{number}",
        "data": {
            "Geography": {"Area": {"total ": {"text": f"{number + 1},000 sq km"}},
                          "Coastline": {"text": "12.5 km"},
                          "Elevation": {"highest point": {"text": f"Mount P\u00eek 1,20{number % 10} m"}}},
            "Government": {
                "Country name": {"conventional short form": {"text": name if number else "none"},
                                 "conventional long form": {"text": "The <b>First</b> Land"}},
                "Capital": {"name": {"text": f"Town {number}" if number == 3 else "Town<br>of &amp; Sea"},
                            "note": "<strong>note:</strong> it is a town"},
                "Government type": {"text": "republic; formerly a kingdom"},
                "Independence": {"text": f"1 May {1900 + number} (from the sea)"},
            },
        },
    }  # fmt: skip


@pytest.fixture
def factbook(tmp_path):
    return lines(tmp_path / "factbook.jsonl.gz", [country(number) for number in range(60)])


@pytest.fixture
def folder(tmp_path):
    """Documents of all kinds, and questions beside them."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "owls.md").write_text("Owls hunt at night.", encoding="utf-8")
    (tmp_path / "deep" / "hens.txt.gz").write_bytes(gzip.compress("Hens lay eggs, says Zo\u00eb.".encode()))
    lines(tmp_path / "more.jsonl", [{"text": f"Bird {n} weighs {n} grams.", "title": f"Bird {n}"} for n in range(80)])
    rows = [{"question": f"What does bird {n} weigh?", "answer": [str(n), f"{n} grams"], "documents": [f"Bird {n}"]}
            for n in range(80)]  # fmt: skip
    lines(tmp_path / "questions.jsonl", [*rows, {"question": "When do owls hunt?", "answer": "at night"}])
    return tmp_path


def test_documents_of_ones_own(folder):
    env = make("lookup", documents=str(folder), questions=str(folder / "questions.jsonl"))
    assert check_env(env).ok
    keys = {one.key for one in env.documents("train")}
    assert {"owls.md", "deep/hens.txt.gz", "more.jsonl:1"} <= keys and len(keys) == 82, "and no questions"
    asked = {split: [] for split in SPLITS}
    for split in SPLITS:
        for index in range(env.task_count(split)):
            asked[split].append(env.reset(seed=0, options={"split": split, "index": index})[0])
    everything = [text for texts in asked.values() for text in texts]
    assert len(everything) == len(set(everything)) == 81 and all(asked.values())
    search, read = env.tools
    assert "Owls hunt" in search("owls night") and "Zo\u00eb" in read("deep/hens.txt.gz")


def test_any_of_the_right_answers_is_right(folder):
    env = make("lookup", documents=str(folder), questions=str(folder / "questions.jsonl"))
    env.reset(seed=1, options={"split": "train", "index": 0})
    number = env.oracle()[0]
    for answer, reward in ((number, 1.0), (f"{number} grams", 1.0), (f"{number} tons", 0.0)):
        env.reset(seed=1, options={"split": "train", "index": 0})
        assert env.step(answer)[1] == reward
    assert env.describe()["documents"] == [f"Bird {number}"]


def test_questions_about_one_document_are_of_one_split(folder):
    rows = [{"question": f"{word} about bird {n}?", "answer": "x", "documents": [f"Bird {n}"]}
            for n in range(80) for word in ("What", "Who", "Why")]  # fmt: skip
    library = read_library(str(folder / "more.jsonl"), lines(folder / "three.jsonl", rows))
    about = {split: {question.documents[0] for question in library.questions[split]} for split in SPLITS}
    assert sum(map(len, about.values())) == 80 and all(about.values())


def test_the_form_of_the_factbook(factbook):
    assert read_library(factbook) is read_library(factbook), "it is read once"
    env = make("lookup", documents=str(Path(factbook).parent))
    assert check_env(env).ok
    first, *others = read_factbook(Path(factbook))
    assert first.name == "The First Land"
    asked = {question.text: question.answer for one in (first, *others) for question in one.questions}
    assert asked["How many square kilometres does Land7 have in all?"] == "8,000"
    assert asked["What is the highest point of Land7?"] == "Mount P\u00eek"
    assert asked["In which year did Land7 become independent?"] == "1907"
    assert asked["What is the capital of Land7?"] == "Town of & Sea"
    assert "What is the capital of Land3?" not in asked, "what is no plain name is not asked for"
    assert not any("coastline" in text or "type of government" in text for text in asked)
    names = {split: {one.title.split(":")[0] for one in env.documents(split)} for split in SPLITS}
    assert sum(map(len, names.values())) == 60 and all(names.values()), "a country is of one split"
    env.reset(seed=0, options={"split": "test"})
    assert (
        "Capital - note: note: it is a town"
        in {one.title: one.text for one in env.documents()}[f"{min(names['test'])}: Government"]
    )


@pytest.mark.skipif(not FACTBOOK.is_dir(), reason="the Factbook is not there")
def test_the_answers_of_the_factbook_stand_in_its_documents():
    library = read_library(str(FACTBOOK))
    countries = set()
    for split in SPLITS:
        texts = {one.title: one.text for one in library.documents[split]}
        own = {title.split(": ")[0] for title in texts}
        assert not countries & own
        countries |= own
        for question in library.questions[split]:
            (title,) = question.documents
            assert title.split(": ")[0] in question.text
            assert re.search(rf"(?<!\w){re.escape(question.answer)}(?!\w)", texts[title]), question
            assert "<" not in question.text + question.answer and "&" not in question.answer
    assert len(countries) > 240
    assert sum(len(library.questions[split]) for split in SPLITS) > 1000
    known = {question.text: question.answer for split in SPLITS for question in library.questions[split]}
    assert known["What is the capital of France?"] == "Paris"
    assert known["In which year did Algeria become independent?"] == "1962"
    assert known["What is the highest point of Nigeria?"] == "Chappal Waddi"
    assert known["How many kilometres long is the coastline of France?"] == "4,853"
    env = make("lookup", documents=str(FACTBOOK))
    question, _ = env.reset(seed=4, options={"split": "test"})
    search, _ = env.tools
    (title,) = env.describe()["documents"]
    assert title in search(question.rstrip("?")) or title.split(":")[0] in search(question)
    assert env.step(env.oracle()[0])[1] == 1.0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"documents": "nowhere"}, "no file or folder nowhere"),
        ({"documents": "."}, "not the Factbook, which brings its questions: name a file of them in questions"),
        ({"questions": "questions.jsonl"}, "name a folder or a file of them in documents"),
        ({"documents": ".", "questions": "nothing.jsonl"}, "There is no file nothing.jsonl"),
        ({"documents": "empty", "questions": "questions.jsonl"}, r"no \.txt or \.md or \.jsonl files"),
        ({"documents": ".", "questions": "questions.jsonl", "hops": 3}, "hops has no meaning"),
        ({"documents": ".", "questions": "questions.jsonl", "people": 20}, "people has no meaning"),
        ({"documents": "owls.md", "questions": "missing.jsonl"}, "is no JSON"),
        ({"documents": "more.jsonl", "questions": "missing.jsonl"}, "names the document 'Owl', which is not there"),
        ({"documents": "more.jsonl", "questions": "unanswered.jsonl"}, "has no field 'answer'"),
        ({"documents": "more.jsonl", "questions": "empty.jsonl"}, "has an empty answer"),
        ({"documents": "more.jsonl", "questions": "odd.jsonl"}, "needs an answer that is a text"),
        ({"documents": "cut.jsonl.gz", "questions": "questions.jsonl"}, "cut"),
    ],
)
def test_files_that_cannot_be_used(folder, monkeypatch, given, told):
    monkeypatch.chdir(folder)
    read_library.cache_clear()
    (folder / "empty").mkdir()
    if given.get("documents") != ".":  # what is there as documents must be some
        lines(folder / "missing.jsonl", [{"question": "Who?", "answer": "I", "documents": ["Owl"]}])
        lines(folder / "unanswered.jsonl", [{"question": "Who?"}])
        lines(folder / "empty.jsonl", [{"question": "Who?", "answer": " "}])
        lines(folder / "odd.jsonl", [{"question": "Who?", "answer": {"a": 1}}])
        (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-30])
    with pytest.raises(RecipeError, match=told):
        make("lookup", **given)


def test_a_split_without_questions(folder):
    alone = lines(folder / "one.jsonl", [{"question": "When do owls hunt?", "answer": "at night"}])
    (folder / "birds").mkdir()
    (folder / "birds" / "owls.md").write_text("Owls hunt at night.")
    env = make("lookup", documents=str(folder / "birds"), questions=alone)
    empty = next(split for split in SPLITS if not env.task_count(split))
    with pytest.raises(EnvironmentFault, match=f"None of the questions belongs to the {empty} split"):
        env.reset(seed=0, options={"split": empty})
