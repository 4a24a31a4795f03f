"""No text that an agent could write makes a verifier do anything but score it or say that it cannot."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("math_verify")
pytest.importorskip("lm_eval")
pytest.importorskip("jsonschema")

from rehearsal.errors import SandboxError
from rehearsal.rewards.answers import answer_of
from rehearsal.rewards.code import CodeVerifier, extract_code
from rehearsal.rewards.instructions import InstructionFollowing, instruction_types
from rehearsal.rewards.judge import PairJudge, RubricJudge
from rehearsal.rewards.mathematics import LastNumber, Mathematics
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.questions import Question
from rehearsal.rewards.repetition import repetition_penalty
from rehearsal.rewards.reward_model import RewardModel
from rehearsal.rewards.structure import JsonSchema, Pattern
from rehearsal.rewards.verifier import Failure, Score, Task
from rehearsal.sandbox import Limits, strongest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import save_model

# Texts of any characters, and texts made of what verifiers look at.
PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "$", "$$", "\\frac", "\\sqrt", "\\(", "\\)",
     "18", "-", ".", ",", "1e9", "/", "^", "=", "%", "####", "```json\n", "```", '"', "[", "]", ":", "null", "NaN",
     "\n", " ", "***", "******", "P.S.", "Section 1", "<<", ">>", "yes", "the", "é", "\N{MINUS SIGN}", "\x00", "\ud800",
     "\u0661", "(", ")", "+", "x", "*", "A", "Answer: ", "```python\n", "```py", "def twice(n):", "    return n",
     "print(18)", "import os\n", "# ", "'''", "\\", "\t", "lambda", "@", "~"]
)  # fmt: skip
TEXTS = st.one_of(st.text(st.characters(codec=None, exclude_categories=())), st.lists(PIECES, max_size=25).map("".join))
INSTRUCTIONS = [
    ("keywords:existence", {"keywords": ["yes", "x"]}),
    ("keywords:forbidden_words", {"forbidden_words": ["the", "moon"]}),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"}),
    ("startend:end_checker", {"end_phrase": "Answer: x"}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Answer: x"}),
    ("keywords:frequency", {"keyword": "yes", "frequency": 1, "relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "less than"}),
    ("language:response_language", {"language": "en"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "the"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1}),
    *((kind, {}) for kind in (
        "detectable_format:json_format", "detectable_format:title", "combination:two_responses", "startend:quotation",
        "change_case:english_capital", "change_case:english_lowercase", "punctuation:no_comma",
        "detectable_format:constrained_response")),
]  # fmt: skip
DATA = {"instruction_id_list": [kind for kind, _ in INSTRUCTIONS], "kwargs": [given for _, given in INSTRUCTIONS]}


class Client:
    """A judge that repeats what it was sent, in which the agent's text is."""

    cost = None

    def ask(self, messages: Any, read: Any) -> Any:
        from rehearsal.rewards.verifier import VerificationError

        try:
            return read(messages[-1]["content"])
        except ValueError as problem:
            raise VerificationError("cannot be read") from problem


CASES: dict[str, tuple[Any, Task]] = {
    "math": (Mathematics(), Task("x", "18")),
    "math-boxed": (Mathematics(boxed=True), Task("x", "\\frac{1}{2}")),
    "last-number": (LastNumber(), Task("x", "18")),
    "exact": (Question(), Task("x", ["yes", "the x"])),
    "f1": (Question("f1"), Task("x", "the x 18")),
    "strict": (InstructionFollowing(), Task("x", data=DATA)),
    "loose": (InstructionFollowing("loose"), Task("x", data=DATA)),
    "json": (JsonSchema({"type": "object", "properties": {"x": {"type": "integer"}}}), Task("x")),
    "pattern": (Pattern(r"<think>[^<]*</think>\s*\S+", where="completion"), Task("x")),
    "rubric": (RubricJudge(Client(), ["x"]), Task("x")),  # type: ignore[arg-type]
    "pair": (PairJudge(Client()), Task("x", "y")),  # type: ignore[arg-type]
}


def check_all(texts: list[str], pool: VerifierPool, name: str) -> None:
    _, task = CASES[name]
    results = pool.verify(texts, [task] * len(texts), name)
    for text, result in zip(texts, results, strict=True):
        if isinstance(result, Failure):
            # That it cannot say is an answer; that it broke is not.
            assert result.kind != "crash", (name, text, result)
            assert "failed with" not in result.message, (name, text, result)
        else:
            assert isinstance(result, Score) and -1 <= result.value <= 1
            json.dumps(dict(result.parts))


@pytest.fixture(scope="module")
def pool(sentence_model: str) -> Any:
    verifiers = {name: replace(verifier, nltk_data=sentence_model) if name in ("strict", "loose") else verifier
                 for name, (verifier, _) in CASES.items()}  # fmt: skip
    with VerifierPool(verifiers, workers=2, timeout=20) as made:
        made.wait_until_warm()
        yield made


def test_all_25_types_of_instructions_are_checked(pool: VerifierPool) -> None:
    assert sorted(kind for kind, _ in INSTRUCTIONS) == instruction_types()
    for mode in ("strict", "loose"):
        (score,) = pool.verify(["Yes. It is x."], [CASES[mode][1]], mode)
        assert isinstance(score, Score) and len(score.parts) == 25


# Code: what is taken for code in every text, and a share of them run.

CODE_TASK = Task("def twice(n):\n", "def check(candidate):\n    assert candidate(2) == 4\n", {"entry_point": "twice"})
PROGRAM = Task("Print 18.", [["", "18\n"]])


def check_code(text: str) -> None:
    code = extract_code(text)
    assert code in text and "</think>" not in code


def test_the_code_of_a_few_random_texts() -> None:
    settings(max_examples=200, deadline=None, database=None)(given(TEXTS)(check_code))()


@pytest.mark.slow
def test_the_code_of_10000_random_texts() -> None:
    settings(max_examples=10_000, deadline=None, database=None)(given(TEXTS)(check_code))()


def run_code(batches: int) -> None:
    """Run batches of 100 random texts, half of them as functions and half as programs."""
    try:
        strongest()
    except SandboxError as error:
        pytest.skip(str(error))
    verifier = CodeVerifier(limits=Limits(seconds=5, memory_bytes=128 << 20))
    with verifier, VerifierPool({"code": verifier}, timeout=60) as own:

        @settings(max_examples=batches, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(TEXTS, min_size=100, max_size=100))
        def check(texts: list[str]) -> None:
            tasks = [CODE_TASK, PROGRAM] * 50
            for text, result in zip(texts, own.verify(texts, tasks, "code"), strict=True):
                # The tests are sound and the sandbox is there, so every text has a score.
                assert isinstance(result, Score) and result.value in (0.0, 1.0), (text, result)

        check()


def test_a_few_random_texts_as_code() -> None:
    run_code(1)


@pytest.mark.slow
def test_10000_random_texts_as_code() -> None:
    run_code(100)


# A reward model


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Any) -> Any:
    folder = tmp_path_factory.mktemp("reward")
    save_model(folder, base_tokenizer, ["reward"])
    return RewardModel(folder)


def rate_all(batches: int, model: RewardModel) -> None:
    with VerifierPool({"reward-model": model}) as own:

        @settings(max_examples=batches, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(TEXTS, min_size=100, max_size=100))
        def check(texts: list[str]) -> None:
            for text, result in zip(texts, own.verify(texts, [Task("x")] * len(texts), "reward-model"), strict=True):
                # Of those that are too long it says so, and of all others what they are worth.
                known = isinstance(result, Score) and math.isfinite(result.value)
                assert known or (isinstance(result, Failure) and "is too long" in result.message), (text, result)

        check()


def test_a_few_random_texts_by_a_reward_model(reward_model: RewardModel) -> None:
    rate_all(2, reward_model)


@pytest.mark.slow
def test_10000_random_texts_by_a_reward_model(reward_model: RewardModel) -> None:
    rate_all(100, reward_model)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_few_random_texts(name: str, pool: VerifierPool) -> None:
    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXTS, min_size=25, max_size=25))
    def check(texts: list[str]) -> None:
        check_all(texts, pool, name)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_10000_random_texts(name: str, pool: VerifierPool) -> None:
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXTS, min_size=100, max_size=100))
    def check(texts: list[str]) -> None:
        check_all(texts, pool, name)

    check()
    assert pool.counters[name].checks >= 10_000


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_the_answer_of_any_text(text: str) -> None:
    answer = answer_of(text)
    assert "<think>" not in answer
    assert answer in text
    assert -1 <= repetition_penalty(text, n=1) <= 0


def test_the_texts_reach_what_verifiers_look_at() -> None:
    """A generator whose texts all fail in the same way would show nothing."""
    seen = {"passed": 0, "failed": 0}

    @settings(max_examples=400, deadline=None, database=None)
    @given(TEXTS)
    def check(text: str) -> None:
        seen["passed" if LastNumber().verify(text, Task("x", "18")).passed else "failed"] += 1

    check()
    assert seen["passed"] > 0 and seen["failed"] > 100
