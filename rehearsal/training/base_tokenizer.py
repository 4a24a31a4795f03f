"""The tokenizer of the small base model: byte-level BPE that keeps digits and the symbols of grids apart."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rehearsal.errors import RecipeError
from rehearsal.models.chat import ANSWER_TAGS, base_template

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (PAD, START, END)
"""Special tokens: they stand outside of what is said."""
ADDED_TOKENS = (*CONTROL_TOKENS, *ANSWER_TAGS)
"""Texts that are always one token. The tags of an answer are part of what is said, so a decoder that skips special
tokens keeps them (Qwen's tokenizers do the same)."""

# A word with the blank before it; one digit, one symbol, or one other blank. Two signs that stand for one thing, the
# separator of actions and the dots of the answer format, may become one token; no other symbols are ever merged.
_PATTERN = r" ?\p{L}+| ?\|\|| ?\.\.\.| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"

_TAGS = re.compile("|".join(map(re.escape, ADDED_TOKENS)))

MIN_VOCABULARY = 256 + len(ADDED_TOKENS)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that can spell any text, with the chat template of the package's own models.

    Args:
        texts: what merges are learnt from; tags and control tokens in them are left out.
        vocabulary: the most tokens, at least :data:`MIN_VOCABULARY` (single bytes and added tokens, without merges).
            Fewer come out where the texts have no more pairs to merge.

    Raises:
        RecipeError: for a vocabulary that is too small.
    """
    if vocabulary < MIN_VOCABULARY:
        raise RecipeError(f"The vocabulary must have at least {MIN_VOCABULARY} tokens, not {vocabulary}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_TAGS.sub("\n", text) for text in texts), trainer)
    # Trained as special tokens so that they come first; the tags are ordinary added tokens from here on.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ANSWER_TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = base_template()
    return fast
