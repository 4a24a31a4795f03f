"""IFEval's 25 types against texts made by hand, one that follows and one that does not, and what must not happen."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("langdetect")

from rehearsal.errors import RewardError
from rehearsal.rewards import instructions as module
from rehearsal.rewards.instructions import InstructionFollowing, instruction_types, loose_variants
from rehearsal.rewards.verifier import Score, Task, VerificationError

ROOT = Path(__file__).resolve().parents[2]
IFEVAL = ROOT.parent / "shared" / "data" / "ifeval" / "input_data.jsonl"

FRENCH = "Bonjour à tous, je voudrais vous parler du temps qu'il fait aujourd'hui dans notre belle ville."
ENGLISH = "Good morning everybody, today I would like to talk to you about the weather in our beautiful town."
# type: arguments, a text that follows, a text that does not
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["river", "boat"]}, "A boat on the River.", "A ship on the river."),
    "keywords:frequency": (
        {"keyword": "tea", "frequency": 2, "relation": "at least"}, "Tea first, then tea again.", "Tea, then milk.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["sun", "moon"]}, "A sunny day.", "The Sun shines."),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "One Zebra.", "Zigzag.",
    ),
    "language:response_language": ({"language": "fr"}, FRENCH, ENGLISH),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"}, "It rains. We stay.", "It rains. We stay. They go. It ends.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n***\n\n***\nTwo."),
    "length_constraints:number_words": ({"num_words": 4, "relation": "at least"}, "a b, c d", "a b, c"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"}, "It rains.\n\nHowever, we go.",
        "However, it rains.\n\nSo we stay.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "Dear [name] of [town],", "Dear [name],"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. Write soon.", "Bye. Write soon."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two", "- one\n- two\n- 3\n- 4\n- five"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and *two*", "*one* and two"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1\nOne\nSection 2\nTwo", "Section 1\nOne\nTwo",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1, 2]}\n```', "{'a': 1}"),
    "detectable_format:title": ({}, "<<On tea>>\nTea is good.", "<< >>\nTea is good."),
    "combination:two_responses": ({}, "Tea.\n******\nMilk.", "Tea.\n******\nTea."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "Say hi.\nHi!", "Hi! Say hi."),
    "startend:end_checker": ({"end_phrase": "That is all."}, "It rains. That is all.", "That is all. It rains."),
    "startend:quotation": ({}, '"All of it."', '"Half" of it.'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "It is VERY WET.", "It is VERY wet.",
    ),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH.lower(), ENGLISH),
    "punctuation:no_comma": ({}, "It rains and pours.", "It rains, and pours."),
}  # fmt: skip


def task(*instructions: tuple[str, dict[str, Any]]) -> Task:
    kinds, arguments = [kind for kind, _ in instructions], [given for _, given in instructions]
    return Task("Do it.", data={"instruction_id_list": kinds, "kwargs": arguments})


def test_there_are_25_types_and_a_case_of_each() -> None:
    assert sorted(CASES) == instruction_types()
    assert len(CASES) == 25


@pytest.mark.parametrize("kind", sorted(CASES))
def test_each_type_agrees_with_texts_made_by_hand(kind: str, sentence_model: str) -> None:
    arguments, follows, fails = CASES[kind]
    for mode in ("strict", "loose"):
        verifier = InstructionFollowing(mode, nltk_data=sentence_model)  # type: ignore[arg-type]
        good, bad = verifier.verify(follows, task((kind, arguments))), verifier.verify(fails, task((kind, arguments)))
        assert (good.value, good.passed, good.parts) == (1.0, True, {kind: 1.0}), mode
        assert (bad.value, bad.passed, bad.parts) == (0.0, False, {kind: 0.0}), mode
        assert kind in bad.evidence
        assert not verifier.verify(" \n", task((kind, arguments))).passed


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        ("startend:end_checker", {"end_phrase": "The end."}, "It rains. The end.\nHope this helps!"),
        ("startend:quotation", {}, 'Sure:\n"It rains."'),
        ("change_case:english_lowercase", {}, f"Here It Is:\n{ENGLISH.lower()}\nEnjoy!"),
        ("startend:quotation", {}, '**"It rains."**'),
    ],
)
def test_loose_forgives_a_first_line_a_last_line_and_asterisks(kind: str, arguments: dict[str, Any], text: str) -> None:
    assert not InstructionFollowing("strict").verify(text, task((kind, arguments))).passed
    assert InstructionFollowing("loose").verify(text, task((kind, arguments))).passed


def test_the_eight_variants() -> None:
    assert loose_variants("*a*\nb\nc") == [
        "*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b",
    ]  # fmt: skip
    assert len(loose_variants("")) == 8


def test_several_instructions_are_shared_out() -> None:
    asked = task(
        ("punctuation:no_comma", {}), ("keywords:existence", {"keywords": ["tea"]}),
        ("keywords:existence", {"keywords": ["milk"]}), ("startend:quotation", {}),
    )  # fmt: skip
    share = InstructionFollowing().verify("<think>milk, milk</think>Tea only", asked)
    assert share.parts == {
        "punctuation:no_comma": 1, "keywords:existence": 1, "keywords:existence#2": 0, "startend:quotation": 0,
    }  # fmt: skip
    assert (share.value, share.passed) == (0.5, False)
    assert InstructionFollowing(value="all").verify("Tea only", asked).value == 0.0
    assert InstructionFollowing(value="all").verify('"Tea and milk"', asked).value == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "has no instructions"),
        ({"instruction_id_list": [], "kwargs": []}, "has no instructions"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "of the same length"),
        ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "has no instructions"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, "has no instructions"),
        ({"instruction_id_list": ["tone:polite"], "kwargs": [{}]}, "There is no instruction 'tone:polite'"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "lacks keywords"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]}, "lacks keywords"),
        ({"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]}, "lacks relation"),
        (
            {"instruction_id_list": ["length_constraints:number_words"],
             "kwargs": [{"num_words": 3, "relation": "about"}]}, "cannot be used",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"colour": 1}]}, "cannot be used"),
        (
            {"instruction_id_list": ["keywords:letter_frequency"],
             "kwargs": [{"letter": "ab", "let_frequency": 1, "let_relation": "at least"}]}, "counts one character",
        ),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_used_have_no_score(data: dict[str, Any], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        InstructionFollowing().verify("Hello there", Task("x", data=data))


def test_characters_that_are_no_letters_are_counted_and_not_replaced_by_a_random_letter() -> None:
    asked = task(("keywords:letter_frequency", {"letter": "#", "let_frequency": 4, "let_relation": "at least"}))
    for _ in range(20):
        assert InstructionFollowing().verify("#hash #hash #hash #hash", asked).passed
        assert not InstructionFollowing().verify("eeee aaaa ssss tttt nnnn", asked).passed


@pytest.mark.parametrize("text", ["12345", "...", "42 + 1 = 43"])
def test_a_text_without_language_is_in_no_language(text: str) -> None:
    """lm-eval's checker counts what it cannot tell as followed, so digits would answer in every language."""
    score = InstructionFollowing().verify(text, task(("language:response_language", {"language": "fr"})))
    assert not score.passed


def test_the_same_text_gets_the_same_score() -> None:
    """Language detection draws random numbers: without a fixed seed, short texts are now one language, now another."""
    asked = task(("language:response_language", {"language": "de"}))
    for text in ("Hand", "so warm", "ist es da", "no", "Butter in the pan"):
        assert len({InstructionFollowing().verify(text, asked).value for _ in range(15)}) == 1, text


def test_where_the_sentence_model_is_missing_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    module._find_sentence_model.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(VerificationError, match=r"nltk\.downloader punkt_tab once, or name a folder"):
        InstructionFollowing().verify("One. Two.", task(("length_constraints:number_sentences", CASES[
            "length_constraints:number_sentences"][0])))  # fmt: skip
    assert InstructionFollowing().verify("One. Two.", task(("punctuation:no_comma", {}))).passed
    module._find_sentence_model.cache_clear()


@pytest.mark.slow
def test_nothing_is_fetched_and_nothing_printed() -> None:
    """In a fresh process, in which opening a connection raises."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import socket
        def refuse(*arguments, **options):
            raise SystemExit("something was fetched")
        socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
        from rehearsal.rewards.instructions import InstructionFollowing
        from rehearsal.rewards.verifier import Task
        data = {{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{{}}]}}
        score = InstructionFollowing().verify("x", Task("x", data=data))
        sys.stderr.write(f"passed {{score.passed}}")
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.endswith("passed True")
    assert socket.socket.connect is not None


@pytest.mark.skipif(not IFEVAL.is_file(), reason="IFEval's prompts are not here")
def test_all_published_prompts_can_be_checked(sentence_model: str) -> None:
    verifier = InstructionFollowing("loose", nltk_data=sentence_model)
    rows = [json.loads(line) for line in IFEVAL.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 541
    for row in rows:
        score = verifier.verify("It is raining in the town today, so we stay at home.", Task(row["prompt"], data=row))
        assert isinstance(score, Score)
        assert len(score.parts) == len(row["instruction_id_list"])


@pytest.mark.skipif(not IFEVAL.is_file(), reason="IFEval's prompts are not here")
def test_scores_are_those_of_lm_eval(sentence_model: str) -> None:
    """Its own functions, for answers of several kinds; but not for the two prompts where it draws letters at random."""
    import nltk

    if sentence_model not in nltk.data.path:
        nltk.data.path.insert(0, sentence_model)
    module._checkers()
    from lm_eval.tasks.ifeval import utils

    answers = [
        "<<title>>\n\n* one\n* two\n\nP.S. *the end*",
        ENGLISH.upper(),
        '"My answer is yes."',
        "a\n***\nb\n***\nc",
    ]
    rows = [json.loads(line) for line in IFEVAL.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        if row["key"] in (1122, 1129):
            continue
        answer = answers[number % len(answers)]
        theirs = utils.process_results(row, [answer])
        for mode in ("strict", "loose"):
            ours = InstructionFollowing(mode, nltk_data=sentence_model)  # type: ignore[arg-type]
            score = ours.verify(answer, Task(row["prompt"], data=row))
            assert [bool(part) for part in score.parts.values()] == theirs[f"inst_level_{mode}_acc"], row["key"]
            assert score.passed == theirs[f"prompt_level_{mode}_acc"]


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match='"strict" or "loose"'):
        InstructionFollowing("lax")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match='"share" or "all"'):
        InstructionFollowing(value="some")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=re.escape("pip install 'rehearsal[ifeval]'")):
        InstructionFollowing()
