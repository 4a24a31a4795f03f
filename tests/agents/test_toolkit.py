"""The tools that come along: arithmetic that holds, notes that stay in their episode, search that repeats itself."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.agents import toolkit
from rehearsal.agents.toolbox import Toolbox, Toolkit, ToolLimits, ToolSource
from rehearsal.agents.toolkit import make_source, register_tool, tool_names, tool_path
from rehearsal.agents.toolkit.calculator import Calculator, calculate, calculator
from rehearsal.agents.toolkit.notebook import Notebook
from rehearsal.agents.toolkit.search import Search
from rehearsal.agents.tools import ToolFailure, tool_from
from rehearsal.environments.corpus import Corpus, Document, read_corpus
from rehearsal.errors import RehearsalError, ToolError
from rehearsal.trajectory import ToolCall

DOCUMENTS = [
    {"id": "fox", "title": "Foxes", "text": "The red fox hunts at night. Foxes live in burrows."},
    {"id": "owl", "title": "Owls", "text": "Owls hunt at night and see well in the dark."},
    {"id": "hen", "title": "Hens", "text": "A hen lays eggs. The fox is her enemy."},
    {"id": "doc/4", "text": "Nothing but words, words, words."},
]


def box_of(source: ToolSource, **limits: Any) -> Toolbox:
    return Toolbox(list(source.open()), ToolLimits(**limits))


def say(box: Toolbox, tool_name: str, **arguments: Any) -> str:
    return box.execute(ToolCall(tool_name, arguments)).told


# The calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(17 + 4) * 3 ** 2", "189"),
        ("123456789 * 987654321 * 10**20", str(123456789 * 987654321 * 10**20)),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        (f"{10**30} / 10", str(10**29)),
        ("1/3", "0.333333333333"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("sqrt(2)", "1.41421356237"),
        ("max(1, 2.5, -3) + min([4, 5])", "6.5"),
        ("round(2.567, 1) + round(7.2)", "9.6"),
        ("gcd(12, 18) + lcm(4, 6) + comb(5, 2) + factorial(5)", "148"),
        ("12 × 3 − 4 ÷ 2", "34"),
        ("2 * pi", "6.28318530718"),
        ("1e3", "1000"),
        ("sum(1, 2, 3)", "6"),
    ],
)
def test_arithmetic(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("9**9**9**9", "too large"),
        ("2**-100000", "too small"),
        ("10**999 * 10**999", "too large"),
        ("factorial(401)", "from 0 to 400"),
        ("comb(10**9, 5)", "from 0 to 1000"),
        ("1/0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("1e308 * 10", "too large"),
        ("exp(1000)", "too large"),
        ("(-8) ** 0.5", "no real number"),
        ("sqrt(-1)", "math domain error|nonnegative|positive"),
        ("log(0)", "math domain error|nonnegative|positive"),
        ("2 ^ 3", "written **"),
        ("1,234 + 1", "without commas"),
        ("x + 1", "there is no x"),
        ("hypot(3, 4)", "there is no hypot"),
        ("__import__('os')", "there is no __import__"),
        ("(1).__class__", "only arithmetic"),
        ("'a' * 10", "only arithmetic"),
        ("True + 1", "only arithmetic"),
        ("2j", "only arithmetic"),
        ("[1, 2]", "only arithmetic"),
        ("1 < 2", "only arithmetic"),
        ("max()", "argument"),
        ("round(1, 10**9)", "digits"),
        ("abs(1, 2)", "what it does not take"),
        ("print(1)", "there is no print"),
        ("", "no arithmetic expression"),
        ("1 +", "no arithmetic expression"),
        ("1; 2", "no arithmetic expression"),
        ("\x00", "null bytes|no arithmetic"),
        ("(" * 400 + "1" + ")" * 90, "no arithmetic"),
        ("1+" * 400 + "1", "500 are allowed"),
        ("lambda: 1", "only arithmetic"),
    ],
)
def test_what_is_no_arithmetic_is_refused(expression: str, told: str) -> None:
    with pytest.raises(ToolFailure, match=told.replace("*", r"\*")):
        calculate(expression)


def test_long_chains_of_signs() -> None:
    assert calculate("-" * 99 + "1") == -1


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/%().,e ^[]abcmosqrtfil", max_size=40) | st.text(max_size=20))
def test_no_expression_breaks_the_calculator(expression: str) -> None:
    start = time.thread_time()
    with contextlib.suppress(ToolFailure):
        value = calculate(expression)
        assert isinstance(value, int) or math.isfinite(value)
        assert len(calculator(expression)) <= 1100
    assert time.thread_time() - start < 2.5


def test_the_calculator_as_a_tool() -> None:
    box = box_of(Calculator())
    assert list(box.tools) == ["calculator"]
    assert say(box, "calculator", expression="2+2") == "4"
    assert say(box, "calculator", expression=7) == "7"
    assert say(box, "calculator", expression="2+") == "Error: this is no arithmetic expression"


# The notebook


def test_notes() -> None:
    box = box_of(Notebook(max_notes=2, max_characters=10))
    assert say(box, "list_notes") == "There are no notes."
    assert say(box, "write_note", title=" a  b ", text="one") == "Kept, 1 in all."
    assert say(box, "write_note", title="a b", text="two") == "Kept, 1 in all."
    assert say(box, "write_note", title="c", text="") == "Kept, 2 in all."
    assert say(box, "read_note", title="a b") == "two"
    assert say(box, "read_note", title="c") == "(no output)"
    assert say(box, "read_note", title="d") == "Error: there is no note 'd'; Notes: a b; c"
    assert "full with 2 notes" in say(box, "write_note", title="d", text="x")
    assert "10 are allowed" in say(box, "write_note", title="c", text="x" * 11)
    assert "needs a title" in say(box, "write_note", title=" ", text="x")
    assert say(box, "list_notes") == "Notes: a b; c"


def test_two_episodes_do_not_share_notes() -> None:
    source = Notebook()
    one, other = box_of(source), box_of(source)
    assert say(one, "write_note", title="pin", text="1234").startswith("Kept")
    assert say(other, "list_notes") == "There are no notes."
    assert "there is no note" in say(other, "read_note", title="pin")
    assert "there is no note" in say(box_of(source), "read_note", title="pin")


# The corpus


def corpus() -> Corpus:
    return Corpus(read_corpus(DOCUMENTS))


def test_search_ranks_by_bm25_and_says_where() -> None:
    found = corpus().search("fox burrow")
    assert [hit.key for hit in found] == ["fox", "hen"]
    assert found[0].score > found[1].score > 0
    assert "fox" in found[0].snippet
    assert [hit.key for hit in corpus().search("hunting in darkness, dark", count=1)] == ["owl"]
    assert corpus().search("zebra") == []


def test_the_score_is_that_of_the_formula() -> None:
    """Robertson's BM25 with the constants that FTS5 documents, in a corpus of one column's worth of words."""
    texts = ["apple apple pear", "pear", "plum plum plum plum", "fig", "cherry cherry", "date"]
    hits = Corpus(Document(str(i), "", text) for i, text in enumerate(texts)).search("apple")
    (hit,) = hits
    n, with_it, length, mean, times = len(texts), 1, 3, sum(len(t.split()) for t in texts) / len(texts), 2
    idf = math.log((n - with_it + 0.5) / (with_it + 0.5))
    expected = idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / mean))
    assert hit.score == pytest.approx(expected, rel=1e-6)


def test_ties_go_to_the_earlier_document() -> None:
    foreign = Corpus([Document("1", "", "Die Hauptstraße in Łódź"), Document("2", "", "Ein Café")])
    for query in ("Hauptstraße", "HAUPTSTRASSE hauptstraße", "łódź", "CAFÉ", "cafe"):
        assert len(foreign.search(query)) == 1, query
    many = Corpus(Document(f"d{i}", "", "same words here") for i in range(50))
    expected = [f"d{i}" for i in range(10)]
    assert [[hit.key for hit in many.search("words", 10)] for _ in range(3)] == [expected] * 3


@settings(max_examples=200, deadline=None)
@given(query=st.text(max_size=30) | st.sampled_from(
    ['"', 'fox"', "fox AND", "NEAR(", "fox*", "-fox", "title:fox", "(fox OR", "^fox", "fox NOT owl",
     "'; DROP TABLE keys", "\ud800", "\x00"]))  # fmt: skip
def test_no_query_breaks_the_search(query: str) -> None:
    shared = _shared()
    assert shared.search(query) == shared.search(query)
    shared.get(query)


_kept: list[Corpus] = []


def _shared() -> Corpus:
    if not _kept:
        _kept.append(corpus())
    return _kept[0]


def test_operators_are_words_like_others() -> None:
    assert [hit.key for hit in corpus().search('fox NOT "owl*')] == [hit.key for hit in corpus().search("fox not owl")]


def test_documents_by_key_or_title() -> None:
    shared = corpus()
    assert shared.get(" owl ").title == "Owls"  # type: ignore[union-attr]
    assert shared.get("hens").key == "hen"  # type: ignore[union-attr]
    assert shared.get("") is None
    assert shared.get("zebra") is None
    twins = Corpus([Document("1", "Same", "a"), Document("2", "same", "b")])
    assert twins.get("Same") is None


def test_a_corpus_is_read_from_lines_folders_and_lists(tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("\n".join(json.dumps(entry) for entry in DOCUMENTS) + "\n\n", encoding="utf-8")
    assert read_corpus(lines) == read_corpus(str(lines)) == read_corpus(DOCUMENTS)
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("Second é.", encoding="utf-8")
    (folder / "deep" / "a.md").write_text("First.", encoding="utf-8")
    (folder / "c.png").write_bytes(b"\x89")
    assert [(one.key, one.title, one.text) for one in read_corpus(folder)] == [
        ("b.txt", "b", "Second é."), ("deep/a.md", "a", "First."),
    ]  # fmt: skip
    (folder / "b.txt").unlink()
    (folder / "b.txt.gz").write_bytes(gzip.compress("Second é.".encode()))
    (folder / "deep" / "c.jsonl").write_text('{"text": "Third."}\n{"text": "Fourth.", "id": "4"}\n')
    assert [(one.key, one.title, one.text) for one in read_corpus(folder)] == [
        ("b.txt.gz", "b", "Second é."), ("deep/a.md", "a", "First."), ("deep/c.jsonl:1", "", "Third."),
        ("4", "", "Fourth."),
    ]  # fmt: skip
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert read_corpus(packed) == read_corpus(lines)
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ToolError, match="damaged or cut off"):
        read_corpus(packed)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Line 1 of .* is no JSON"), ('{"title": "x"}', '"text" that is a string'), ("[1]", '"text"'),
        ('{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', "Two documents .* '1'"), ("", "no documents"),
        (b"\xff\xfe", "cannot be read"),
    ],
)  # fmt: skip
def test_a_corpus_that_cannot_be_read(tmp_path: Path, content: str | bytes, told: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ToolError, match=told):
        Corpus(read_corpus(file))
    with pytest.raises(ToolError, match="cannot be read"):
        read_corpus(tmp_path / "missing.jsonl")
    with pytest.raises(ToolError, match=r"no \.txt or \.md or \.jsonl files"):
        read_corpus(tmp_path, without=file)


def test_an_index_in_a_file_is_used_again_and_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "index.db"
    first = Corpus(read_corpus(DOCUMENTS), file)
    written = file.stat().st_mtime_ns
    again = Corpus(read_corpus(DOCUMENTS), file)
    assert file.stat().st_mtime_ns == written
    assert again.search("fox") == first.search("fox") == corpus().search("fox")
    fewer = Corpus(read_corpus(DOCUMENTS[:2]), file)
    assert (len(fewer), len(first)) == (2, 4), "who has the old one open still reads it"
    file.write_bytes(b"no database at all")
    assert len(Corpus(read_corpus(DOCUMENTS), file)) == 4
    assert [path.name for path in file.parent.iterdir()] == ["index.db"]
    with pytest.raises(ToolError, match="cannot be written"):
        Corpus(read_corpus(DOCUMENTS), tmp_path / "deep" / "index.db" / "below")


def test_many_threads_share_a_corpus() -> None:
    shared = corpus()
    expected = {word: shared.search(word) for word in ("fox", "owl", "night", "words")}
    wrong: list[str] = []

    def look() -> None:
        for _ in range(50):
            wrong.extend(word for word, hits in expected.items() if shared.search(word) != hits)

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_search_and_open_as_tools() -> None:
    source = Search(DOCUMENTS, results=2, page=20)
    box = box_of(source)
    assert list(box.tools) == ["search", "open"]
    shown = say(box, "search", query="fox")
    assert shown.splitlines()[0].startswith("[fox] Foxes: The red fox hunts")
    assert len(shown.splitlines()) == 2
    assert say(box, "search", query="zebra") == "Nothing was found; try other words."
    assert say(box, "search", query="?!") == "Nothing was found; try other words."
    pages = [say(box, "open", document="[hen]", page=page) for page in (1, 2, 3)]
    assert pages == [
        "Hens\nA hen lays eggs. \n(page 1 of 3)", "The fox is her \n(page 2 of 3)", "enemy.\n(page 3 of 3)"
    ]  # fmt: skip
    assert "from 1 to 3, not 4" in say(box, "open", document="hen", page=4)
    assert "there is no document 'cow'" in say(box, "open", document="cow")
    assert say(box, "open", document="doc/4", page=1).startswith("Nothing but")
    with pytest.raises(RehearsalError, match="results"):
        Search(DOCUMENTS, results=0)


# Tools by name


def shout(text: str) -> str:
    """Says it louder.

    Args:
        text: what to say
    """
    return text.upper()


def test_tools_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"calculator", "notebook", "search", "mcp"} <= set(tool_names())
    assert isinstance(make_source("notebook", {"max_notes": 3}), Notebook)
    monkeypatch.setattr(toolkit, "_registered", dict(toolkit._registered))
    register_tool("shout", shout)
    assert [tool.name for tool in make_source("shout").open()] == ["shout"]
    assert tool_path("calculator") == "rehearsal.agents.toolkit.calculator:Calculator"
    assert tool_path("shout") == f"{shout.__module__}:shout"
    register_tool("quiet", tool_from(lambda: "", name="quiet", description="Says nothing."))
    assert tool_path("quiet") is None
    (tmp_path / "own_tools.py").write_text('def twice(n: int) -> int:\n    """Doubles."""\n    return 2 * n\n')
    monkeypatch.chdir(tmp_path)
    box = box_of(make_source("own_tools:twice"))
    assert say(box, "twice", n="4") == "8"
    for name, options, told in (
        ("calculater", {}, "did you mean calculator"),
        ("search", {}, "needs the option corpus"),
        ("search", {"corpse": 1}, "did you mean corpus"),
        ("notebook", {"max_notes": 0}, "max_notes"),
        ("shout", {"loud": 1}, "no options such as loud"),
        ("own_tools:thrice", {}, "There is no thrice"),
        ("missing_module:x", {}, "cannot be imported"),
        ("os:sep", {}, "which is no tool"),
        ("own_tools:", {}, "does not name a tool"),
    ):
        with pytest.raises(RehearsalError, match=told):
            make_source(name, options)
    for name, target, told in (("shout", shout, "already"), ("a:b", shout, "no colon"), ("x", 3, "no tool")):
        with pytest.raises(ToolError, match=told):
            register_tool(name, target)  # type: ignore[arg-type]


def test_a_kit_of_all() -> None:
    from rehearsal.environments import make

    kit = Toolkit([Calculator(), Notebook(), Search(DOCUMENTS)])
    box = kit.open(make("frozenlake"))
    assert box is not None
    assert list(box.tools) == ["calculator", "write_note", "read_note", "list_notes", "search", "open"]
    assert kit.fast
    for schema in box.schemas:
        json.dumps(schema)
        assert all("description" in one for one in schema["function"]["parameters"]["properties"].values())
    kit.close()
