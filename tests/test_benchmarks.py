"""The benchmarks run, and their results have the form that tables are made from."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import interleaved, met, ratio, report  # noqa: E402
from benchmarks.counting import decoder_weights, items_of, packed_counts, training_flops  # noqa: E402
from benchmarks.demo import read_closing_line  # noqa: E402
from benchmarks.soak_account import Account  # noqa: E402
from benchmarks.soak_faults import Dice, Move, Plan  # noqa: E402
from benchmarks.soak_state import slope  # noqa: E402
from rehearsal.models.packing import PackItem, make_packs  # noqa: E402
from rehearsal.sandbox import available  # noqa: E402
from rehearsal.training.base_config import BaseConfig  # noqa: E402
from rehearsal.trajectory import (  # noqa: E402
    Group,
    Kind,
    Segment,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)


def test_the_line_that_the_demo_ends_with_is_read() -> None:
    told = "held-out success 22% -> 85% on 256 held-out maps in 2m 54s, report: runs/demo/report.html"
    found = read_closing_line(f"50/50 87% {told}")
    assert found == {"before": 0.22, "after": 0.85, "held_out": 256.0, "training_seconds": 174.0}
    assert read_closing_line(told.replace("2m 54s", "1h 2m 3s"))["training_seconds"] == 3723.0
    with pytest.raises(ValueError, match="its line"):
        read_closing_line("done")


FIELDS = {"name", "command", "commit", "device", "seeds", "figures", "goals", "holds"}


def check_result(result: dict[str, Any]) -> None:
    assert set(result) == FIELDS
    assert set(result["device"]) == {"name", "cores", "threads"}
    assert result["figures"]
    assert all(value is None or isinstance(value, float) for value in result["figures"].values())
    assert set(result["goals"]) <= set(result["figures"])
    assert isinstance(result["holds"], bool)
    assert str(ROOT) not in json.dumps(result)


def run_script(script: str, *arguments: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_report_prints_and_writes_the_same_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"ratio": 6.1234567, "spread": 2.0}
    result = report("speed", figures, {"ratio": ">= 5"}, [0, 1], quick=False, results=tmp_path)
    check_result(result)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert result["holds"] is True
    assert result["figures"]["ratio"] == 6.12346
    assert result["seeds"] == [0, 1]


def test_a_quick_report_writes_nothing(tmp_path: Path) -> None:
    report("speed", {"ratio": 1.0}, {}, [0], quick=True, results=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [4.9, math.nan])
def test_a_goal_that_is_missed_does_not_hold(value: float, tmp_path: Path) -> None:
    assert report("speed", {"ratio": value}, {"ratio": ">= 5"}, [0], True, results=tmp_path)["holds"] is False


def test_a_goal_needs_its_figure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speedup"):
        report("speed", {"ratio": 1.0}, {"speedup": ">= 5"}, [0], True, results=tmp_path)


def test_bounds_have_two_directions() -> None:
    assert met(5.0, ">= 5")
    assert not met(1.6, "<= 1.5")
    with pytest.raises(ValueError, match="written like"):
        met(1.0, "== 1")


def test_interleaving_alternates_the_order() -> None:
    calls: list[str] = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_tells_its_spread() -> None:
    compared = ratio([2.0, 6.0, 9.0], [1.0, 2.0, 3.0])
    assert (compared.median, compared.low, compared.high) == (3.0, 2.0, 3.0)


def brute_pairs(lengths: list[int]) -> int:
    return sum(query + 1 for length in lengths for query in range(length))


def test_counts_of_packed_sequences_agree_with_the_packs() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(50, size=20)
    items = []
    for group, tails in ((0, (7, 12, 9)), (1, (5,))):
        for tail in tails:
            ids = np.concatenate([prompt + group, rng.integers(50, size=tail)]).astype(np.int32)
            items.append(PackItem(ids, np.arange(21, len(ids)), group))
    for share in (False, True):
        packs = make_packs(items, 1000, share_prefixes=share)
        tokens, pairs = packed_counts(items, [pack.items for pack in packs], share)
        assert tokens == sum(pack.n_tokens for pack in packs)
        wanted = brute_pairs([len(item.token_ids) for item in items])
        # The members of the first group have at least their prompt in common, which is attended to once.
        assert pairs == wanted if not share else pairs <= wanted - 2 * brute_pairs([20])


def test_operations_of_a_step_are_those_of_its_matrix_products() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    one_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert decoder_weights(model) == 2 * one_layer
    assert training_flops(model, 10, 4, 55) == 6 * 2 * one_layer * 10 + 6 * 4 * 40 * 16 + 12 * 55 * 16 * 2


def test_items_are_what_was_sampled() -> None:
    kinds = np.array([Kind.TEMPLATE, Kind.OBSERVATION, Kind.THOUGHT, Kind.ACTION])
    segment = Segment(np.arange(4), np.zeros(4), kinds, np.zeros(4))
    (item,) = items_of([Group([Trajectory("game", 0, segments=[segment])])])
    assert item.targets.tolist() == [2, 3]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rehearsal.models.load import save_policy
    from rehearsal.training.base_training import new_model
    from rehearsal.training.base_transcripts import make_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    config = BaseConfig(hidden=16, layers=1, heads=2, head_dim=8, mlp=16, tokenizer_episodes=20, vocabulary=512)
    tokenizer = make_tokenizer(config)
    save_policy(new_model(config, tokenizer), tokenizer, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "wanted"),
    [
        ("against_trl", ["--groups", "1", "--steps", "1", "--trl-batch", "8"], "ratio"),
        ("generation", ["--turns", "2", "--episodes", "4"], "ratio_2_turns"),
        ("learner", ["--groups", "2", "--repeats", "1"], "utilisation"),
    ],
)
def test_a_quick_run_ends_with_a_result(script: str, arguments: list[str], wanted: str, tiny_folder: Path) -> None:
    before = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    result = run_script(script, "--quick", "--model", str(tiny_folder), *arguments)
    assert set(result) == FIELDS
    assert result["name"] == script
    assert result["figures"][wanted] > 0
    assert sorted((ROOT / "benchmarks" / "results").glob("*.json")) == before
    if script == "against_trl":
        # Both sides play the same game: a model of random weights uses up its tokens on either.
        mine, theirs = (result["figures"][f"{side}sampled_tokens_per_episode"] for side in ("", "trl_"))
        assert mine == pytest.approx(theirs, rel=0.2)
    if script == "learner":
        assert result["figures"]["padded_tokens"] > result["figures"]["packed_tokens"]
        assert result["figures"]["packed_tokens"] > result["figures"]["shared_tokens"]
        assert result["figures"]["padded_step_mib"] > 0


@pytest.mark.slow
def test_the_cost_of_diagnostics_is_measured() -> None:
    result = run_script("diagnostics", "--quick")
    assert 0 < result["figures"]["share"] < 1
    assert result["figures"]["steps_with_gradients"] == 1


@pytest.mark.slow
def test_verifications_are_measured() -> None:
    pytest.importorskip("math_verify")
    result = run_script("verifiers", "--quick")
    check_result(result)
    assert all(value > 0 for value in result["figures"].values())
    assert set(result["goals"]) == {"one_over_loop", "pool_over_loop"}


@pytest.mark.slow
def test_the_cost_of_the_sandbox_is_measured() -> None:
    if all(available().values()):
        pytest.skip("there is no sandbox here")
    result = run_script("sandbox", "--quick", "--interpreters", "4")
    check_result(result)
    assert result["figures"]["sandbox_call_ms"] > 0
    assert 0 < result["figures"]["memory_each_mib"] < 64


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="it reads /proc")
def test_a_soak_accounts_for_every_episode_and_leaves_nothing() -> None:
    if all(available().values()):
        pytest.skip("there is no sandbox here")
    result = run_script("soak", "--quick", "--episodes", "48", "--patience", "3")
    check_result(result)
    assert result["figures"]["episodes"] == 96
    assert sum(count for name, count in result["figures"].items() if name.startswith("stop/")) == 96
    assert sum(count for name, count in result["figures"].items() if name.startswith("fault/")) > 10
    assert {name: result["figures"][name] for name in result["goals"]} == dict.fromkeys(result["goals"], 0.0)


def trajectory(**changes: Any) -> Trajectory:
    """An episode of the soak that went as planned."""
    call = ToolCall("ledger", {"entry": "7"}, result="noted 7")
    turns = [Turn("o", calls=[call]), Turn("o", executed=["3"], rewards=[1.0])]
    settings: dict[str, Any] = {"turns": turns, "success": True, "stop_reason": StopReason.TERMINATED, **changes}
    return Trajectory("calculate", 0, **settings)


@pytest.mark.parametrize(
    ("changes", "fault", "what"),
    [
        ({}, "", None),
        ({"stop_reason": None}, "", "unaccounted"),
        ({"stop_reason": StopReason.ERROR, "turns": []}, "", "unaccounted"),
        ({"error": "x"}, "", "unaccounted"),
        ({"success": False}, "", "unexplained"),
        ({"stop_reason": StopReason.TURN_LIMIT}, "", "unexplained"),
        ({"stop_reason": StopReason.ERROR, "error": "E.step raised KeyError."}, "", "unexplained"),
        ({}, "verifier hangs", "silent"),
        ({"stop_reason": StopReason.ERROR, "error": "could not be checked (error): x"}, "verifier hangs", "silent"),
        ({"stop_reason": StopReason.ERROR, "error": "could not be checked (timeout): x"}, "verifier hangs", None),
        ({"turns": [Turn("o", calls=[ToolCall("ledger", {"entry": "7"}, result="noted 8")]),
                    Turn("o", rewards=[1.0])]}, "", "wrong"),
        ({"turns": [Turn("o", calls=[ToolCall("ledger", {"entry": "7"}, error="raised")]),
                    Turn("o", rewards=[1.0])]}, "", "unexplained"),
    ],
)  # fmt: skip
def test_what_the_soak_takes_for_a_problem(changes: dict[str, Any], fault: str, what: str | None) -> None:
    plan = Plan(7, (Move("ledger", {"entry": "7"}, expected="noted 7"),), fault)
    account = Account()
    account.add(trajectory(**changes), {7: plan}, Dice(0.0, True))
    counts = {"unaccounted": account.unaccounted, "unexplained": account.unexplained, "wrong": account.wrong,
              "silent": sum(account.silent.values())}  # fmt: skip
    assert [name for name, count in counts.items() if count] == ([what] if what else [])


def test_a_slope_tells_growth_from_noise() -> None:
    rng = np.random.default_rng(0)
    episodes = np.arange(80.0, 2001.0, 80.0)
    noise = rng.normal(0.0, 300.0, len(episodes))
    for growth in (0.0, 8.0):
        rise, half = slope(list(5e5 + growth * episodes + noise), list(episodes))
        assert abs(rise - growth) < half
        assert half < 1.0


@pytest.mark.slow
def test_the_gpu_script_walks_its_path_on_a_processor() -> None:
    result = run_script("on_gpu", "--device", "cpu", "--tiny", "--trl-engines", "generate")
    check_result(result)
    assert result["figures"]["sampled_tokens_per_episode"] == result["figures"]["trl_sampled_tokens_per_episode"]
    assert all(result["figures"][name] > 0 for name in ("decoding", "learning", "ratio"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_gpu_script_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/on_gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "CUDA" in done.stderr
    assert done.stdout == ""
