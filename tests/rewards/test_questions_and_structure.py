"""Exact match, F1, JSON and patterns."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("jsonschema")

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import answer_of, normalise, prompt_key, without_thought
from rehearsal.rewards.questions import Question, exact_match, token_f1
from rehearsal.rewards.structure import JsonSchema, Pattern, parse_json
from rehearsal.rewards.verifier import Score, Task, VerificationError

# Answers


@pytest.mark.parametrize(
    ("completion", "rest", "answer"),
    [
        ("plain", "plain", "plain"),
        ("<think>a</think> b", "b", "b"),
        ("a</think>b", "b", "b"),
        ("<think>a", "", ""),
        ("x <think>a", "x", "x"),
        ("<think>a</think>b<think>c</think>d", "d", "d"),
        ("<think><answer>1</answer></think>none", "none", "none"),
        ("<answer>1</answer> <answer> 2 </answer>!", "<answer>1</answer> <answer> 2 </answer>!", "2"),
        ("<answer>1", "<answer>1", "<answer>1"),
        ("<answer>a\nb</answer>", "<answer>a\nb</answer>", "a\nb"),
        ("", "", ""),
    ],
)
def test_where_the_answer_is(completion: str, rest: str, answer: str) -> None:
    assert (without_thought(completion), answer_of(completion)) == (rest, answer)


def test_prompts_are_compared_without_case_and_spaces_but_with_their_signs() -> None:
    assert prompt_key("  What is\n 3 + 5 ?") == prompt_key("what IS 3 + 5 ?!")
    assert prompt_key("What is 3 + 5?") != prompt_key("What is 3 - 5?")


# Questions


def test_normalisation_as_published() -> None:
    assert normalise("The  Eiffel-Tower, (a) tower!") == "eiffeltower tower"
    assert exact_match("The Beatles.", "beatles")
    assert not exact_match("beatles band", "beatles")


@pytest.mark.parametrize("gold", ["A", "the", "+", "?"])
def test_a_gold_answer_that_normalises_to_nothing_is_not_matched_by_nothing(gold: str) -> None:
    """SQuAD's evaluation takes the answer "A" of a multiple choice away as an article, and holds "" for equal to it."""
    assert exact_match(f" {gold.lower()} ", gold)
    for other in ("", " ", "an", "-", "B", "..."):
        assert not exact_match(other, gold)
        assert token_f1(other, gold) == 0.0
    assert exact_match("(A).", "A")


@pytest.mark.parametrize(
    ("answer", "gold", "closed", "f1"),
    [
        ("red house", "the red house", True, 1.0),
        ("big red house", "red house", True, 0.8),
        ("red red", "red", True, 2 / 3),
        ("red red", "red red blue", True, 0.8),
        ("blue", "red", True, 0.0),
        ("yes it is", "yes", True, 0.0),
        ("yes it is", "yes", False, 0.5),
        ("yes", "yes it is", True, 0.0),
        ("", "", True, 1.0),
        ("the", "a", True, 0.0),
        ("the", "The.", True, 1.0),
        ("", "red", True, 0.0),
    ],
)
def test_f1_by_hand(answer: str, gold: str, closed: bool, f1: float) -> None:
    assert token_f1(answer, gold, closed=closed) == pytest.approx(f1)


def test_the_best_of_several_golds_counts() -> None:
    task = Task("Who?", ["Ann Lee", "Lee"])
    assert Question().verify("<answer>lee</answer>", task) == Score(
        1.0, True, {"exact": 1.0, "f1": 1.0}, "'lee' for 'Ann Lee'"
    )
    half = Question("f1", threshold=0.6).verify("Ann Smith Lee", task)
    assert (half.value, half.passed, half.parts["exact"]) == (pytest.approx(0.8), True, 0.0)
    assert not Question("f1").verify("Ann Smith Lee", task).passed
    # A whole sentence is no exact match: the answer must be marked.
    assert not Question().verify("It was Lee", task).passed
    assert Question().verify("It was <answer>Lee</answer>", task).passed
    for reference in (None, [], [None], {"a": 1}, True):
        with pytest.raises(VerificationError, match="must be a text"):
            Question().verify("Lee", Task("Who?", reference))


def test_a_yes_in_the_judgement_is_a_yes() -> None:
    """The whole of a matched pattern was once compared with "yes", so that every answer was wrong (simple-evals)."""
    assert Question().verify("correct: <answer>yes</answer>", Task("?", "yes")).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [({"metric": "bleu"}, '"exact" or "f1"'), ({"threshold": 0}, "above 0"), ({"threshold": 1.1}, "at most at 1")],
)
def test_question_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Question(**options)


# JSON

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("completion", "parts"),
    [
        ('{"name": "Ann", "age": 3}', (1, 1)),
        ('<think>{}</think>{"name": "Ann"}', (1, 1)),
        ('Here it is:\n```json\n{"name": "Ann"}\n```\nDone.', (1, 1)),
        ('```\n{"name": "Ann"}\n```', (1, 1)),
        ('{"name": "Ann", "age": -3}', (1, 0)),
        ('{"age": 3}', (1, 0)),
        ('{"name": "Ann", "x": 1}', (1, 0)),
        ("[]", (1, 0)),
        ("null", (1, 0)),
        ('Here it is: {"name": "Ann"}', (0, 0)),
        ('```json\n{"name": "Ann"}\n```\n```json\n{"age": 1}\n```', (0, 0)),
        ("{'name': 'Ann'}", (0, 0)),
        ('{"name": "Ann",}', (0, 0)),
        ('{"name": "Ann", "age": NaN}', (0, 0)),
        ('{"name": "Ann", "age": Infinity}', (0, 0)),
        ('{"name": "Ann", "name": 3}', (0, 0)),
        ("[" * 100_000, (0, 0)),
        ('{"name": "Ann", "age": ' + "9" * 10_000 + "}", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_json_against_a_schema(completion: str, parts: tuple[int, int]) -> None:
    for verifier, task in ((JsonSchema(SCHEMA), Task("x")), (JsonSchema(), Task("x", SCHEMA))):
        score = verifier.verify(completion, task)
        assert (score.parts["json"], score.parts["schema"]) == parts
        assert (score.value, score.passed) == (float(parts[1]), bool(parts[1]))
    assert JsonSchema(SCHEMA, partial=0.25).verify(completion, Task("x")).value == {2: 1.0, 1: 0.25, 0: 0.0}[sum(parts)]


def test_formats_are_checked() -> None:
    schema = {"type": "string", "format": "ipv4"}
    assert JsonSchema(schema).verify('"127.0.0.1"', Task("x")).passed
    assert not JsonSchema(schema).verify('"localhost"', Task("x")).passed


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objekt"}, "not valid"),
        ("a text", "has no JSON schema"),
        (None, "has no JSON schema"),
        ({"$ref": "https://example.com/schema.json"}, "refers to what is not in it"),
        ({"$ref": "#/definitions/missing"}, "refers to what is not in it"),
    ],
)
def test_schemas_that_cannot_be_used(schema: Any, message: str) -> None:
    """No document is fetched for one."""
    with pytest.raises(VerificationError, match=message):
        JsonSchema().verify("{}", Task("x", schema))


def test_json_is_read_as_its_standard_has_it() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e9"]}') == {"a": [1, 2.5, None, True, "é"]}
    for text in ("NaN", "-Infinity", '{"a": 1, "a": 1}', "{", "[1,]", "01"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)
    assert json.loads("NaN") != parse_json("1")


# Patterns


@pytest.mark.parametrize(
    ("options", "completion", "passed"),
    [
        ({"pattern": "[a-z]+"}, "abc", True),
        ({"pattern": "[a-z]+"}, "abc1", False),
        ({"pattern": "[a-z]+"}, "<think>1</think>abc", True),
        ({"pattern": "b", "how": "search"}, "abc", True),
        ({"pattern": "b", "how": "absent"}, "abc", False),
        ({"pattern": "b", "how": "absent"}, "a", True),
        # Saying nothing is no way to keep a rule about what is said.
        ({"pattern": "b", "how": "absent"}, "", False),
        ({"pattern": "b", "how": "absent"}, " \n", False),
        ({"pattern": "b", "how": "absent"}, "<think>b", False),
        ({"pattern": "b", "how": "absent"}, "b</think>", False),
        ({"pattern": "b", "how": "absent"}, "b</think>a", True),
        ({"pattern": "b", "how": "absent"}, "a<answer> </answer>", False),
        ({"pattern": "b", "how": "absent", "where": "completion"}, "<think>a", True),
        ({"pattern": "b", "how": "absent", "where": "completion"}, "\t", False),
        # Who asks for an empty answer by a pattern gets it.
        ({"pattern": "", "how": "full"}, "", True),
        ({"pattern": "ABC", "ignore_case": True}, "abc", True),
        ({"pattern": "<think>.*</think>.+", "where": "completion"}, "<think>a\nb</think>c", True),
        ({"pattern": "<think>.*</think>.+", "where": "completion"}, "c", False),
        ({}, "xyz", True),
    ],
)
def test_patterns(options: dict[str, Any], completion: str, passed: bool) -> None:
    score = Pattern(**options).verify(completion, Task("x", "x.z"))
    assert (score.value, score.passed) == (float(passed), passed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"how": "match"}, '"full", "search" or "absent"'),
        ({"where": "thought"}, '"answer" or "completion"'),
    ],
)
def test_pattern_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Pattern(**options)
    with pytest.raises(VerificationError, match="no regular expression"):
        Pattern().verify("x", Task("x", "("))
    with pytest.raises(VerificationError, match="has no pattern"):
        Pattern().verify("x", Task("x"))
