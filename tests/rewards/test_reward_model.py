"""Reward models: tiny ones with random weights, saved on the spot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsal.errors import RewardError
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.reward_model import RewardModel
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import save_model

TEXTS = ["Left", "Right or left", "Up", "Down, down and down again", "Left"]
TASKS = [Task("Where to?")] * len(TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Any) -> Path:
    made = tmp_path_factory.mktemp("reward")
    save_model(made, base_tokenizer, ["reward"])
    return made


def values(results: list[Score | Failure]) -> list[float]:
    assert all(isinstance(result, Score) for result in results), results
    return [result.value for result in results if isinstance(result, Score)]


def test_a_tokenizer_may_allow_less_than_the_model_has_positions_for(tmp_path: Path, base_tokenizer: Any) -> None:
    """RoBERTa has 514 positions for 512 tokens; the 513th failed inside of the model, and with it the whole batch."""
    save_model(tmp_path, base_tokenizer, ["reward"])
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 40}))
    short, long = RewardModel(tmp_path).verify_batch(["Up", "Up " * 60], TASKS[:2])
    assert isinstance(short, Score)
    assert isinstance(long, Failure) and "model of 40" in long.message


def test_batches_rate_as_single_texts_do(folder: Path) -> None:
    one_by_one = [RewardModel(folder, batch_size=1).verify(text, TASKS[0]).value for text in TEXTS]
    for size in (2, 3, 16):
        together = values(RewardModel(folder, batch_size=size).verify_batch(TEXTS, TASKS))
        assert together == pytest.approx(one_by_one, abs=1e-5)
    assert one_by_one[0] == one_by_one[4]
    assert len(set(one_by_one)) == 4


def test_the_value_is_the_logit_of_the_whole_chat(folder: Path, base_tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": "Where to?"}, {"role": "assistant", "content": "Up"}]
    if base_tokenizer.chat_template:
        text = base_tokenizer.apply_chat_template(chat, tokenize=False)
        ids = base_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = base_tokenizer("Where to?\n\nUp", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = float(model(input_ids=ids).logits[0, 0])
    score = RewardModel(folder, threshold=expected).verify("<think>hm</think>Up", Task("Where to?"))
    assert score.value == pytest.approx(expected, abs=1e-5)
    assert score.passed == (score.value >= expected)
    with_thought = RewardModel(folder, with_thought=True).verify("<think>hm</think>Up", Task("Where to?"))
    assert with_thought.value != pytest.approx(expected, abs=1e-5)


def test_what_is_too_long_is_an_error_and_not_cut(folder: Path) -> None:
    model = RewardModel(folder, max_tokens=60)
    results = model.verify_batch(["Up", "Left " * 200, "Up"], [TASKS[0]] * 3)
    assert isinstance(results[1], Failure) and "too long for a reward model of 60" in results[1].message
    assert isinstance(results[0], Score) and results[0] == results[2]
    with pytest.raises(VerificationError, match="too long"):
        model.verify("Left " * 200, TASKS[0])


def test_a_pool_gives_it_all_at_once(folder: Path) -> None:
    model = RewardModel(folder)
    with VerifierPool(model) as pool:
        assert values(pool.verify(TEXTS, TASKS)) == values(model.verify_batch(TEXTS, TASKS))


def test_one_of_several_labels(tmp_path: Path, base_tokenizer: Any) -> None:
    save_model(tmp_path, base_tokenizer, ["bad", "good"])
    by_name, by_number = RewardModel(tmp_path, label="good"), RewardModel(tmp_path, label=1)
    assert values(by_name.verify_batch(TEXTS, TASKS)) == values(by_number.verify_batch(TEXTS, TASKS))
    assert values(RewardModel(tmp_path, label="bad").verify_batch(TEXTS, TASKS)) != values(
        by_name.verify_batch(TEXTS, TASKS)
    )
    for label, message in ((None, "has 2 labels; say which"), ("fine", "no label 'fine'"), (2, "labels 0 to 1")):
        with pytest.raises(RewardError, match=message):
            RewardModel(tmp_path, label=label)


def test_a_model_that_gives_no_number(tmp_path: Path, base_tokenizer: Any) -> None:
    model = save_model(tmp_path, base_tokenizer, ["reward"])
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(tmp_path)
    (result,) = RewardModel(tmp_path).verify_batch(["Up"], TASKS[:1])
    assert isinstance(result, Failure) and "not finite" in result.message


def test_folders_that_hold_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="There is no folder"):
        RewardModel(tmp_path / "nothing")
    with pytest.raises(RewardError, match="no reward model that can be loaded"):
        RewardModel(tmp_path)


def test_a_text_that_no_tokenizer_takes_spoils_no_other(folder: Path) -> None:
    texts = ["Left", "half a pair: \ud800", "Up"]
    results = RewardModel(folder).verify_batch(texts, [Task("Where \udfff to?")] * 3)
    assert [isinstance(result, Score) for result in results] == [True] * 3
