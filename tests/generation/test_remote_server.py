"""The remote engine against a real server: ``transformers serve`` with a tiny random model, on the processor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.import_utils import is_serve_available

from rehearsal.errors import GenerationError
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.remote import RemoteEngine
from rehearsal.generation.sampling import SamplingParams
from rehearsal.trajectory import SampleStop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs the server of transformers (transformers[serving])"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass
class Served:
    url: str
    name: str
    model: Any
    tokenizer: Any

    def engine(self, **kwargs: Any) -> RemoteEngine:
        settings = {"tokenizer": self.tokenizer, "prompts": "text", "timeout": 120.0, "max_retries": 1, **kwargs}
        return RemoteEngine(self.url, self.name, **settings)

    def greedy(self, ids: list[int], params: SamplingParams = GREEDY) -> list[int]:
        """What the local engine says with the same weights."""

        async def main() -> list[int]:
            session = LocalEngine(self.model, max_context=256, max_sessions=1, memory_bytes=1 << 28).session(0)
            session.extend(ids)
            return list((await session.sample(params)).token_ids.tolist())

        return asyncio.run(main())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def letters_only(model: Any, tokenizer: Any) -> None:
    """Let the model's likeliest token be a letter or the end: bytes of broken characters have no text."""
    wanted = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    keep = torch.zeros(model.lm_head.weight.shape[0], 1)
    keep[[*wanted, tokenizer.eos_token_id]] = 1
    with torch.no_grad():
        model.lm_head.weight.mul_(keep)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, serve_model: Callable[[Path], AbstractContextManager[str]]
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.4, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    letters_only(model, tokenizer)
    # The server samples only if the model's folder says so, whatever temperature it is asked for.
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=tokenizer.eos_token_id, top_k=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serve_model(folder) as url:
        yield Served(url, str(folder), model, tokenizer)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def run(main: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main, 300)

    return asyncio.run(bounded())


def test_tokens_over_several_turns_are_those_of_the_local_engine(served: Served) -> None:
    async def main() -> tuple[RemoteEngine, list[tuple[list[int], list[int]]]]:
        turns = []
        async with served.engine() as engine:
            session = engine.session(0)
            for text in ("You see a door. ", " It is locked. ", " You hear steps. "):
                session.extend(served.tokenizer(text)["input_ids"])
                before = list(session.token_ids)
                answer = await session.sample(GREEDY)
                assert np.isnan(answer.logprobs).all()
                turns.append((before, answer.token_ids.tolist()))
                if answer.stop == SampleStop.LENGTH:
                    assert len(answer.token_ids) == GREEDY.max_tokens
        return engine, turns

    engine, turns = run(main())
    for before, answer in turns:
        # Without stop tokens in the request the server still ends at the model's own, and does not tell it.
        expected = served.greedy(before, SamplingParams(temperature=0, max_tokens=12,
                                                        stop_token_ids=(served.tokenizer.eos_token_id,)))  # fmt: skip
        assert answer == [index for index in expected if index != served.tokenizer.eos_token_id]
    assert sum(len(answer) for _, answer in turns) > 12
    assert not engine.gives_logprobs
    assert "inexact_prompts" not in engine.stats.extra
    # The server says which fields it does not know, all at once, and is not asked for them again.
    refused = {note.split()[5].rstrip(":") for note in engine.notes}
    assert refused == {"return_token_ids", "top_k", "min_p", "repetition_penalty"}
    assert engine.stats.forwards == 3


def test_stop_tokens(served: Served) -> None:
    prompt = served.tokenizer("Go north or south? ")["input_ids"]
    free = served.greedy(prompt)
    stop = free[3]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop, served.tokenizer.eos_token_id))

    async def main() -> Any:
        async with served.engine() as engine:
            session = engine.session(0)
            session.extend(prompt)
            return await session.sample(params)

    answer = run(main())
    assert answer.token_ids.tolist() == free[: free.index(stop) + 1]
    assert answer.stop == SampleStop.END


def test_conversations_are_those_of_the_local_engine(served: Served) -> None:
    async def main() -> tuple[list[list[dict[str, str]]], bool]:
        async with served.engine() as engine:
            parent = engine.chat(0)
            parent.add("system", "Answer with a direction.")
            parent.add("user", "You see a door.")
            await parent.answer(GREEDY)
            sessions = [parent.fork(1), parent.fork(2)]
            for session, text in zip(sessions, ("It is locked.", "It is open."), strict=True):
                session.add("user", text)
            answers = await asyncio.gather(*(session.answer(GREEDY) for session in sessions))
            assert all(answer.logprobs is None for answer in answers)
            assert all(answer.tokens > 0 for answer in answers)
            return [session.messages for session in sessions], engine.gives_logprobs

    conversations, gives_logprobs = run(main())
    assert not gives_logprobs
    assert conversations[0][:3] == conversations[1][:3]
    for messages in conversations:
        for end in (2, 4):
            ids = served.tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True, return_dict=False)
            expected = [index for index in served.greedy(ids) if index != served.tokenizer.eos_token_id]
            end_at = served.greedy(ids).index(served.tokenizer.eos_token_id) if len(expected) < 12 else 12
            assert messages[end]["content"] == served.tokenizer.decode(expected[:end_at])


def test_sampling_at_temperature_one(served: Served) -> None:
    params = SamplingParams(max_tokens=8)

    async def main() -> list[str]:
        async with served.engine(concurrency=2) as engine:
            sessions = [engine.chat(key) for key in range(4)]
            for session in sessions:
                session.add("user", "You see a door.")
            answers = await asyncio.gather(*(session.answer(params) for session in sessions))
            assert engine.stats.peak_sessions == 2
            assert engine.stats.tokens_sampled <= 32
            return [answer.text for answer in answers]

    assert len(set(run(main()))) > 1


def test_ids_as_a_prompt_are_refused_in_a_sentence(served: Served) -> None:
    async def main() -> None:
        async with served.engine(prompts="ids") as engine:
            session = engine.session(0)
            session.extend([1, 2, 3])
            await session.sample(GREEDY)

    with pytest.raises(GenerationError, match='set prompts="text"'):
        run(main())


def test_a_wrong_name_is_told(served: Served) -> None:
    async def main() -> None:
        async with RemoteEngine(served.url, "another", max_retries=0) as engine:
            session = engine.chat(0)
            session.add("user", "You see a door.")
            await session.answer(GREEDY)

    with pytest.raises(GenerationError, match=r"refused the request .* requested 'another'"):
        run(main())
