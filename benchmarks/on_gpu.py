"""The speed of rehearsal on one GPU, with a model of the shape of Qwen3-0.6B.

Weights are random and in bfloat16, so nothing has to be downloaded; ``--model`` takes a folder instead. Answers of
random weights practically never end by themselves: every answer has ``--tokens-per-turn`` tokens, and every episode all
its turns. Their rewards would all be alike, so each episode gets a random one, on both sides, and none is left out of
learning for having no advantage. Three things are measured:

- **decoding**: tokens a second of the local engine with all episodes in place, over what the memory allows. A step that
  gives each of them one token must read the weights once and the keys and values of every context; the bound is those
  bytes over the speed at which the device copies memory in the same run.
- **learning**: operations that a step needs (``benchmarks/counting.py``) a second, over those of a large matrix product
  in the same type, in turn.
- **a whole step**: episodes a second over those of TRL's ``GRPOTrainer`` with its best engine in one process,
  ``model.generate`` or the continuous batching of transformers, steps in turn (``benchmarks/trl_side.py``).

Without a CUDA device it ends with exit code 2, unless ``--device cpu --tiny`` is given, which walks the same path with
a tiny model; the goals mean nothing there, so the result is written into no file.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import interleaved, parser, ratio, report, say, timed
from benchmarks.counting import items_of, packed_counts, training_flops
from benchmarks.setting import frozen_lake_recipe
from benchmarks.trl_side import TrlSeconds, model_copy, train_with_trl
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.models.load import Policy, save_policy
from rehearsal.models.packing import make_packs
from rehearsal.rollout import run_coroutine
from rehearsal.training.base_config import BaseConfig
from rehearsal.training.base_transcripts import make_tokenizer
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import Recipe
from rehearsal.trajectory import Group

GOALS = {"decoding": ">= 0.5", "learning": ">= 0.5", "ratio": ">= 3"}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        groups, group_size: of a training step.
        turns, tokens_per_turn: of an episode.
        context: tokens of an episode at most.
        matrix: rows and columns of the product that learning is compared with.
        copied: bytes of the tensor whose copying gives the speed of the memory.
        pack_tokens: tokens of one pass of the learner.
        decoded: tokens that each episode decodes for the measurement.
        trl_batches: episodes of one pass that are tried for TRL.
        steps: training steps of each side that are counted.
        repeats: of the other measurements.
    """

    groups: int = 32
    group_size: int = 8
    turns: int = 8
    tokens_per_turn: int = 64
    context: int = 2048
    matrix: int = 8192
    copied: int = 4 << 30
    pack_tokens: int = 16_384
    decoded: int = 128
    trl_batches: tuple[int, ...] = (128, 64, 32)
    steps: int = 3
    repeats: int = 5


TINY = Size(
    groups=2, group_size=4, turns=2, tokens_per_turn=6, context=512, matrix=256, copied=16 << 20, pack_tokens=1024,
    decoded=8, trl_batches=(8,), steps=1, repeats=2,
)  # fmt: skip
QUICK = Size(groups=8, decoded=64, copied=1 << 30, trl_batches=(32,), steps=1, repeats=2)


def write_model(folder: Path, tiny: bool, seed: int) -> None:
    """A model with random weights and the package's own kind of tokenizer; its other ids decode to nothing."""
    tokenizer = make_tokenizer(BaseConfig(tokenizer_episodes=100))
    shape: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
    }  # fmt: skip
    if tiny:
        shape |= {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048,
        }  # fmt: skip
    config = Qwen3Config(
        **shape, tie_word_embeddings=True, max_position_embeddings=40_960, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    save_policy(model, tokenizer, folder)


def memory_speed(device: torch.device, size: int, repeats: int) -> float:
    """Bytes a second that the device reads and writes when it copies a large tensor."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), device)
    seconds = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(repeats))
    return 2.0 * size / seconds


def decoding(policy: Policy, size: Size, seed: int) -> dict[str, float]:
    """Decoding with all episodes in place, against the memory bound.

    The prompts are read in a call of their own, whose single token is not counted.
    """
    device = policy.device
    model = policy.model
    episodes = size.groups * size.group_size
    prompt = min(size.context // 2, 512)
    engine = LocalEngine(model, max_context=prompt + size.decoded + 2, max_sessions=episodes)
    if engine.capacity < episodes:
        raise SystemExit(f"The memory holds {engine.capacity} of {episodes} episodes; give --groups less.")
    vocabulary = model.config.get_text_config().vocab_size
    texts = np.random.default_rng(seed).integers(vocabulary, size=(episodes, prompt))

    async def play() -> float:
        sessions = [engine.session(stream_key(seed, "decoding", index)) for index in range(episodes)]
        for session, text in zip(sessions, texts, strict=True):
            session.extend(text)
        await asyncio.gather(*(session.sample(SamplingParams(max_tokens=1)) for session in sessions))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        params = SamplingParams(max_tokens=size.decoded)
        sampled = await asyncio.gather(*(session.sample(params) for session in sessions))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        assert all(len(answer.token_ids) == size.decoded for answer in sampled)
        for session in sessions:
            session.close()
        return seconds

    run_coroutine(play())
    measured = statistics.median(run_coroutine(play()) for _ in range(size.repeats))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not model.config.get_text_config().tie_word_embeddings:
        # Only the rows of the sampled tokens are read of an embedding that is not the head as well.
        embedding = model.get_input_embeddings().weight
        weights -= embedding.numel() * embedding.element_size()
    # In step t, the keys and values of prompt + 1 + t tokens are read.
    contexts = sum(prompt + 1 + step for step in range(size.decoded))
    needed = size.decoded * weights + episodes * contexts * engine.bytes_per_token
    speed = memory_speed(device, size.copied, size.repeats)
    return {
        "decoding": needed / speed / measured,
        "decode_tokens_per_second": episodes * size.decoded / measured,
        "decode_step_milliseconds": 1e3 * measured / size.decoded,
        "decode_bound_milliseconds": 1e3 * needed / speed / size.decoded,
        "memory_gb_per_second": speed / 1e9,
        "decode_bytes_per_step": needed / size.decoded,
    }


def random_rewards(groups: list[Group], seed: int) -> None:
    """Take something random off the last turn of each episode, so that those of a group differ."""
    rng = np.random.default_rng(seed)
    for group in groups:
        for trajectory in group:
            if trajectory.turns:
                trajectory.turns[-1].penalty -= float(rng.random())


class Ours:
    """Rehearsal's training step."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.trainer = Trainer(recipe, policy=policy)
        self.device = policy.device
        self.steps: list[tuple[float, float, float]] = []
        self.sampled: list[float] = []
        self.groups: list[Group] = []

    def step(self, number: int = 0) -> None:
        """One training step; its seconds are added to ``steps`` as (all, generation, learning)."""
        trainer = self.trainer
        learning = 0.0

        def work() -> None:
            nonlocal learning
            started = time.perf_counter()
            batch = trainer.play()
            random_rewards(batch.groups, number)
            played.append(time.perf_counter() - started)
            self.groups = batch.groups
            learning = timed(
                lambda: trainer.learner.step(batch.groups, trainer.steps_done, batch.kept.keep_PG), self.device
            )
            trainer.steps_done += 1

        played: list[float] = []
        seconds = timed(work, self.device)
        self.steps.append((seconds, played[0], learning))
        episodes = [trajectory for group in self.groups for trajectory in group]
        self.sampled.append(sum(trajectory.n_sampled for trajectory in episodes) / len(episodes))


def learning(ours: Ours, size: Size) -> dict[str, float]:
    """The learner on the episodes that were played last, against a large matrix product."""
    trainer, device, groups = ours.trainer, ours.device, ours.groups
    model = trainer.learner.model
    kind = next(model.parameters()).dtype
    left = torch.randn(size.matrix, size.matrix, device=device).to(kind)
    right = torch.randn(size.matrix, size.matrix, device=device).to(kind)
    works: dict[str, Callable[[], Any]] = {
        "learner": lambda: trainer.learner.step(groups, trainer.steps_done),
        "product": lambda: torch.mm(left, right),
    }
    seconds = interleaved(works, size.repeats, warmup=1, device=device)
    items = items_of(groups)
    packs = [pack.items for pack in make_packs(items, size.pack_tokens, share_prefixes=True)]
    tokens, pairs = packed_counts(items, packs, True)
    flops = training_flops(model, tokens, sum(len(item.targets) for item in items), pairs)
    product = 2.0 * size.matrix**3
    speeds = [flops / s for s in seconds["learner"]]
    return {
        **ratio(speeds, [product / s for s in seconds["product"]]).figures("learning"),
        "learner_tflops": statistics.median(speeds) / 1e12,
        "product_tflops": product / statistics.median(seconds["product"]) / 1e12,
        "learner_tokens_per_second": tokens / statistics.median(seconds["learner"]),
    }


def trl_choice(recipe: Recipe, folder: Path, size: Size, device: str, engines: list[str]) -> tuple[str, int]:
    """The engine and the batch size with which TRL is fastest; what it cannot run is left out, and said."""
    tried: dict[tuple[str, int], float] = {}
    reward = _random_reward()
    for engine in engines:
        batch = min(size.trl_batches)
        _try(tried, engine, batch, recipe, folder, device, reward)
    if not tried:
        raise SystemExit("TRL runs with neither of its engines here, so there is nothing to compare with.")
    engine = min(tried, key=lambda choice: tried[choice])[0]
    for batch in size.trl_batches:
        if (engine, batch) not in tried:
            _try(tried, engine, batch, recipe, folder, device, reward)
    return min(tried, key=lambda choice: tried[choice])


def _try(
    tried: dict[tuple[str, int], float], engine: str, batch: int, recipe: Recipe, folder: Path, device: str,
    reward: Callable[[Any], float],
) -> None:  # fmt: skip
    if (recipe.training.groups * recipe.training.group_size) % batch:
        return
    try:
        seconds = train_with_trl(
            recipe, model_copy(folder, device, "bfloat16"), 2, batch=batch, engine=engine, reward=reward
        )
    except Exception as error:  # out of memory, or an engine that this model or device does not have
        say(f"TRL, {engine}, batches of {batch}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    else:
        tried[engine, batch] = seconds[-1].step
        say(f"TRL, {engine}, batches of {batch}: {seconds[-1].step:.1f} s")
    finally:
        # A trainer refers to itself: its model and optimiser go only with a collection.
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _random_reward() -> Callable[[Any], float]:
    rng = np.random.default_rng(0)
    return lambda seat: seat.reward - float(rng.random())


def whole_step(
    ours: Ours, recipe: Recipe, folder: Path, size: Size, device: str, engines: list[str]
) -> tuple[dict[str, float], str]:
    """Steps of both sides in turn; the first of each is left out. Also the engine that TRL was fastest with."""
    engine, batch = trl_choice(recipe, folder, size, device, engines)
    theirs: list[TrlSeconds] = train_with_trl(
        recipe, model_copy(folder, device, "bfloat16"), size.steps + 1, batch=batch, between=ours.step, engine=engine,
        reward=_random_reward(),
    )  # fmt: skip
    mine, theirs = ours.steps[1:], theirs[1:]
    episodes = size.groups * size.group_size
    median = statistics.median
    figures = {
        **ratio([t.step for t in theirs], [o[0] for o in mine]).figures("ratio"),
        "episodes_per_second": episodes / median(o[0] for o in mine),
        "trl_episodes_per_second": episodes / median(t.step for t in theirs),
        "generation_seconds": median(o[1] for o in mine),
        "trl_generation_seconds": median(t.generation for t in theirs),
        "learning_seconds": median(o[2] for o in mine),
        "trl_learning_seconds": median(t.step - t.generation for t in theirs),
        "sampled_tokens_per_episode": median(ours.sampled[1:]),
        "trl_sampled_tokens_per_episode": median(t.sampled / t.episodes for t in theirs),
        "trl_batch": float(batch),
        "trl_continuous_batching": float(engine == "continuous"),
    }
    return figures, engine


def main() -> int:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    options.add_argument("--model", default=None, help="a model folder instead of random weights")
    options.add_argument("--groups", type=int, default=None, help="groups of 8 episodes in a step")
    options.add_argument(
        "--trl-engines", nargs="+", choices=("generate", "continuous"), default=["generate", "continuous"],
        help="engines that are tried for TRL",
    )  # fmt: skip
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu --tiny walks the same path.", file=sys.stderr)
        return 2
    if given.device == "cpu" and not given.tiny:
        print("On a processor only --tiny makes sense.", file=sys.stderr)
        return 2
    if given.threads:
        torch.set_num_threads(given.threads)
    size = TINY if given.tiny else QUICK if given.quick else Size()
    if given.groups:
        size = Size(**{**vars(size), "groups": given.groups})
    figures: dict[str, float] = {"episodes": float(size.groups * size.group_size)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(given.model or name)
        if given.model is None:
            write_model(folder, given.tiny, given.seed)
        recipe = frozen_lake_recipe(
            groups=size.groups, group_size=size.group_size, turns=size.turns, actions=1,
            tokens_per_turn=size.tokens_per_turn, max_context=size.context, seed=given.seed,
            model__device=given.device, model__dtype="bfloat16", training__pack_tokens=size.pack_tokens,
            engine__max_sessions=size.groups * size.group_size,
        )  # fmt: skip
        policy = model_copy(folder, given.device, "bfloat16")
        figures |= decoding(policy, size, given.seed)
        say(f"decoding at {figures['decoding']:.2f} of the memory bound")
        ours = Ours(recipe, policy)
        ours.step()
        figures |= learning(ours, size)
        say(f"learning at {figures['learning']:.2f} of a large product")
        ours.steps.clear()
        ours.sampled.clear()
        more, engine = whole_step(ours, recipe, folder, size, given.device, given.trl_engines)
        figures |= more
        say(f"a whole step {figures['ratio']:.2f} times faster than TRL with {engine}")
    if given.device == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    report("on_gpu", figures, GOALS, [given.seed], given.quick or given.tiny, device=torch.device(given.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
