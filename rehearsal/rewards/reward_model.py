"""Scores by a reward model from a Hugging Face folder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import without_thought
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError
from rehearsal.texts import clean_text


class RewardModel:
    """A sequence classifier that rates prompt and completion, many at once.

    The text is the tokenizer's chat template with one turn each, or, where it has none, prompt, empty line, completion.
    A text that is too long is an error: what was cut off was not rated. A value means little by itself; what counts
    inside a group is the order. Optimised for long, a reward model is gamed (arXiv:2210.10760): watch another measure.

    Args:
        folder: with weights, configuration and tokenizer; nothing is fetched.
        label: whose logit is the value, for a classifier of several labels; its only one otherwise.
        threshold: value from which on a completion passes.
        batch_size: texts in one forward pass.
        max_tokens: the longest text; what the model allows if None.
        device: such as "cuda"; the processor if None.
        with_thought: rate the thought as well.
        name: as it appears in figures.

    Raises:
        RewardError: for a folder or a label that cannot be used.
    """

    runs_in = "thread"

    def __init__(
        self, folder: str | Path, *, label: int | str | None = None, threshold: float = 0.0, batch_size: int = 16,
        max_tokens: int | None = None, device: str | None = None, with_thought: bool = False,
        name: str = "reward-model",
    ) -> None:  # fmt: skip
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(folder).is_dir():
            raise RewardError(f"There is no folder {folder} with a reward model.")
        if batch_size < 1:
            raise RewardError(f"batch_size of a reward model must be 1 or more, not {batch_size}.")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as problem:
            told = str(problem).splitlines()[0][:200] if str(problem) else type(problem).__name__
            raise RewardError(f"The folder {folder} has no reward model that can be loaded: {told}") from problem
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise RewardError(f"The tokenizer in {folder} has neither a token for padding nor one for the end.")
            tokenizer.pad_token = tokenizer.eos_token
        # A classifier on a causal model finds the last token of each text by it.
        model.config.pad_token_id = tokenizer.pad_token_id
        self.name = name
        self.threshold = threshold
        self._tokenizer = tokenizer
        self._model = model.to(device or "cpu").eval()
        self._label = _label(model.config, label, folder)
        self._batch_size = batch_size
        # Both, because some models have positions that they never use, such as RoBERTa's first two.
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self._longest = max_tokens or min(positions, tokenizer.model_max_length)
        self._with_thought = with_thought
        self._lock = threading.Lock()

    def verify(self, completion: str, task: Task) -> Score:
        (result,) = self.verify_batch([completion], [task])
        if isinstance(result, Failure):
            raise VerificationError(result.message)
        return result

    def verify_batch(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Score | Failure]:
        """Rate completions; those of like length together, so that little is padded."""
        import torch

        ids = [self._encode(completion, task) for completion, task in zip(completions, tasks, strict=True)]
        results: list[Score | Failure | None] = [self._refused(tokens) for tokens in ids]
        order = sorted((i for i, result in enumerate(results) if result is None), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            with self._lock, torch.inference_mode():
                batch = self._tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
                logits = self._model(
                    input_ids=batch["input_ids"].to(self._model.device),
                    attention_mask=batch["attention_mask"].to(self._model.device),
                ).logits
                values = logits[:, self._label].float().cpu().tolist()
            for index, value in zip(chosen, values, strict=True):
                if value != value or abs(value) == float("inf"):
                    results[index] = Failure("error", "The reward model gave a value that is not finite.")
                else:
                    results[index] = Score(value, value >= self.threshold, evidence=f"rated {value:.4g}")
        return [result for result in results if result is not None]

    def _encode(self, completion: str, task: Task) -> list[int]:
        answer = completion if self._with_thought else without_thought(completion)
        if getattr(self._tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer}]
            text = clean_text(self._tokenizer.apply_chat_template(chat, tokenize=False))
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self._tokenizer(clean_text(f"{task.prompt}\n\n{answer}"))["input_ids"])

    def _refused(self, tokens: list[int]) -> Failure | None:
        if not tokens:
            return Failure("error", "There is nothing to rate: prompt and completion are empty.")
        if len(tokens) > self._longest:
            return Failure(
                "error", f"A text of {len(tokens)} tokens is too long for a reward model of {self._longest}."
            )
        return None


def _label(config: Any, label: int | str | None, folder: str | Path) -> int:
    count = int(config.num_labels)
    names = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    if label is None:
        if count == 1:
            return 0
        raise RewardError(f"The model in {folder} has {count} labels; say which one is the reward: {', '.join(names)}.")
    if isinstance(label, str):
        if label not in names:
            raise RewardError(f"The model in {folder} has no label {label!r}; there are: {', '.join(names)}.")
        return names[label]
    if not 0 <= label < count:
        raise RewardError(f"The model in {folder} has labels 0 to {count - 1}, not {label}.")
    return label
