"""The local engine against plain ones: generate(), full forward passes, and itself under every kind of pressure."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rehearsal.errors import GenerationError
from rehearsal.generation.local import LocalEngine, LocalSession, free_memory
from rehearsal.generation.sampling import SamplingParams, stream_key, truncate
from rehearsal.generation.session import Sampled
from rehearsal.trajectory import SampleStop

VOCABULARY = 97
WINDOW = 6
CONTEXT = 96
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
WARM = SamplingParams(temperature=1.0, max_tokens=9, stop_token_ids=(3, 4, 5))

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_WITHOUT_HEAD_DIM = {name: value for name, value in _COMMON.items() if name != "head_dim"}


def _build(name: str) -> Any:
    torch.manual_seed(1)
    # Wide weights: the distributions are peaked and differ from token to token, so a wrong cache shows.
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**_COMMON, initializer_range=0.3))
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**_WITHOUT_HEAD_DIM, initializer_range=0.3))
    if name == "gemma3":
        config = Gemma3TextConfig(
            **_COMMON, initializer_range=0.3, sliding_window=WINDOW, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )  # fmt: skip
        return Gemma3ForCausalLM(config)
    if name == "olmo2":
        return Olmo2ForCausalLM(Olmo2Config(**_WITHOUT_HEAD_DIM, initializer_range=0.3))
    assert name == "qwen3_moe"
    config = Qwen3MoeConfig(
        **_COMMON, initializer_range=0.3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


_MODELS: dict[str, Any] = {}


def tiny(name: str) -> Any:
    if name not in _MODELS:
        _MODELS[name] = _build(name).eval()
    return _MODELS[name]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory(torch.device("cpu"))
    assert whole > 0
    for name, text in (("most", "3000000"), ("used", "2500000"), ("stat", "file 9\ninactive_file 400000\n")):
        (tmp_path / name).write_text(text)
    files = (str(tmp_path / "most"), str(tmp_path / "used"), (str(tmp_path / "stat"), "inactive_file"))
    monkeypatch.setattr("rehearsal.generation.local._CONTAINER", (files,))
    assert free_memory(torch.device("cpu")) == 900_000, "cached files can be given back"
    (tmp_path / "most").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 900_000, "no limit"


@pytest.fixture(params=["qwen3", "llama", "gemma3", "olmo2", "qwen3_moe"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def qwen3() -> Any:
    return tiny("qwen3")


def engine_of(model: Any, **kwargs: Any) -> LocalEngine:
    return LocalEngine(model, **{"max_context": CONTEXT, "max_sessions": 8, "memory_bytes": 1 << 28, **kwargs})


def prompts_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, VOCABULARY, length, dtype=np.int32) for length in lengths]


def run(main: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        # A lost session would wait for ever: better a failure than a hanging test.
        return await asyncio.wait_for(main, 60)

    return asyncio.run(bounded())


async def gathered(*jobs: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*jobs))


def started(engine: LocalEngine, prompt: Sequence[int] | np.ndarray, key: int = 0) -> LocalSession:
    session = engine.session(key)
    session.extend(prompt)
    return session


@torch.no_grad()
def full_logprobs(model: Any, ids: np.ndarray, begin: int, params: SamplingParams) -> np.ndarray:
    """Log-probs of ids[begin:] from one ordinary forward pass, under the distribution that was sampled from."""
    logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float()
    logprobs = torch.log_softmax(truncate(logits / params.temperature, params), -1)[begin - 1 : -1]
    return logprobs.gather(1, torch.from_numpy(ids[begin:].astype(np.int64))[:, None])[:, 0].numpy()


def same(first: Sampled, second: Sampled, tolerance: float = 1e-5) -> bool:
    return (
        np.array_equal(first.token_ids, second.token_ids)
        and np.allclose(first.logprobs, second.logprobs, atol=tolerance)
        and first.stop == second.stop
    )


async def episode(
    engine: LocalEngine, i: int, params: SamplingParams = WARM, turns: int = 4, close: bool = True
) -> list[Sampled]:
    """Episode number i: its prompt, its number of turns and its observations depend on nothing but i."""
    rng = np.random.default_rng(i)
    session = started(engine, rng.integers(6, VOCABULARY, 2 + (5 * i) % 23), stream_key("episode", i))
    answers = []
    for turn in range(1 + i % turns):
        answers.append(await session.sample(params))
        if turn % 2:
            await asyncio.sleep(0.0005 * (i % 3))
        session.extend(rng.integers(6, VOCABULARY, 1 + (i + turn) % 7))
    if close:
        session.close()
    return answers


class TestAgainstTransformers:
    def test_greedy_equals_generate(self, model: Any) -> None:
        prompts = prompts_of(1, 2, 5, 11, 30)
        engine = engine_of(model)
        answers = run(gathered(*(started(engine, prompt).sample(GREEDY) for prompt in prompts)))
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = model.generate(
                torch.from_numpy(prompt.astype(np.int64))[None], attention_mask=torch.ones(1, len(prompt)),
                do_sample=False, max_new_tokens=GREEDY.max_tokens,
            )[0, len(prompt) :]  # fmt: skip
            assert answer.token_ids.tolist() == expected.tolist()
            assert answer.stop == SampleStop.LENGTH
            assert np.array_equal(answer.logprobs, np.zeros(GREEDY.max_tokens, np.float32))

    @pytest.mark.parametrize(
        "params",
        [WARM, SamplingParams(temperature=0.6, max_tokens=7), SamplingParams(top_k=5, top_p=0.9, max_tokens=7)],
        ids=["plain", "temperature", "truncated"],
    )
    def test_log_probs_equal_a_full_forward_pass_over_several_turns(self, model: Any, params: SamplingParams) -> None:
        engine = engine_of(model, max_sessions=3)

        async def play(prompt: np.ndarray, key: int) -> list[tuple[np.ndarray, int, Sampled]]:
            session = started(engine, prompt, key)
            turns = []
            for observation in prompts_of(4, 1, 9, seed=key):
                begin = session.length
                answer = await session.sample(params)
                turns.append((session.token_ids[: session.length].copy(), begin, answer))
                session.extend(observation)
            session.close()
            return turns

        episodes = run(gathered(*(play(prompt, i) for i, prompt in enumerate(prompts_of(3, 17, 8, 1, 12)))))
        for turns in episodes:
            for ids, begin, answer in turns:
                assert np.array_equal(ids[begin:], answer.token_ids)
                assert np.abs(full_logprobs(model, ids, begin, params) - answer.logprobs).max() < 1e-4

    def test_sampled_tokens_follow_the_model(self, qwen3: Any) -> None:
        engine = engine_of(qwen3, max_sessions=64)
        prompt = prompts_of(6)[0]
        one = SamplingParams(max_tokens=1)
        answers = run(gathered(*(_first_token(engine, prompt, stream_key("many", i), one) for i in range(600))))
        shares = np.bincount([int(answer.token_ids[0]) for answer in answers], minlength=VOCABULARY) / 600
        with torch.no_grad():
            logits = qwen3(input_ids=torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
        assert np.abs(shares - logits.softmax(-1).numpy()).max() < 5 * 0.5 / np.sqrt(600)

    def test_a_model_wrapped_by_peft(self) -> None:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(_build("qwen3"), config).eval()
        engine = engine_of(wrapped)
        prompt = prompts_of(9)[0]
        answer = run(started(engine, prompt, 5).sample(WARM))
        ids = np.concatenate([prompt, answer.token_ids])
        assert np.abs(full_logprobs(wrapped, ids, 9, WARM) - answer.logprobs).max() < 1e-4
        with wrapped.disable_adapter():
            bare = run(started(engine, prompt, 5).sample(WARM))
            assert np.abs(full_logprobs(wrapped, np.concatenate([prompt, bare.token_ids]), 9, WARM)
                          - bare.logprobs).max() < 1e-4  # fmt: skip
        assert not same(answer, bare)

    def test_a_model_in_bfloat16(self) -> None:
        model = _build("gemma3").to(torch.bfloat16).eval()
        engine = engine_of(model)
        session = started(engine, prompts_of(9)[0])
        answer = run(session.sample(WARM))
        ids = session.token_ids[: session.length]
        assert answer.logprobs.dtype == np.float32
        assert np.abs(full_logprobs(model, ids, 9, WARM) - answer.logprobs).max() < 0.3

    def test_new_weights_are_used_at_once(self) -> None:
        model = _build("llama").eval()
        engine = engine_of(model)
        prompt = prompts_of(7)[0]
        before = run(started(engine, prompt).sample(GREEDY))
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
        after = run(started(engine, prompt).sample(SamplingParams(temperature=0, max_tokens=1)))
        assert after.token_ids[0] == (before.token_ids[0] + 1) % VOCABULARY


async def _first_token(engine: LocalEngine, prompt: np.ndarray, key: int, params: SamplingParams) -> Sampled:
    session = started(engine, prompt, key)
    answer = await session.sample(params)
    session.close()
    return answer


class TestForks:
    """A fork says what a fresh session with the same tokens and the same key says."""

    @staticmethod
    async def _fresh(model: Any, ids: np.ndarray, key: int) -> Sampled:
        return await started(engine_of(model), ids, key).sample(WARM)

    def test_forks_of_a_prompt(self, model: Any) -> None:
        prompt = prompts_of(14)[0]

        async def main() -> None:
            engine = engine_of(model)
            parent = started(engine, prompt)
            forks = [parent.fork(key) for key in range(5)]
            parent.close()
            answers = await gathered(*(fork.sample(WARM) for fork in forks))
            for key, answer in enumerate(answers):
                assert same(answer, await self._fresh(model, prompt, key))
            assert engine.stats.tokens_shared == 4 * 13
            # The prompt is read once, and its last token by each of the others.
            assert engine.stats.tokens_prefilled == 14

        run(main())

    def test_forks_in_the_middle_of_an_episode(self, model: Any) -> None:
        async def main() -> None:
            engine = engine_of(model)
            parent = started(engine, prompts_of(6)[0], 1)
            await parent.sample(WARM)
            parent.extend([7, 8, 9])
            forks = [parent.fork(key) for key in (10, 11)]
            ids = parent.token_ids[: parent.length].copy()
            both = await gathered(parent.sample(WARM), *(fork.sample(WARM) for fork in forks))
            for key, answer in zip((1, 10, 11), both, strict=True):
                assert same(answer, await self._fresh(model, ids, key))

        run(main())

    def test_forks_take_over_what_the_parent_has_computed(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3)
            parent = started(engine, prompts_of(20)[0], 1)
            await parent.sample(WARM)
            read = engine.stats.tokens_prefilled
            forks = [parent.fork(key) for key in (10, 11)]
            await gathered(*(fork.sample(WARM) for fork in forks))
            assert engine.stats.tokens_prefilled == read
            assert engine.stats.tokens_shared == 2 * (parent.length - 1)

        run(main())

    def test_forks_of_a_parent_that_has_more_to_read_take_over_the_rest(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3)
            parent = started(engine, prompts_of(20)[0], 1)
            await parent.sample(WARM)
            read, computed = engine.stats.tokens_prefilled, parent.computed
            parent.extend([7, 8, 9])
            forks = [parent.fork(key) for key in (10, 11)]
            ids = parent.token_ids[: parent.length].copy()
            answers = await gathered(*(fork.sample(WARM) for fork in forks))
            # Each reads what the parent has not read; nobody reads the episode again.
            assert engine.stats.tokens_prefilled - read == 2 * (parent.length - computed)
            assert engine.stats.tokens_shared == 2 * computed
            for key, answer in zip((10, 11), answers, strict=True):
                assert same(answer, await self._fresh(qwen3, ids, key))

        run(main())

    def test_forks_of_forks(self, model: Any) -> None:
        async def main() -> None:
            engine = engine_of(model)
            root = started(engine, prompts_of(10)[0])
            child = root.fork(1)
            child.extend([11, 12])
            grandchild = child.fork(2)
            ids = grandchild.token_ids[: grandchild.length].copy()
            assert same(await grandchild.sample(WARM), await self._fresh(model, ids, 2))
            assert same(await child.sample(WARM), await self._fresh(model, ids, 1))
            late = child.fork(3)
            ids = late.token_ids[: late.length].copy()
            later = late.fork(4)
            answers = await gathered(later.sample(WARM), late.sample(WARM))
            for key, answer in zip((4, 3), answers, strict=True):
                assert same(answer, await self._fresh(model, ids, key))

        run(main())

    @pytest.mark.parametrize("sampled_before", [False, True])
    def test_a_parent_that_closes_at_once(self, model: Any, sampled_before: bool) -> None:
        async def main() -> None:
            engine = engine_of(model)
            parent = started(engine, prompts_of(10)[0])
            if sampled_before:
                await parent.sample(WARM)
            forks = [parent.fork(key) for key in range(3)]
            ids = parent.token_ids[: parent.length].copy()
            parent.close()
            others = [started(engine, prompt, 9) for prompt in prompts_of(30, 31, seed=4)]
            answers = await gathered(*(other.sample(WARM) for other in others), *(fork.sample(WARM) for fork in forks))
            for key, answer in enumerate(answers[2:]):
                assert same(answer, await self._fresh(model, ids, key))

        run(main())

    @pytest.mark.parametrize("capacity", [1, 2])
    def test_with_few_places(self, model: Any, capacity: int) -> None:
        async def main() -> None:
            engine = engine_of(model, max_sessions=capacity)
            parent = started(engine, prompts_of(10)[0], 50)
            await parent.sample(WARM)
            forks = [parent.fork(key) for key in range(5)]
            ids = parent.token_ids[: parent.length].copy()
            answers = await gathered(*(fork.sample(WARM) for fork in forks))
            for key, answer in enumerate(answers):
                assert same(answer, await self._fresh(model, ids, key))
            assert engine.stats.evictions >= 5 - capacity

        run(main())

    def test_a_fork_that_closes_while_its_siblings_wait_for_their_prompt(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3, prefill_tokens=2)
            parent = started(engine, prompts_of(40)[0])
            forks = [parent.fork(key) for key in range(3)]
            tasks = [asyncio.create_task(fork.sample(WARM)) for fork in forks]
            for _ in range(5):
                await asyncio.sleep(0)
            assert engine.stats.forwards > 0
            forks[0].close()
            with pytest.raises(GenerationError, match="closed while"):
                await tasks[0]
            for key, task in enumerate(tasks[1:], start=1):
                assert same(await task, await self._fresh(qwen3, parent.token_ids[: parent.length], key))

        run(main())

    def test_a_fork_whose_caller_gives_up_while_its_siblings_wait_for_their_prompt(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3, prefill_tokens=2)
            parent = started(engine, prompts_of(40)[0])
            forks = [parent.fork(key) for key in range(3)]
            tasks = [asyncio.create_task(fork.sample(WARM)) for fork in forks]
            for _ in range(5):
                await asyncio.sleep(0)
            tasks[0].cancel()
            ids = parent.token_ids[: parent.length]
            for key, task in enumerate(tasks[1:], start=1):
                assert same(await task, await self._fresh(qwen3, ids, key))
            assert same(await forks[0].sample(WARM), await self._fresh(qwen3, ids, 0))

        run(main())

    def test_a_fork_is_independent_of_its_parent(self, qwen3: Any) -> None:
        engine = engine_of(qwen3)
        parent = started(engine, [7, 8, 9])
        fork = parent.fork(1)
        fork.extend([10])
        parent.extend([20, 21])
        assert fork.token_ids[: fork.length].tolist() == [7, 8, 9, 10]
        assert parent.token_ids[: parent.length].tolist() == [7, 8, 9, 20, 21]
        assert (fork.room, parent.room) == (CONTEXT - 4, CONTEXT - 5)


class TestCompany:
    """Who else is in the batch, in which place and in what order, changes nothing."""

    EPISODES = 8
    _expected: ClassVar[dict[int, list[list[Sampled]]]] = {}

    def _play(self, engine: LocalEngine, close: bool = True) -> list[list[Sampled]]:
        return run(gathered(*(episode(engine, i, close=close) for i in range(self.EPISODES))))

    def _with_room_for_all(self, model: Any) -> list[list[Sampled]]:
        if id(model) not in self._expected:
            engine = engine_of(model, max_sessions=64)
            self._expected[id(model)] = self._play(engine)
            assert (engine.capacity, engine.stats.evictions) == (64, 0)
            assert engine.stats.peak_sessions > 3
        return self._expected[id(model)]

    @pytest.mark.parametrize("capacity", [1, 2, 3])
    def test_the_number_of_places_changes_nothing(self, model: Any, capacity: int) -> None:
        narrow = engine_of(model, max_sessions=capacity)
        for first, second in zip(self._with_room_for_all(model), self._play(narrow), strict=True):
            assert len(first) == len(second)
            assert all(same(a, b) for a, b in zip(first, second, strict=True))
        assert narrow.stats.peak_sessions <= capacity

    def test_alone_is_as_in_company(self, model: Any) -> None:
        for i, answers in list(enumerate(self._with_room_for_all(model)))[1::3]:
            alone = run(episode(engine_of(model), i))
            assert all(same(a, b) for a, b in zip(alone, answers, strict=True))

    def test_idle_sessions_that_hold_all_places_give_way(self, model: Any) -> None:
        engine = engine_of(model, max_sessions=2)

        async def main() -> None:
            sessions = [started(engine, prompt, i) for i, prompt in enumerate(prompts_of(9, 12, 5, 7))]
            firsts = [await session.sample(WARM) for session in sessions]
            assert engine.stats.evictions == 2
            for session in sessions:
                session.extend([30, 31])
            ids = [session.token_ids[: session.length].copy() for session in sessions]
            seconds = await gathered(*(session.sample(WARM) for session in sessions))
            assert engine.stats.evictions >= 4
            for key, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
                prompt = ids[key][: -2 - len(first.token_ids)]
                assert same(first, await started(engine_of(model), prompt, key).sample(WARM))
                assert same(second, await started(engine_of(model), ids[key], key).sample(WARM))

        run(main())

    def test_episodes_that_never_close_do_not_stop_others(self, qwen3: Any) -> None:
        engine = engine_of(qwen3, max_sessions=2)
        for first, second in zip(self._with_room_for_all(qwen3), self._play(engine, close=False), strict=True):
            assert all(same(a, b) for a, b in zip(first, second, strict=True))
        assert engine.stats.evictions > 0

    @pytest.mark.parametrize("prefill_tokens", [2, 7])
    def test_new_text_read_in_pieces(self, model: Any, prefill_tokens: int) -> None:
        engine = engine_of(model, prefill_tokens=prefill_tokens)
        for first, second in zip(self._with_room_for_all(model), self._play(engine), strict=True):
            assert all(same(a, b) for a, b in zip(first, second, strict=True))

    def test_different_params_share_a_batch(self, qwen3: Any) -> None:
        kinds = [
            WARM, GREEDY, SamplingParams(temperature=0.5, top_k=4, max_tokens=5),
            SamplingParams(top_p=0.7, max_tokens=3, stop_token_ids=(40, 50)),
        ]  # fmt: skip
        engine = engine_of(qwen3)
        together = run(gathered(*(episode(engine, i, kinds[i % 4]) for i in range(8))))
        for i, answers in enumerate(together):
            alone = run(episode(engine_of(qwen3), i, kinds[i % 4]))
            assert all(same(a, b) for a, b in zip(alone, answers, strict=True))

    def test_an_engine_that_slept_through_several_loops(self, qwen3: Any) -> None:
        engine = engine_of(qwen3)
        session = started(engine, prompts_of(5)[0])
        parts = [run(session.sample(SamplingParams(max_tokens=4))) for _ in range(3)]
        whole = run(started(engine_of(qwen3), prompts_of(5)[0]).sample(SamplingParams(max_tokens=12)))
        assert np.concatenate([part.token_ids for part in parts]).tolist() == whole.token_ids.tolist()


class TestStops:
    def test_a_stop_token_ends_the_turn_and_is_part_of_it(self, qwen3: Any) -> None:
        free = run(started(engine_of(qwen3), prompts_of(5)[0]).sample(GREEDY))
        third = int(free.token_ids[2])
        first_at = free.token_ids.tolist().index(third)
        params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(96, third))
        answer = run(started(engine_of(qwen3), prompts_of(5)[0]).sample(params))
        assert answer.stop == SampleStop.END
        assert answer.token_ids.tolist() == free.token_ids[: first_at + 1].tolist()

    def test_a_stop_token_at_the_very_end_counts_as_end(self, qwen3: Any) -> None:
        free = run(started(engine_of(qwen3), prompts_of(5)[0]).sample(GREEDY))
        last = int(free.token_ids[0])
        params = SamplingParams(temperature=0, max_tokens=1, stop_token_ids=(last,))
        assert run(started(engine_of(qwen3), prompts_of(5)[0]).sample(params)).stop == SampleStop.END

    def test_max_tokens(self, qwen3: Any) -> None:
        engine = engine_of(qwen3)
        session = started(engine, prompts_of(5)[0])
        answer = run(session.sample(SamplingParams(max_tokens=3)))
        assert (len(answer.token_ids), answer.stop) == (3, SampleStop.LENGTH)
        assert (session.length, session.room) == (8, CONTEXT - 8)
        assert engine.stats.tokens_sampled == 3
        engine.reset_stats()
        assert engine.stats.tokens_sampled == 0

    def test_a_full_context(self, qwen3: Any) -> None:
        engine = engine_of(qwen3, max_context=20)
        session = started(engine, prompts_of(15)[0])
        answer = run(session.sample(SamplingParams(max_tokens=12)))
        assert (len(answer.token_ids), answer.stop) == (5, SampleStop.CONTEXT)
        assert session.room == 0
        again = run(session.sample(SamplingParams(max_tokens=12)))
        assert (len(again.token_ids), again.stop) == (0, SampleStop.CONTEXT)
        # The keys of the whole context were right up to its last place.
        assert np.abs(full_logprobs(qwen3, session.token_ids, 15, SamplingParams()) - answer.logprobs).max() < 1e-4

    def test_a_prompt_that_fills_the_context(self, qwen3: Any) -> None:
        session = started(engine_of(qwen3, max_context=8), prompts_of(8)[0])
        assert run(session.sample(WARM)).stop == SampleStop.CONTEXT


class TestRefusals:
    def test_too_little_memory(self, qwen3: Any) -> None:
        with pytest.raises(GenerationError, match=r"lower max_context or raise the memory budget"):
            engine_of(qwen3, memory_bytes=1000)

    def test_the_memory_budget_sets_the_number_of_places(self, qwen3: Any) -> None:
        per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
        engine = engine_of(qwen3, memory_bytes=5 * CONTEXT * per_token + 1, max_sessions=64)
        assert engine.bytes_per_token == per_token
        assert engine.capacity == 5
        assert engine.cache_bytes == 5 * CONTEXT * per_token
        assert "5 episodes of up to 96 tokens" in engine.describe()

    def test_more_context_than_the_model_has_positions(self, qwen3: Any) -> None:
        with pytest.raises(GenerationError, match="128 positions"):
            engine_of(qwen3, max_context=129)

    def test_more_tokens_than_fit(self, qwen3: Any) -> None:
        session = started(engine_of(qwen3), prompts_of(90)[0])
        with pytest.raises(GenerationError, match="7 more tokens do not fit: 90 of 96"):
            session.extend(range(7))
        assert session.length == 90
        session.extend(range(6, 12))
        assert session.room == 0

    def test_nothing_to_go_on_from(self, qwen3: Any) -> None:
        with pytest.raises(GenerationError, match="at least one token"):
            run(engine_of(qwen3).session(0).sample(WARM))

    def test_a_closed_session(self, qwen3: Any) -> None:
        session = started(engine_of(qwen3), [7])
        session.close()
        session.close()
        with pytest.raises(GenerationError, match="closed"):
            run(session.sample(WARM))

    def test_a_session_that_samples_cannot_be_touched(self, qwen3: Any) -> None:
        async def main() -> None:
            session = started(engine_of(qwen3), prompts_of(5)[0])
            task = asyncio.create_task(session.sample(WARM))
            await asyncio.sleep(0)
            with pytest.raises(GenerationError, match="sampling already"):
                await session.sample(WARM)
            with pytest.raises(GenerationError, match="extended while"):
                session.extend([7])
            with pytest.raises(GenerationError, match="forked while"):
                session.fork(1)
            # The first call is not disturbed.
            expected = await started(engine_of(qwen3), prompts_of(5)[0]).sample(WARM)
            assert same(await task, expected)

        run(main())


class TestTrouble:
    def test_an_error_in_the_model_reaches_everyone_and_the_engine_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = _build("qwen3").eval()
        expected = [run(episode(engine_of(model), i)) for i in range(6)]
        engine = engine_of(model, max_sessions=2)
        broken = _Broken(model.model.layers[1].forward, after=4)
        monkeypatch.setattr(model.model.layers[1], "forward", broken)

        async def main() -> list[Any]:
            idle = started(engine, prompts_of(5)[0])
            answers = await asyncio.gather(*(episode(engine, i) for i in range(5)), return_exceptions=True)
            broken.after = 10**9
            await idle.sample(WARM)
            idle.close()
            gc.collect()
            await asyncio.sleep(0)
            return answers

        with caplog.at_level(logging.ERROR, logger="asyncio"):
            answers = run(main())
        assert [str(answer) for answer in answers if isinstance(answer, Exception)] == ["the layer broke"] * 5
        assert not caplog.records, caplog.text
        # Places of episodes that were not closed are taken back, and all goes as if nothing had happened.
        again = run(gathered(*(episode(engine, i) for i in range(6))))
        for first, second in zip(expected, again, strict=True):
            assert all(same(a, b) for a, b in zip(first, second, strict=True))

    def test_a_session_goes_on_after_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = _build("qwen3").eval()
        engine = engine_of(model)
        broken = _Broken(model.model.layers[1].forward, after=10**9)
        monkeypatch.setattr(model.model.layers[1], "forward", broken)

        async def main() -> None:
            session = started(engine, prompts_of(8)[0], 3)
            await session.sample(WARM)
            session.extend([9, 9, 9])
            ids = session.token_ids[: session.length].copy()
            broken.after = broken.calls + 3
            with pytest.raises(RuntimeError, match="the layer broke"):
                await session.sample(WARM)
            assert session.length == len(ids)
            broken.after = 10**9
            assert same(await session.sample(WARM), await started(engine_of(model), ids, 3).sample(WARM))

        run(main())

    def test_forks_go_on_after_an_error_in_their_common_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = _build("qwen3").eval()
        engine = engine_of(model, prefill_tokens=4)
        broken = _Broken(model.model.layers[1].forward, after=engine.stats.forwards + 2)
        monkeypatch.setattr(model.model.layers[1], "forward", broken)

        async def main() -> None:
            parent = started(engine, prompts_of(30)[0])
            forks = [parent.fork(key) for key in range(3)]
            failed = await asyncio.gather(*(fork.sample(WARM) for fork in forks), return_exceptions=True)
            assert all(isinstance(error, RuntimeError) for error in failed)
            broken.after = 10**9
            answers = await gathered(*(fork.sample(WARM) for fork in reversed(forks)))
            for key, answer in zip((2, 1, 0), answers, strict=True):
                assert same(answer, await started(engine_of(model), prompts_of(30)[0], key).sample(WARM))

        run(main())

    @pytest.mark.parametrize("patience", [0, 1, 3, 6])
    def test_a_caller_that_gives_up_disturbs_nobody(self, qwen3: Any, patience: int) -> None:
        async def main() -> None:
            engine = engine_of(qwen3, max_sessions=2)
            sessions = [started(engine, prompt, i) for i, prompt in enumerate(prompts_of(5, 9, 7))]
            tasks = [asyncio.create_task(session.sample(WARM)) for session in sessions]
            for _ in range(patience):
                await asyncio.sleep(0)
            # One that samples, and one that waits for a place.
            for i in (0, 2):
                tasks[i].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            given_up = [i for i in range(3) if isinstance(results[i], asyncio.CancelledError)]
            assert 0 in given_up
            assert 1 not in given_up
            assert sessions[0].length == 5
            for i, prompt in enumerate(prompts_of(5, 9, 7)):
                expected = await started(engine_of(qwen3), prompt, i).sample(WARM)
                # Asked again, they say what they would have said.
                assert same(await sessions[i].sample(WARM) if i in given_up else results[i], expected)

        run(main())

    def test_a_time_limit_and_close_free_the_place(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3, max_sessions=1)
            slow = started(engine, prompts_of(5)[0])
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(slow.sample(SamplingParams(max_tokens=90)), 0.003)
            slow.close()
            assert engine.free_places == 1
            assert same(
                await started(engine, [7, 8], 1).sample(WARM), await started(engine_of(qwen3), [7, 8], 1).sample(WARM)
            )
            assert engine.stats.evictions == 0

        run(main())

    def test_a_caller_that_gives_up_without_closing_gives_way(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3, max_sessions=1)
            slow = started(engine, prompts_of(5)[0])
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(slow.sample(SamplingParams(max_tokens=90)), 0.003)
            await started(engine, [7, 8], 1).sample(WARM)
            assert engine.stats.evictions == 1

        run(main())

    def test_an_answer_that_comes_as_the_caller_gives_up_is_dropped(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3)
            session = started(engine, prompts_of(5)[0])
            task = asyncio.create_task(session.sample(WARM))
            while session.future is None or not session.future.done():
                await asyncio.sleep(0)
                if session.future is not None and session.future.done():
                    task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert session.length == 5
            expected = await started(engine_of(qwen3), prompts_of(5)[0]).sample(WARM)
            assert same(await session.sample(WARM), expected)

        run(main())

    def test_closing_a_session_that_samples_tells_its_caller(self, qwen3: Any) -> None:
        async def main() -> None:
            engine = engine_of(qwen3, max_sessions=1)
            sessions = [started(engine, prompt) for prompt in prompts_of(5, 6)]
            tasks = [asyncio.create_task(session.sample(WARM)) for session in sessions]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for session, task in zip(sessions, tasks, strict=True):
                session.close()
                with pytest.raises(GenerationError, match="closed while"):
                    await task
            assert engine.free_places == 1
            assert not engine._waiting

        run(main())

    def test_a_loop_that_ends_in_the_middle_leaves_a_working_engine(self, qwen3: Any) -> None:
        engine = engine_of(qwen3, max_sessions=1)
        sessions = [started(engine, prompt) for prompt in prompts_of(5, 6)]

        async def abandoned() -> None:
            for session in sessions:
                task = asyncio.create_task(session.sample(WARM))
                tasks.append(task)
            for _ in range(3):
                await asyncio.sleep(0)

        tasks: list[asyncio.Task[Sampled]] = []
        asyncio.run(abandoned())
        assert all(task.cancelled() for task in tasks)
        expected = run(started(engine_of(qwen3), prompts_of(5)[0]).sample(WARM))
        assert same(run(sessions[0].sample(WARM)), expected)


class _Broken:
    """A layer that works for some calls and then raises."""

    def __init__(self, forward: Callable[..., Any], after: int) -> None:
        self.forward, self.after, self.calls = forward, after, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > self.after:
            raise RuntimeError("the layer broke")
        return self.forward(*args, **kwargs)


class TestNeighbours:
    """What runs beside the engine on the same loop is not touched by it."""

    def test_others_on_the_loop_do_not_see_its_settings(self, qwen3: Any) -> None:
        implementation = qwen3.config._attn_implementation

        async def main() -> None:
            task = asyncio.create_task(started(engine_of(qwen3), prompts_of(5)[0]).sample(GREEDY))
            seen = 0
            while not task.done():
                await asyncio.sleep(0)
                seen += 1
                assert not torch.is_inference_mode_enabled()
                assert qwen3.config._attn_implementation == implementation
                made = torch.ones(2, requires_grad=True)
                (made * 2).sum().backward()
            assert seen > 5

        run(main())

    @pytest.mark.parametrize("one_model", [True, False])
    def test_two_engines_on_one_loop(self, qwen3: Any, one_model: bool) -> None:
        other_model = qwen3 if one_model else tiny("llama")
        expected = [run(episode(engine_of(model), i)) for model in (qwen3, other_model) for i in range(4)]

        async def main() -> list[Any]:
            engines = [engine_of(qwen3), engine_of(other_model)]
            return await gathered(*(episode(engine, i) for engine in engines for i in range(4)))

        for first, second in zip(expected, run(main()), strict=True):
            assert all(same(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.is_inference_mode_enabled()
        assert qwen3.config._attn_implementation != "rehearsal_packed"
