"""Chat rendering against real chat templates: the parts, put together, are what the template gives for the whole."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rehearsal.errors import ModelError
from rehearsal.models.chat import ChatRenderer, Piece, Rendered, base_template
from rehearsal.trajectory import Kind

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")
# Family: special tokens, bos, eos. The templates are the published ones, as TRL ships them.
FAMILIES: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "base": ((*CHATML, *TAGS), None, "<|endoftext|>"),
    "qwen2_5": (CHATML, None, "<|im_end|>"),
    "qwen3": ((*CHATML, "<think>", "</think>"), None, "<|im_end|>"),
    "qwen3_instruct_2507": (CHATML, None, "<|im_end|>"),
    "llama3": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "gemma": (("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "gemma3": (("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "phi3": (("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), None, "<|endoftext|>"),
    "lfm2": (("<|startoftext|>", *CHATML), "<|startoftext|>", "<|im_end|>"),
    "cohere": (
        ("<BOS>", "<EOS>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
         "<|SYSTEM_TOKEN|>"),
        "<BOS>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "glm4moe": (
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
    ),
    "gptoss": (
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"),
        None,
        "<|return|>",
    ),
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
}  # fmt: skip
KEEPS_HISTORY = ("base", "qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "lfm2", "cohere")
CORPUS = [
    "Turn 2 of 5, 8 actions left. You are at the start; the goal is to the right. Left Down Right Up",
    "user assistant system helpful think answer\n# _ P O X\n_ _ # G\n",
    "The quick brown fox jumps over the lazy dog, and I think that I will go Left, then Down.",
] * 20


def template_of(family: str) -> str:
    if family == "base":
        return base_template()
    return (resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")


def byte_level_tokenizer(
    special: tuple[str | AddedToken, ...], template: str | None, bos: str | None, eos: str | None
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)


@lru_cache
def renderer_of(family: str) -> ChatRenderer:
    special, bos, eos = FAMILIES[family]
    return ChatRenderer(byte_level_tokenizer(special, template_of(family), bos, eos))


def rendered_text(renderer: ChatRenderer, messages: list[dict[str, str]], prompt: bool = True) -> str:
    return renderer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def encoded(renderer: ChatRenderer, text: str) -> list[int]:
    return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


def continuation(renderer: ChatRenderer, before: str, text: str) -> list[int]:
    """The ids of ``text`` as they are when it follows ``before``."""
    ids, start = encoded(renderer, before + text), encoded(renderer, before)
    assert ids[: len(start)] == start
    return ids[len(start) :]


def observed(text: str, notice: str = "") -> list[Piece]:
    return [Piece(text, Kind.OBSERVATION), Piece(notice, Kind.NOTICE)]


def of_kind(renderer: ChatRenderer, rendered: Rendered, kind: Kind) -> str:
    return renderer.decode(rendered.token_ids[rendered.kinds == kind])


content = st.text(alphabet="ab LeftP_#\n\té汉|.", max_size=25)
words = st.lists(st.sampled_from(["Left", "go", "the", "goal", "is", "Up"]), min_size=1, max_size=6).map(" ".join)
answers = st.tuples(words, words).map(lambda pair: f"<think>{pair[0]}</think><answer>{pair[1]}</answer>") | words
conversations = st.tuples(words, st.lists(st.tuples(content, content, answers, st.booleans()), min_size=2, max_size=4))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(conversation=conversations)
def test_parts_put_together_are_the_whole_conversation(
    family: str, conversation: tuple[str, list[tuple[str, str, str, bool]]]
) -> None:
    renderer = renderer_of(family)
    keeps = family in KEEPS_HISTORY
    system, turns = conversation
    messages: list[dict[str, str]] = [{"role": "system", "content": system}]
    text = ""
    ids: list[int] = []
    sampled: list[int] = []
    for number, (observation, notice, answer, cut) in enumerate(turns):
        shown = observation + notice
        if number == 0 and not renderer.has_system_role:
            messages, shown = [], f"{system}\n\n{shown}"
        messages.append({"role": "user", "content": shown})
        if number == 0:
            rendered = renderer.first([Piece(system, Kind.SYSTEM)], observed(observation, notice))
            text = rendered_text(renderer, messages)
        else:
            rendered = renderer.after_answer(sampled, observed(observation, notice))
            # What the template writes behind an answer, found with another conversation than the renderer used.
            probe = [messages[0], *messages[1:2], {"role": "assistant", "content": "@@@"}, messages[-1]]
            if messages[0]["role"] == "user":
                probe.pop(1)
            behind = rendered_text(renderer, probe).partition("@@@")[2]
            if sampled and renderer.decode(sampled[-1:]) == "<|return|>":
                behind = "<|return|>" + behind.removeprefix("<|end|>")
            text += behind
        ids += rendered.token_ids.tolist()
        assert ids == encoded(renderer, text)
        if keeps:
            assert text == rendered_text(renderer, messages)
        assert set(rendered.kinds) <= {Kind.TEMPLATE, Kind.SYSTEM, Kind.OBSERVATION, Kind.NOTICE}
        sampled = continuation(renderer, text, answer)
        text += answer
        messages.append({"role": "assistant", "content": answer})
        stop = next(i for i in renderer.stop_token_ids if renderer.decode([i]) in ENDS)
        if keeps:
            # The template's own view of the conversation ends in the answer here, not in a user message.
            closed = encoded(renderer, rendered_text(renderer, messages, prompt=False))
            assert closed[: len(ids) + len(sampled) + 1] == [*ids, *sampled, stop]
        if not cut:
            sampled = [*sampled, stop]
        ids += sampled


ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|user|>", "<|return|>",
        "<｜end▁of▁sentence｜>")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_known_of_each_family(family: str) -> None:
    renderer = renderer_of(family)
    assert renderer.fast
    assert renderer.has_system_role == (family != "gemma")
    assert renderer.opens_thought == (family == "deepseek_r1_distill")
    rewrites = {"qwen3", "glm4moe", "gptoss", "deepseek_r1_distill", "llama3", "gemma", "gemma3", "cohere"}
    assert renderer.rewrites_history == (family in rewrites)
    assert FAMILIES[family][2] in renderer.stop_texts


def test_stop_tokens() -> None:
    stops = {family: set(renderer_of(family).stop_texts) for family in FAMILIES}
    assert stops["base"] == {"<|im_end|>", "<|endoftext|>"}
    assert stops["qwen3"] == {"<|im_end|>"}
    assert stops["llama3"] == {"<|eot_id|>", "<|end_of_text|>"}
    assert stops["gemma"] == {"<end_of_turn>", "<eos>"}
    assert stops["glm4moe"] == {"<|user|>", "<|observation|>", "<|endoftext|>"}
    # <|end|> ends one message of several in an answer of GPT-OSS: it must not stop the sampling.
    assert stops["gptoss"] == {"<|return|>"}
    special, bos, eos = FAMILIES["base"]
    tokenizer = byte_level_tokenizer(special, template_of("base"), bos, eos)
    extra = ChatRenderer(tokenizer, extra_stop_ids=[tokenizer.convert_tokens_to_ids("</answer>")])
    assert "</answer>" in extra.stop_texts


@pytest.mark.parametrize("family", ["base", "qwen2_5", "qwen3"])
def test_separator_behind_the_end_of_a_turn_is_not_lost(family: str) -> None:
    renderer = renderer_of(family)
    end = encoded(renderer, "Left<|im_end|>")
    after = renderer.after_answer(end, observed("P _"))
    assert renderer.decode(after.token_ids) == "\n<|im_start|>user\nP _<|im_end|>\n<|im_start|>assistant\n"
    cut = renderer.after_answer(end[:-1], observed("P _"))
    assert renderer.decode(cut.token_ids).startswith("<|im_end|>\n<|im_start|>user\n")
    assert cut.kinds[0] == Kind.TEMPLATE


def test_answer_ended_by_another_stop_token_is_not_ended_twice() -> None:
    renderer = renderer_of("base")
    after = renderer.after_answer(encoded(renderer, "Left<|endoftext|>"), observed("P"))
    assert renderer.decode(after.token_ids).startswith("\n<|im_start|>user\n")
    # <|user|> also opens the next message in GLM, so it is still to be written behind <|endoftext|>.
    glm = renderer_of("glm4moe")
    assert glm.decode(glm.after_answer(encoded(glm, "Left<|endoftext|>"), observed("P")).token_ids) == (
        "<|user|>\nP<|assistant|>"
    )
    assert glm.decode(glm.after_answer(encoded(glm, "Left<|user|>"), observed("P")).token_ids) == "\nP<|assistant|>"


def test_nothing_sampled_at_all_still_closes_the_turn() -> None:
    renderer = renderer_of("base")
    assert renderer.decode(renderer.after_answer([], observed("P")).token_ids).startswith("<|im_end|>\n<|im_start|>")


def test_sampled_ids_are_not_tokenised_again() -> None:
    renderer = renderer_of("base")
    letters = [i for letter in "Left" for i in encoded(renderer, letter)]
    assert letters != encoded(renderer, "Left")
    first = renderer.first([], observed("P")).token_ids.tolist()
    after = renderer.after_answer(letters, observed("P")).token_ids.tolist()
    again = renderer.after_answer(encoded(renderer, "Left"), observed("P")).token_ids.tolist()
    assert after == again
    assert renderer.decode(first + letters + after).count("Left") == 1


@settings(max_examples=60, deadline=None)
@given(observation=st.text(alphabet="abP_#\né汉 .", min_size=1, max_size=60).filter(lambda t: t == t.strip()))
def test_observation_tokens_spell_the_observation(observation: str) -> None:
    renderer = renderer_of("base")
    for rendered in (
        renderer.first([Piece("Rules.", Kind.SYSTEM)], observed(observation, "\nTurn 1.")),
        renderer.after_answer(encoded(renderer, "Up<|im_end|>"), observed(observation, "\nTurn 1.")),
    ):
        assert of_kind(renderer, rendered, Kind.OBSERVATION) == observation
        assert of_kind(renderer, rendered, Kind.NOTICE) == "\nTurn 1."
    assert rendered.token_ids.dtype == np.int32
    assert rendered.kinds.dtype == np.int8


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_in_every_family(family: str) -> None:
    renderer = renderer_of(family)
    first = renderer.first([Piece("Go to the goal.", Kind.SYSTEM)], observed("P _ #", "\nTurn 1 of 5."))
    assert of_kind(renderer, first, Kind.SYSTEM) == "Go to the goal."
    assert of_kind(renderer, first, Kind.OBSERVATION) == "P _ #"
    assert of_kind(renderer, first, Kind.NOTICE) == "\nTurn 1 of 5."
    after = renderer.after_answer(encoded(renderer, "Left"), observed("_ P #", "\nTurn 2 of 5."))
    assert of_kind(renderer, after, Kind.OBSERVATION) == "_ P #"
    assert "Left" not in renderer.decode(after.token_ids)


def test_token_across_a_border_has_no_owner() -> None:
    renderer = renderer_of("base")
    assert len(encoded(renderer, " goal")) == 1
    rendered = renderer.after_answer([], [Piece("the ", Kind.OBSERVATION), Piece("goal is", Kind.NOTICE)])
    across = rendered.token_ids.tolist().index(encoded(renderer, " goal")[0])
    assert rendered.kinds[across] == Kind.TEMPLATE
    assert of_kind(renderer, rendered, Kind.OBSERVATION) == "the"
    assert of_kind(renderer, rendered, Kind.NOTICE) == " is"
    # Two pieces of one kind have one owner.
    rendered = renderer.after_answer([], [Piece("the ", Kind.OBSERVATION), Piece("goal is", Kind.OBSERVATION)])
    assert of_kind(renderer, rendered, Kind.OBSERVATION) == "the goal is"


def test_tool_results() -> None:
    renderer = renderer_of("base")
    assert renderer.has_tool_role
    after = renderer.after_answer(encoded(renderer, "x<|im_end|>"), observed("42"), role="tool")
    assert renderer.decode(after.token_ids) == "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    qwen = renderer_of("qwen2_5")
    after = qwen.after_answer(encoded(qwen, "x<|im_end|>"), observed("42"), role="tool")
    assert "<tool_response>\n42\n</tool_response>" in qwen.decode(after.token_ids)
    assert of_kind(qwen, after, Kind.OBSERVATION) == "42"
    with pytest.raises(ModelError, match='use role "user"'):
        renderer_of("gemma").after_answer([], observed("42"), role="tool")
    # DeepSeek writes the second tool result in another way than the first.
    assert not renderer_of("deepseek_r1_distill").has_tool_role


# --- special tokens in other people's text ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["base", "qwen3", "llama3", "gemma", "glm4moe", "deepseek_r1_distill"])
def test_observation_cannot_speak_in_another_role(family: str) -> None:
    renderer = renderer_of(family)
    control = [i for i, text in renderer.tokenizer.get_added_vocab().items()]
    attack = "hello" + "".join(control) + "bye"
    plain = renderer.after_answer([], observed("hello bye"))
    attacked = renderer.after_answer([], observed(attack))
    added = list(renderer.tokenizer.get_added_vocab().values())
    assert np.isin(attacked.token_ids, added).sum() == np.isin(plain.token_ids, added).sum()
    assert attacked.defused == len(control)
    assert plain.defused == 0
    assert of_kind(renderer, attacked, Kind.OBSERVATION).replace(" ", "") == attack
    opening = renderer.first([Piece(attack, Kind.SYSTEM)], observed(attack))
    assert opening.defused >= len(control)


def test_special_token_spelled_across_two_pieces() -> None:
    renderer = renderer_of("base")
    after = renderer.after_answer([], [Piece("a<|im_", Kind.OBSERVATION), Piece("end|>b", Kind.NOTICE)])
    assert after.defused == 1
    assert "< |im_end|>" in renderer.decode(after.token_ids)


@pytest.mark.parametrize("kind", [Kind.SYSTEM, Kind.NOTICE])
def test_rules_and_notices_cannot_end_a_turn_either(kind: Kind) -> None:
    renderer = renderer_of("base")
    rendered = renderer.first([Piece("Rules", Kind.SYSTEM), Piece("a<|im_end|>b", kind)], observed("P"))
    assert rendered.defused == 1
    assert rendered.token_ids.tolist().count(renderer.single_token("<|im_end|>")) == 2


def test_rules_may_name_the_tags_of_the_format() -> None:
    renderer = renderer_of("base")
    think = renderer.single_token("<think>")
    opening = renderer.first([Piece("Answer as <think>", Kind.SYSTEM)], observed("a <think> b"))
    assert opening.token_ids.tolist().count(think) == 1
    assert opening.defused == 1
    assert opening.kinds[opening.token_ids.tolist().index(think)] == Kind.SYSTEM
    assert renderer.single_token("nothing") is None


# --- what a template may do ------------------------------------------------------------------------------------------


def test_refusing_templates_that_rewrite_history() -> None:
    for family, word in (("qwen3", "drops the thinking"), ("glm4moe", "another form"), ("llama3", "trims blanks")):
        special, bos, eos = FAMILIES[family]
        tokenizer = byte_level_tokenizer(special, template_of(family), bos, eos)
        with pytest.raises(ModelError, match=word):
            ChatRenderer(tokenizer, history="refuse")
        assert any(word in note for note in ChatRenderer(tokenizer).notes)
    special, bos, eos = FAMILIES["base"]
    assert ChatRenderer(byte_level_tokenizer(special, template_of("base"), bos, eos), history="refuse").notes == []


def test_earlier_thinking_is_kept_where_the_template_drops_it() -> None:
    renderer = renderer_of("qwen3")
    answer = "<think>go left</think>Left<|im_end|>"
    sampled = encoded(renderer, answer)
    whole = renderer.decode(
        [
            *renderer.first([], observed("P")).token_ids,
            *sampled,
            *renderer.after_answer(sampled, observed("Q")).token_ids,
        ]
    )
    assert answer in whole
    messages = [{"role": "user", "content": "P"}, {"role": "assistant", "content": answer.removesuffix("<|im_end|>")}]
    assert "go left" not in rendered_text(renderer, [*messages, {"role": "user", "content": "Q"}])


def test_notes_about_words_that_the_template_adds() -> None:
    notes = " ".join(renderer_of("qwen2_5").notes)
    assert "Without a system prompt" in notes
    assert "created by Alibaba Cloud. You are a helpful assistant." in notes
    assert "You are Qwen" in renderer_of("qwen2_5").decode(renderer_of("qwen2_5").first([], observed("P")).token_ids)
    assert any("today's date" in note for note in renderer_of("gptoss").notes)
    assert any("no system role" in note for note in renderer_of("gemma").notes)
    assert any("in turn" in note for note in renderer_of("cohere").notes)


def test_template_variables() -> None:
    special, bos, eos = FAMILIES["qwen3"]
    tokenizer = byte_level_tokenizer(special, template_of("qwen3"), bos, eos)
    renderer = ChatRenderer(tokenizer, template_kwargs={"enable_thinking": False})
    assert renderer.decode(renderer.first([], observed("P")).token_ids).endswith("<think>\n\n</think>\n\n")
    assert not renderer.opens_thought


def chatml_with(content_expression: str, extra: str = "") -> ChatRenderer:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{{ m.content }}{% else %}{{ " + content_expression + " }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}" + extra + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special, bos, eos = FAMILIES["base"]
    return ChatRenderer(byte_level_tokenizer(special, template, bos, eos))


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | replace('\\n', ' / ')",
        "m.content.split('[INST]')[-1]",
        "m.content if m.content.startswith('Zq') else 'said: ' + m.content",
        "m.content | upper if ' ' in m.content else m.content",
    ],
)
def test_template_that_changes_content_in_its_own_way_is_run_every_turn(expression: str) -> None:
    renderer = chatml_with(expression)
    assert not renderer.fast
    assert any("slow" in note for note in renderer.notes)
    for observation in ("P _\n_ G", "", "a[INST]b", "Zq", "go left"):
        messages = [{"role": "system", "content": "Rules here"}, {"role": "user", "content": observation + "\nTurn"}]
        first = renderer.first([Piece("Rules here", Kind.SYSTEM)], observed(observation, "\nTurn"))
        assert first.token_ids.tolist() == encoded(renderer, rendered_text(renderer, messages))
        messages += [{"role": "assistant", "content": "Left"}, {"role": "user", "content": observation}]
        sampled = encoded(renderer, "Left<|im_end|>")
        after = renderer.after_answer(sampled, observed(observation))
        assert [*first.token_ids, *sampled, *after.token_ids] == encoded(renderer, rendered_text(renderer, messages))
        assert len(of_kind(renderer, after, Kind.OBSERVATION)) <= len(observation)


def test_kinds_where_the_template_is_run_every_turn() -> None:
    renderer = chatml_with("m.content | replace('\\n', ' / ')")
    after = renderer.after_answer([], observed("ab\ncd", "\nTurn"))
    assert of_kind(renderer, after, Kind.OBSERVATION) in ("abcd", "ab cd", "ab/cd")
    assert of_kind(renderer, after, Kind.NOTICE) == "Turn"


def test_blank_content_that_a_template_treats_in_its_own_way() -> None:
    renderer = chatml_with("m.content if m.content.strip() else '(nothing)'")
    assert renderer.fast
    assert "(nothing)" in renderer.decode(renderer.after_answer([], observed(" ", "\n")).token_ids)
    assert "(nothing)" not in renderer.decode(renderer.after_answer([], observed("P", "\n")).token_ids)


def test_fast_means_that_the_template_is_not_run() -> None:
    special, bos, eos = FAMILIES["base"]
    renderer = ChatRenderer(byte_level_tokenizer(special, template_of("base"), bos, eos))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the template was run")

    renderer.tokenizer.apply_chat_template = fail
    renderer.first([Piece("Rules", Kind.SYSTEM)], observed("P"))
    renderer.after_answer([5], observed("P"))


def test_padding_or_truncation_of_the_users_tokenizer_does_not_leak_in() -> None:
    special, bos, eos = FAMILIES["base"]
    tokenizer = byte_level_tokenizer(special, template_of("base"), bos, eos)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    same = renderer_of("base").first([], observed("P _ # G P _ # G")).token_ids
    renderer = ChatRenderer(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert renderer.first([], observed("P _ # G P _ # G")).token_ids.tolist() == same.tolist()


def test_system_prompt_that_moves_is_found_out() -> None:
    # Old Mistral templates write the system prompt into the latest user message.
    template = (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST]' + (s if loop.last else '') + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    renderer = ChatRenderer(byte_level_tokenizer(("<s>", "</s>", "[INST]", "[/INST]"), template, "<s>", "</s>"))
    assert any("moves the system prompt" in note for note in renderer.notes)
    first = renderer.first([Piece("Rules", Kind.SYSTEM)], observed("P"))
    assert renderer.decode(first.token_ids) == "<s>[INST]Rules\n\nP[/INST]"
    after = renderer.after_answer(encoded(renderer, "Up</s>"), observed("Q"))
    assert renderer.decode(after.token_ids) == "[INST]Q[/INST]"


# --- other tokenizers ------------------------------------------------------------------------------------------------

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_tokenizer_with_blanks_as_letters(scheme: str) -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "[INST] [/INST]"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=LLAMA2)
    renderer = ChatRenderer(fast)
    first = renderer.first([], observed("go to the goal"))
    text = rendered_text(renderer, [{"role": "user", "content": "go to the goal"}])
    assert first.token_ids.tolist() == encoded(renderer, text)
    sampled = continuation(renderer, text, " Left </s>")
    assert sampled[-1] in renderer.stop_token_ids
    after = renderer.after_answer(sampled, observed("the start"))
    text += " Left </s>[INST] the start [/INST]"
    assert [*first.token_ids, *sampled, *after.token_ids] == encoded(renderer, text)


def test_special_tokens_that_swallow_blanks() -> None:
    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
    special = tuple(AddedToken(name, rstrip=True, special=True) for name in names)
    renderer = ChatRenderer(byte_level_tokenizer(special, template_of("phi3"), None, "<|endoftext|>"))
    for observation in ("P", "  P", "\n P Q"):
        first = renderer.first([], observed("go"))
        sampled = encoded(renderer, "Left<|end|>")
        after = renderer.after_answer(sampled, observed(observation, "\nTurn"))
        text = f"<|user|>\ngo<|end|>\n<|assistant|>\nLeft<|end|>\n<|user|>\n{observation}\nTurn<|end|>\n<|assistant|>\n"
        assert [*first.token_ids, *sampled, *after.token_ids] == encoded(renderer, text)
        assert of_kind(renderer, after, Kind.OBSERVATION).strip() in observation


def test_offsets_that_leave_out_the_blank_of_a_token() -> None:
    special = ("<s>", "</s>")
    fast = byte_level_tokenizer(special, LLAMA2, "<s>", "</s>")
    fast.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    renderer = ChatRenderer(fast)
    after = renderer.after_answer(encoded(renderer, "Up</s>"), observed("the goal is"))
    # The blank before "the" is the template's, and it is part of the first token.
    assert of_kind(renderer, after, Kind.OBSERVATION) == " goal is"


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_tokenizers_that_cannot_be_used() -> None:
    special, bos, eos = FAMILIES["base"]
    with pytest.raises(ModelError, match="no chat template"):
        ChatRenderer(byte_level_tokenizer(special, None, bos, eos))
    with pytest.raises(ModelError, match="slow"):
        ChatRenderer(SimpleNamespace(chat_template=base_template(), is_fast=False))
    with pytest.raises(ModelError, match="cannot render a user message"):
        ChatRenderer(byte_level_tokenizer(special, "{{ raise_exception('never') }}", bos, eos))
    forgets = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[-1].content }}"
    with pytest.raises(ModelError, match="goes on after an answer"):
        ChatRenderer(byte_level_tokenizer(special, forgets, bos, eos))
    with pytest.raises(ModelError, match="preserve"):
        ChatRenderer(byte_level_tokenizer(special, template_of("base"), bos, eos), history="keep")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="99999"):
        ChatRenderer(byte_level_tokenizer(special, template_of("base"), bos, eos), extra_stop_ids=[99999])


def test_template_without_any_token_that_ends_an_answer() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
    renderer = ChatRenderer(byte_level_tokenizer(("<pad>",), template, None, None))
    assert renderer.stop_token_ids == ()
    assert any("No token ends an answer" in note for note in renderer.notes)
    sampled = encoded(renderer, " Left")
    after = renderer.after_answer(sampled, observed("P"))
    assert renderer.decode(after.token_ids) == "\nuser: P\nassistant:"
