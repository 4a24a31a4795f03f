"""The chat template of the shipped models."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rehearsal.models.chat import base_template

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=base_template())


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def test_answers_are_written_as_they_are(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    answer = "  <think>\n a</think>\n\nLeft \n"
    messages = [
        {"role": "user", "content": " P "},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Q"},
    ]
    text = byte_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>user\n P <|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_conversation_begins_with_the_shorter_one(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Rules"},
        {"role": "user", "content": "P"},
        {"role": "assistant", "content": "<think>x</think>", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    for tools in (None, [TOOL]):
        shorter = ""
        for length in range(1, len(messages) + 1):
            longer = byte_tokenizer.apply_chat_template(messages[:length], tools=tools, tokenize=False)
            assert longer.startswith(shorter)
            assert len(longer) > len(shorter)
            shorter = longer


TOOL_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tools(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "tool_calls": [TOOL_CALL, {"name": "add", "arguments": '{"a": 2}'}]},
        {"role": "tool", "content": "3"},
    ]
    text = byte_tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    system, _, rest = text.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nTools")
    assert '{"name": "add", "parameters"' in system
    assert rest == (
        '<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n'
        '</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )
    with_rules = byte_tokenizer.apply_chat_template(
        [{"role": "system", "content": "Rules"}, *messages], tools=[TOOL], tokenize=False
    )
    assert with_rules.startswith("<|im_start|>system\nRules\n\nTools")
    assert with_rules.count("Rules") == 1


def test_assistant_mask_covers_answers_and_their_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "P"},
        {"role": "assistant", "content": "Left"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "Up", "tool_calls": [TOOL_CALL]},
    ]
    made = byte_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    masked = [i for i, inside in zip(made["input_ids"], made["assistant_masks"], strict=True) if inside]
    assert byte_tokenizer.decode(masked) == (
        'Left<|im_end|>Up\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
