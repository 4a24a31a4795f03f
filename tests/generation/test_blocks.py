"""Steps cut into blocks: every row once, and the same samples however they are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.errors import GenerationError
from rehearsal.generation import blocks
from rehearsal.generation.blocks import Run, cut_blocks
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key

WARM = SamplingParams(max_tokens=7, stop_token_ids=(3, 4))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sampled(model: Any, n_threads: int, change: Callable[[], None] | None = None) -> list[Any]:
    """Two turns of 30 sessions with prompts of their own."""
    torch.set_num_threads(n_threads)
    engine = LocalEngine(model, max_context=64, max_sessions=24, memory_bytes=1 << 27)

    async def one(i: int) -> list[Any]:
        rng = np.random.default_rng(i)
        session = engine.session(stream_key("blocks", i))
        session.extend(rng.integers(6, 97, 1 + i % 9))
        first = await session.sample(WARM)
        if change is not None and i == 0:
            change()
        session.extend(rng.integers(6, 97, 1 + i % 4))
        second = await session.sample(WARM)
        session.close()
        return [first.token_ids.tolist(), first.logprobs.tolist(), second.token_ids.tolist(), second.logprobs.tolist()]

    async def main() -> list[Any]:
        return list(await asyncio.wait_for(asyncio.gather(*map(one, range(30)), return_exceptions=True), 60))

    answers = asyncio.run(main())
    assert torch.get_num_threads() == n_threads
    return answers


@given(st.integers(0, 300), st.lists(st.integers(1, 700), max_size=12))
def test_every_row_is_in_one_block(n_single: int, lengths: list[int]) -> None:
    slots = np.arange(n_single) * 2
    runs = [Run(1000 + i, 0, np.zeros(length, np.int32), True) for i, length in enumerate(lengths)]
    cut = cut_blocks(slots, slots + 1, slots + 2, runs)
    assert np.array_equal(np.concatenate([slots[:0], *(block.slots for block in cut)]), slots)
    assert np.array_equal(np.concatenate([slots[:0], *(block.token_ids for block in cut)]), slots + 2)
    assert [run for block in cut for run in block.runs] == runs
    for block in cut:
        tokens = [len(run.token_ids) for run in block.runs]
        assert len(block.slots) + len(tokens) > 0
        assert len(block.slots) <= 128
        assert len(tokens) <= 1 or sum(tokens) <= 256


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_how_a_step_is_cut_changes_nothing_but_rounding(
    family: str, build_family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_family(family)
    whole = sampled(model, 1)
    monkeypatch.setattr(blocks, "_DECODE_ROWS", 4)
    monkeypatch.setattr(blocks, "_PREFILL_TOKENS", 12)
    for one, other in zip(sampled(model, 1), whole, strict=True):
        assert (one[0], one[2]) == (other[0], other[2])
        assert np.allclose(one[1] + one[3], other[1] + other[3], atol=1e-5)


def test_weights_that_change_between_two_turns_are_used_at_once(build_family: Callable[[str], Any]) -> None:
    model = build_family("qwen3")

    def change() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)

    # Session 0 changes the weights after its first answer.
    first_ids, _, second_ids, second_logprobs = sampled(model, 1, change)[0]
    rng = np.random.default_rng(0)
    prompt, observation = rng.integers(6, 97, 1), rng.integers(6, 97, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.5)
        ids = torch.from_numpy(np.concatenate([prompt, first_ids, observation, second_ids]).astype(np.int64))
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    old = logprobs[:-1].gather(1, ids[1:, None])[-len(second_ids) :, 0]
    assert not np.allclose(old.numpy(), second_logprobs, atol=1e-3)


def test_an_error_in_one_block_reaches_everyone(
    build_family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_DECODE_ROWS", 4)
    model = build_family("qwen3")
    with torch.no_grad():
        # Token 50 poisons the rows that read it, and no others.
        model.get_input_embeddings().weight[50] = float("nan")
    answers = sampled(model, 3)
    assert all(isinstance(answer, GenerationError) and "not finite" in str(answer) for answer in answers)
