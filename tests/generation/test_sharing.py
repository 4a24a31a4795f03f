"""First tokens that many places have in common are read once for all, and nobody can tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.generation import blocks, local
from rehearsal.generation.blocks import common_tokens
from rehearsal.generation.cache import CachePlan, KeyValuePool, LayerShape
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.generation.weights import WeightWatch
from rehearsal.models.adapters import POLICY, WORLD, AdapterSettings, add_adapters

WARM = SamplingParams(max_tokens=9, stop_token_ids=(3, 4))
COMMON = np.random.default_rng(5).integers(6, 97, 21)
Said = list[tuple[list[int], list[float]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was shared in each pass of single tokens, with any two places and any token worth sharing."""
    found: list[int] = []
    before = CachePlan.__init__

    def noted(
        self: CachePlan, pool: Any, slots: Any, positions: Any, prefill: Any, device: Any, shared: int = 0
    ) -> None:
        if len(slots) > 1:
            found.append(shared)
        before(self, pool, slots, positions, prefill, device, shared)

    monkeypatch.setattr(CachePlan, "__init__", noted)
    monkeypatch.setattr(local, "_LEAST_READ", 1)
    monkeypatch.setattr(local, "_LEAST_SHARE", 0.0)
    return found


def engine_of(model: Any, places: int = 12) -> LocalEngine:
    return LocalEngine(model, max_context=96, max_sessions=places, memory_bytes=1 << 27)


def played(
    engine: LocalEngine, count: int, *, begin: Callable[[int], np.ndarray] = lambda i: COMMON,
    change: Callable[[], None] = lambda: None, adapters: Callable[[int], tuple[str, ...] | None] = lambda i: None,
) -> list[Said]:  # fmt: skip
    """Two turns of sessions that begin alike; ``change`` is called when a third of them have had their first."""
    answered: list[int] = []

    async def one(i: int) -> Said:
        rng = np.random.default_rng(i)
        session = engine.session(stream_key("sharing", i), adapters(i))
        session.extend(np.concatenate([begin(i), rng.integers(6, 97, i % 7)]))
        said = [await session.sample(WARM)]
        answered.append(i)
        if len(answered) == count // 3:
            change()
        for _ in range(i % 5):
            await asyncio.sleep(0)  # its place stands still while others go on
        session.extend(rng.integers(6, 97, 1 + i % 4))
        said.append(await session.sample(WARM))
        session.close()
        return [(answer.token_ids.tolist(), answer.logprobs.tolist()) for answer in said]

    async def main() -> list[Said]:
        return list(await asyncio.wait_for(asyncio.gather(*map(one, range(count))), 60))

    return asyncio.run(main())


def alike(some: list[Said], others: list[Said]) -> bool:
    return all(
        one[0] == other[0] and np.allclose(one[1], other[1], atol=1e-5)
        for said, heard in zip(some, others, strict=True)
        for one, other in zip(said, heard, strict=True)
    )


@given(st.integers(1, 6), st.integers(0, 12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_common_tokens_are_those_before_the_first_difference(n: int, most: int, look: int, random: Any) -> None:
    token_ids_SL = np.array([[random.choice((1, 1, 1, 2)) for _ in range(12)] for _ in range(8)])
    slots = np.array(sorted(random.sample(range(8), n)))
    expected = 0
    while expected < most and len(set(token_ids_SL[slots, expected])) == 1:
        expected += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_LOOK", look)
        assert common_tokens(token_ids_SL, slots, most) == expected


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gemma2", "qwen3_moe"])
def test_what_is_shared_changes_nothing_but_rounding(
    family: str, build_family: Callable[[str], Any], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_family(family)
    shared = played(engine_of(model), 30)
    assert min(lengths) >= len(COMMON)
    lengths.clear()
    monkeypatch.setattr(local, "_LEAST_READ", 1 << 30)
    assert alike(played(engine_of(model), 30), shared)
    assert set(lengths) == {0}


def test_others_that_begin_otherwise(
    build_family: Callable[[str], Any], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as they have in common, which is nothing where one of them is another's."""

    def begin(i: int) -> np.ndarray:
        return np.concatenate([COMMON[: 3 + i % 3], np.random.default_rng(i % 2).integers(6, 97, 15)])

    model = build_family("qwen3")
    shared = played(engine_of(model), 30, begin=begin)
    assert 3 in lengths
    monkeypatch.setattr(local, "_LEAST_READ", 1 << 30)
    assert alike(played(engine_of(model), 30, begin=begin), shared)


def test_what_other_weights_computed_is_not_shared(
    build_family: Callable[[str], Any], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who began before the weights changed keep what they have computed, and those who begin later do not take
    it for theirs."""

    def outcome() -> list[Said]:
        model = build_family("qwen3")

        def change() -> None:
            lengths.append(-1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)

        return played(engine_of(model), 30, change=change)

    shared = outcome()
    after = lengths[lengths.index(-1) + 1 :]
    first = after.index(0)
    assert first <= 1, "whoever goes on with the new ones has of both kinds"
    assert max(after[first:]) >= len(COMMON), "again when the old ones are gone"
    monkeypatch.setattr(local, "_LEAST_READ", 1 << 30)
    assert alike(outcome(), shared)


def test_each_adapter_shares_with_its_own(
    build_family: Callable[[str], Any], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapters(build_family("qwen3"), AdapterSettings(policy_rank=4, world_rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)

    def adapters(i: int) -> tuple[str, ...]:
        return (POLICY,) if i % 2 else (WORLD,)

    shared = played(engine_of(model), 24, adapters=adapters)
    assert max(lengths) >= len(COMMON)
    monkeypatch.setattr(local, "_LEAST_READ", 1 << 30)
    assert alike(played(engine_of(model), 24, adapters=adapters), shared)


def test_adapters_that_write_into_the_weights_for_a_pass_change_none(
    build_family: Callable[[str], Any], lengths: list[int]
) -> None:
    model = add_adapters(build_family("qwen3_moe"), AdapterSettings(policy_rank=4, world_rank=4))
    played(engine_of(model), 12)
    assert min(lengths) >= len(COMMON)


def test_what_was_withdrawn_is_computed_again_whatever_happens_to_others(
    build_family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is given up, other words come in its place, and then somebody else's step fails."""
    model = build_family("qwen3")
    words = np.random.default_rng(9).integers(6, 97, 20)
    long = SamplingParams(max_tokens=40)

    async def answered(fails: bool) -> list[float]:
        engine = engine_of(model)
        session, other = engine.session(1), engine.session(2)
        session.extend(COMMON)
        other.extend(COMMON[:5])
        task = asyncio.ensure_future(session.sample(long))
        for _ in range(12):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        session.extend(words)
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(blocks.BlockRunner, "run", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await other.sample(WARM)
        return (await session.sample(WARM)).logprobs.tolist()

    assert asyncio.run(answered(True)) == pytest.approx(asyncio.run(answered(False)), abs=1e-5)


def test_few_places_and_few_tokens_are_not_worth_it(build_family: Callable[[str], Any], lengths: list[int]) -> None:
    model = build_family("qwen3")
    for limit, most in (("_LEAST_SHARE", 1.0), ("_LEAST_READ", 21 * 20)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, limit, most)
            played(engine_of(model), 10)
    assert set(lengths) == {0}


def test_what_is_copied_and_kept_aside_comes_from_the_same_weights() -> None:
    shapes = {layer: LayerShape(2, 3, 5, torch.float32) for layer in range(2)}
    pool = KeyValuePool(shapes, 4, 10, torch.device("cpu"))
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.normal_()
    one = np.array([0])
    pool.computed_with(7, one, np.array([0]))
    pool.copy(0, 1, 6)
    assert pool.alike(np.array([0, 1]))
    assert torch.equal(pool.keys[1][1, :, :, :6], pool.keys[1][0, :, :, :6])
    assert torch.equal(pool.values[1][1, :, :6], pool.values[1][0, :, :6])
    assert not torch.equal(pool.values[1][1, :, 6:], pool.values[1][0, :, 6:])
    kept = pool.save(0, 4)
    pool.computed_with(8, one, np.array([6]))
    assert not pool.alike(one), "two kinds of weights in one place"
    pool.computed_with(8, one, np.array([0]))
    assert pool.alike(one) and not pool.alike(np.array([0, 1]))
    pool.keys[0].zero_()
    pool.load(2, 4, kept)
    assert pool.alike(np.array([1, 2])) and bool(pool.keys[0][2, :, :, :4].abs().min() > 0)


def test_the_watch_numbers_weights() -> None:
    model = torch.nn.Linear(2, 2)
    watch = WeightWatch(model)
    first, alive = watch.look()
    assert watch.look() == (first, alive) and first in alive
    with torch.no_grad():
        model.weight.add_(1)
    second, alive = watch.look()
    assert second != first and first not in alive and second in alive
    model.bias = torch.nn.Parameter(torch.zeros(2))
    watch.renew()
    assert watch.look()[0] not in (first, second)
