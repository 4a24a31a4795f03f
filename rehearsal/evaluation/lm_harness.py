"""Our policies under lm-eval (github.com/EleutherAI/lm-evaluation-harness), on the local engine.

    python -m rehearsal.evaluation.lm_harness run --model rehearsal --model_args policy=runs/demo --tasks arc_easy

takes the options of ``lm_eval`` and adds the model ``rehearsal`` to it, which its own command does not know: it looks
for models in its own package alone. In Python, importing this module is enough, or a model is handed over:

    import lm_eval
    from rehearsal.evaluation.lm_harness import RehearsalLM

    lm_eval.simple_evaluate(model=RehearsalLM("runs/demo"), tasks=["arc_easy"])

Texts are encoded, cut and scored as lm-eval's own wrapper of Hugging Face models does it, so figures agree with those
of ``--model hf``. Contexts that several continuations share are read once, and answers are sampled by continuous
batching.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehearsal.errors import RecipeError
from rehearsal.evaluation.run import load_for_evaluation
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.models.load import Policy
from rehearsal.models.packing import PackItem
from rehearsal.models.scoring import target_ranks
from rehearsal.rollout import run_coroutine
from rehearsal.trajectory import SampleStop

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as _problem:
    raise RecipeError("Evaluation under lm-eval needs its package: pip install 'rehearsal[lm-eval]'.") from _problem

_DEFAULT_LENGTH = 2048
_CHUNK = 16
"""Tokens between looks for a text that ends an answer."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL: Mapping[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "min_p": 0.0}
"""Settings of generation that change nothing."""


@register_model("rehearsal")
class RehearsalLM(TemplateLM):
    """A policy as a model of lm-eval.

    Args:
        policy: a run folder, a Hugging Face folder, a hub name, "base", or a policy that is loaded already.
        device, dtype: as in a recipe.
        max_length: the longest text in tokens; what the model allows if None.
        max_gen_toks: tokens of an answer where a task does not say.
        pack_tokens: tokens of one forward pass.
        max_sessions, memory_gib: of the engine.
        add_bos_token: whether texts begin with the token for that; what the tokenizer does if None.
        seed: of answers that are sampled.
        batch_size, max_batch_size: taken because lm-eval gives them to every model; batches are packed by tokens here.

    Raises:
        RehearsalError: for a policy that cannot be loaded.
    """

    def __init__(
        self, policy: str | Path | Policy = "base", *, device: str | None = None, dtype: str = "auto",
        max_length: int | None = None, max_gen_toks: int = 256, pack_tokens: int = 4096, max_sessions: int = 64,
        memory_gib: float | None = None, add_bos_token: bool | None = None, seed: int = 0,
        batch_size: int | str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(policy, Policy):
            self.policy = policy
        else:
            options = {"model.dtype": dtype, **({} if device is None else {"model.device": device})}
            _, self.policy = load_for_evaluation(str(policy), None, options)
        self.tokenizer = self.policy.tokenizer
        self._device = self.policy.device
        config = self.policy.model.config.get_text_config()
        allowed = int(getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH)
        self.max_length = allowed if max_length is None else int(max_length)
        if not 2 <= self.max_length <= allowed:
            raise RecipeError(f"max_length must be from 2 to the {allowed} tokens of this model, not {max_length}.")
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self._pack_tokens = int(pack_tokens)
        self._sessions = int(max_sessions)
        self._memory = None if memory_gib is None else int(float(memory_gib) * 2**30)
        self._seed = int(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context is conditioned on."""
        begin = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; a token for the beginning is not added to a text that has one."""
        special: dict[str, bool] = {}
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if wanted is not None:
            special["add_special_tokens"] = wanted
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text, by the policy's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    # Scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # Neighbours with one context read it once.
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2]))
        contexts: dict[tuple[int, ...], int] = {}
        items = []
        for i in order:
            _, context, continuation = requests[i]
            # As lm-eval cuts: the last token is predicted and not read, so there may be one more than the model reads.
            whole = np.array([*context, *continuation][-(self.max_length + 1) :], dtype=np.int32)
            if not continuation or len(continuation) >= len(whole):
                raise RecipeError(
                    f"A continuation of {len(continuation)} tokens cannot be scored in {self.max_length} tokens."
                )
            targets = np.arange(len(whole) - len(continuation), len(whole))
            items.append(PackItem(whole, targets, contexts.setdefault(tuple(context), len(contexts))))
        found: dict[int, tuple[float, bool]] = {}
        for i, ranks in zip(order, target_ranks(self.policy.model, items, pack_tokens=self._pack_tokens), strict=True):
            found[i] = float(ranks[:, 0].sum(dtype=np.float64)), bool(ranks[:, 1].all())
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that each predict what the last ones did not."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            windows += [(None, *utils.make_disjoint_window(pair)) for pair in cut]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        totals = [sum(scores[begin:end]) for begin, end in itertools.pairwise([0, *ends])]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, up to one of the texts that end it."""
        plans = [_Plan(self, number, *request.args) for number, request in enumerate(requests)]
        if not plans:
            return []
        engine = LocalEngine(
            self.policy.model, max_context=max(len(plan.context) + plan.tokens for plan in plans),
            max_sessions=min(self._sessions, len(plans)), memory_bytes=self._memory, prefill_tokens=self._pack_tokens,
        )  # fmt: skip

        async def everything() -> list[str]:
            return list(await asyncio.gather(*(self._answer(engine, plan) for plan in plans)))

        answers = run_coroutine(everything())
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    async def _answer(self, engine: LocalEngine, plan: _Plan) -> str:
        session = engine.session(stream_key(self._seed, "lm-eval", plan.number))
        written: list[int] = []
        try:
            session.extend(plan.context)
            while len(written) < plan.tokens:
                sample = await session.sample(plan.sampling(min(_CHUNK, plan.tokens - len(written))))
                written += sample.token_ids.tolist()
                if sample.stop != SampleStop.LENGTH or any(text in self._decode(written) for text in plan.ends):
                    break
        finally:
            session.close()
        answer = self._decode(written)
        for text in plan.ends:
            answer = answer.split(text)[0]
        return answer

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class _Plan:
    """One request for an answer, read and checked."""

    def __init__(self, model: RehearsalLM, number: int, context: str, options: Mapping[str, Any]) -> None:
        given = dict(options)
        self.number = number
        ends = given.pop("until", None) or []
        self.ends = [text for text in ([ends] if isinstance(ends, str) else ends) if text]
        self.ends.append(model.tokenizer.decode([model.eot_token_id]))
        lengths = [given.pop(name, None) for name in _LENGTHS]
        self.tokens = int(next((length for length in lengths if length is not None), model.max_gen_toks))
        if not 1 <= self.tokens < model.max_length:
            raise RecipeError(
                f"An answer of {self.tokens} tokens leaves no room for its prompt in the {model.max_length} tokens of "
                "the model; lower max_gen_toks."
            )
        # As lm-eval cuts: from the left, so that the question at the end stays.
        self.context = np.array(model.tok_encode(context)[-(model.max_length - self.tokens) :], dtype=np.int32)
        sample = given.pop("do_sample", None)
        warmth = given.pop("temperature", None)
        # An answer is sampled where the task says so, or gives a temperature and does not say.
        warm = bool(sample) or (sample is None and bool(warmth))
        self._temperature = (1.0 if warmth is None else float(warmth)) if warm else 0.0
        self._top_k, self._top_p = int(given.pop("top_k", None) or 0), float(given.pop("top_p", None) or 1.0)
        self._stops = tuple({model.eot_token_id, *model.policy.renderer.stop_token_ids})
        for name, value in given.items():
            if value is not None and _NEUTRAL.get(name) != value:
                raise RecipeError(f"The task asks for {name}={value!r} in generation, which the engine does not know.")

    def sampling(self, tokens: int) -> SamplingParams:
        return SamplingParams(self._temperature, self._top_k, self._top_p, tokens, self._stops)


def main() -> None:
    """The command line of lm-eval, which knows the model ``rehearsal`` too."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
