"""Our policies under lm-eval: the same scores and answers as its own wrapper of Hugging Face models gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rehearsal.errors import RecipeError
from rehearsal.models.load import load_policy, save_policy

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm-eval's own wrapper needs it")

from rehearsal.evaluation.lm_harness import RehearsalLM, main

LENGTH = 64
PAIRS = [
    ("Up goes", " Left"), ("Up goes", " Right and down"), ("Up goes ", "Left"), ("", "Nothing before"),
    ("The goal is to the left. " * 12, " Go left"), ("a", "b"), ("<|im_start|>user\nHello", "<|im_end|>"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Any, tiny_qwen3: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("harness") / "model"
    model = tiny_qwen3(len(base_tokenizer), seed=11, eos_token_id=base_tokenizer.eos_token_id, initializer_range=0.3)
    save_policy(model, base_tokenizer, path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> RehearsalLM:
    return RehearsalLM(str(folder), device="cpu", max_length=LENGTH)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    policy = load_policy(folder, device="cpu")
    return HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, max_length=LENGTH, batch_size=1, device="cpu")


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_continuations_score_as_theirs(ours: RehearsalLM, theirs: Any) -> None:
    asked = requests("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    for (score, greedy), (their_score, their_greedy), pair in zip(found, expected, PAIRS, strict=True):
        assert score == pytest.approx(their_score, abs=2e-4), pair
        assert greedy == their_greedy, pair


def test_the_likeliest_continuation_is_known_as_such(ours: RehearsalLM, theirs: Any) -> None:
    (text,) = ours.generate_until(requests("generate_until", [("Up goes", {"until": [], "max_gen_toks": 3})]))
    ids = ours.tok_encode("Up goes" + text)
    if ids[: len(ours.tok_encode("Up goes"))] == ours.tok_encode("Up goes"):
        asked = requests("loglikelihood", [("Up goes", text)])
        assert ours.loglikelihood(asked)[0][1] == theirs.loglikelihood(asked, disable_tqdm=True)[0][1]


def test_texts_longer_than_the_model_score_as_theirs(ours: RehearsalLM, theirs: Any) -> None:
    texts = [("Left Right Up Down. " * 30,), ("short",), ("The goal lies there, " * 9,)]
    asked = requests("loglikelihood_rolling", texts)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5
    )


def test_answers_are_theirs(ours: RehearsalLM, theirs: Any) -> None:
    contexts = ["Up goes", "The goal is to the left. " * 12, "a"]
    free: dict[str, Any] = {"until": [], "max_gen_toks": 40, "do_sample": False}
    asked = requests("generate_until", [(context, dict(free)) for context in contexts])
    whole = ours.generate_until(asked)
    assert whole == theirs.generate_until(asked, disable_tqdm=True)
    assert max(map(len, whole)) > 20
    # An end that lies across the tokens, and one that never comes.
    for text, context in zip(whole, contexts, strict=True):
        end = text[len(text) // 2 : len(text) // 2 + 2] or "never"
        stopped = requests("generate_until", [(context, {**free, "until": [end, "NEVER"]})])
        (found,) = ours.generate_until(stopped)
        assert [found] == theirs.generate_until(stopped, disable_tqdm=True)
        assert found == text.split(end)[0]


def test_sampled_answers_depend_on_the_seed_alone(folder: Path) -> None:
    options: dict[str, Any] = {"until": ["\n\n\n"], "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    asked = requests("generate_until", [("Up", {**options, "max_new_tokens": 20})])
    first, again, other = (
        RehearsalLM(load_policy(folder, device="cpu"), max_length=LENGTH, seed=seed).generate_until(asked)
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_what_cannot_be_done_is_told(ours: RehearsalLM, folder: Path) -> None:
    with pytest.raises(RecipeError, match="leaves no room"):
        ours.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": LENGTH})]))
    with pytest.raises(RecipeError, match="num_beams=4"):
        ours.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": 2, "num_beams": 4})]))
    with pytest.raises(RecipeError, match="cannot be scored in 64 tokens"):
        ours.loglikelihood(requests("loglikelihood", [("a", " Left" * 200)]))
    with pytest.raises(RecipeError, match="max_length must be from 2"):
        RehearsalLM(str(folder), max_length=100_000)
    assert ours.generate_until([]) == []


def test_chats_are_rendered_as_theirs(ours: RehearsalLM, theirs: Any) -> None:
    chat = [{"role": "user", "content": "Where to?"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert isinstance(ours.tokenizer_name, str)


def tasks_in(path: Path) -> list[dict[str, Any]]:
    """A task of each kind, over a file of a few rows."""
    rows = [{"question": f"{a} and {b}?", "options": ["Left", "Right", "Up"], "right": (a + b) % 3, "text": "Up " * a}
            for a in range(1, 4) for b in range(2)]  # fmt: skip
    (path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(path / "rows.json")}, "cache_dir": str(path / "cache")},
    }  # fmt: skip
    return [
        {**common, "task": "made_up_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
         "doc_to_choice": "options", "doc_to_target": "right", "metric_list": [{"metric": "acc"}]},
        {**common, "task": "made_up_text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
        {**common, "task": "made_up_answer", "output_type": "generate_until", "doc_to_text": "{{question}}",
         "doc_to_target": "Left", "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
         "metric_list": [{"metric": "exact_match"}]},
    ]  # fmt: skip


def test_whole_tasks_come_out_as_theirs(ours: RehearsalLM, theirs: Any, tmp_path: Path) -> None:
    import lm_eval

    def results(model: Any) -> Any:
        return lm_eval.simple_evaluate(model=model, tasks=tasks_in(tmp_path), bootstrap_iters=0, log_samples=True)

    found, expected = results(ours), results(theirs)
    for task in ("made_up_choice", "made_up_text", "made_up_answer"):
        for metric, value in expected["results"][task].items():
            if isinstance(value, int | float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
        mine, their = ([row["filtered_resps"] for row in side["samples"][task]] for side in (found, expected))
        if task == "made_up_answer":
            assert mine == their


@pytest.mark.slow
def test_the_command_knows_our_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    choice = tasks_in(tmp_path)[0]
    import yaml

    (tmp_path / "made_up_choice.yaml").write_text(yaml.safe_dump(choice))
    monkeypatch.setattr(sys, "argv", [
        "lm_harness", "run", "--model", "rehearsal", "--model_args", f"policy={folder},max_length=64", "--tasks",
        "made_up_choice", "--include_path", str(tmp_path), "--device", "cpu",
    ])  # fmt: skip
    main()
    assert "made_up_choice" in capsys.readouterr().out
