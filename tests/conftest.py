"""What many tests need: a tokenizer like that of the package's own models, tiny models, and one that keeps the format.

A model with random weights never spells an answer, so nothing could be learnt from what it plays. ``taught_folder``
holds one that was shown a few hundred answers of FrozenLake: it keeps the format most of the time and walks at random.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import torch

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

ACTIONS = ("Left", "Right", "Up", "Down")


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, and sums then depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_tokenizer() -> Any:
    """A tokenizer like that of the model that ships, from what a few environments say."""
    from rehearsal.environments import make
    from rehearsal.training.base_tokenizer import train_tokenizer

    environments = [make(name) for name in ("frozenlake", "bandit")]
    texts = [text for env in environments for text in (env.instructions, *(env.reset(seed=i)[0] for i in range(20)))]
    return train_tokenizer(texts, 480)


@pytest.fixture(scope="session")
def renderer(base_tokenizer: Any) -> Any:
    from rehearsal.models.chat import ChatRenderer

    return ChatRenderer(base_tokenizer)


def _qwen3(vocabulary: int, **changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **settings | changes)).eval()


@pytest.fixture(scope="session")
def tiny_qwen3() -> Callable[..., Any]:
    """Makes a Qwen3 of about 40,000 weights, the same ones for the same seed: ``tiny_qwen3(vocabulary, seed=0)``."""

    def build(vocabulary: int = 97, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return _qwen3(vocabulary, **changes)

    return build


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., Any]:
    """Makes a GPT-2, whose layers hold their weights transposed; those behind its attention are square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(vocabulary: int = 97, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        settings = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **settings)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_experts() -> Callable[..., Any]:
    """Makes a mixture of experts, whose matrices are stacked."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    def build(vocabulary: int = 97, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        settings = {
            "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4,
            "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "initializer_range": 0.2,
        }  # fmt: skip
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **settings)).eval()

    return build


@pytest.fixture(scope="session")
def taught_folder(
    tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Any, renderer: Any, tiny_qwen3: Callable[..., Any]
) -> Path:
    """A model folder: answers ``<answer>ACTION</answer>`` to FrozenLake, any action about as often as any other."""
    from rehearsal.agents.agent import Agent, Limits
    from rehearsal.agents.protocol import Protocol
    from rehearsal.environments import make
    from rehearsal.models.load import save_policy

    env = make("frozenlake", size=3)
    limits = Limits.for_env(env)
    rows: list[tuple[list[int], int]] = []
    for seed in range(24):
        observation, _ = env.reset(seed=seed)
        agent = Agent(renderer, Protocol(thinking=False), limits)
        prompt = agent.opening(env.instructions, observation, "", env)
        assert prompt is not None
        answer = renderer.encode(f"<answer>{ACTIONS[seed % 4]}</answer><|im_end|>")
        rows.append(([*prompt.token_ids.tolist(), *answer.tolist()], len(answer)))
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), width), base_tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), width), -100)
    for row, (ids, n_answer) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, len(ids) - n_answer : len(ids)] = ids_BT[row, len(ids) - n_answer : len(ids)]
    model = tiny_qwen3(len(base_tokenizer), seed=5, eos_token_id=base_tokenizer.eos_token_id)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(60):
        part = torch.arange(step % 3, len(rows), 3)
        model(input_ids=ids_BT[part], labels=labels_BT[part]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "taught"
    save_policy(model, base_tokenizer, folder)
    return folder


@pytest.fixture
def taught_policy(taught_folder: Path) -> Any:
    """The policy of ``taught_folder``, loaded anew for each test."""
    from rehearsal.models.load import load_policy

    return load_policy(taught_folder, device="cpu")


def _letters_tokenizer(length: int) -> Any:
    """A token for each letter, between [CLS] and [SEP]; every sign that is none is [UNK]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)] + [str(i) for i in range(10)] + [".", ":"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {one: i for i, one in enumerate([*special, *letters, *(f"##{one}" for one in letters)])}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=1000))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=length, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_qwen3: Callable[..., Any]) -> Callable[..., Path]:
    """Writes the folder of an encoder with random weights that reads letters: ``encoder_folder("bert")``, which takes
    64 tokens, or "qwen3", a causal language model."""
    from transformers import BertConfig, BertModel

    def build(kind: str = "bert", seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("encoders") / kind
        tokenizer = _letters_tokenizer(64)
        torch.manual_seed(seed)
        if kind == "bert":
            model: Any = BertModel(
                BertConfig(
                    vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
                ),
                add_pooling_layer=False,
            )  # fmt: skip
        else:
            model = tiny_qwen3(len(tokenizer), seed=seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def build_family() -> Callable[[str], Any]:
    """Makes a tiny model of a family by name, with a vocabulary of 97 and weights wide enough for mistakes to show."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    windows: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    gemma: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, **windows}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    families: dict[str, tuple[str, str, dict[str, Any]]] = {
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", gemma),
        "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 8, **moe}),
        # Scores and logits are capped by a hyperbolic tangent.
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM",
                   {**gemma, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
        # Logits are divided by a number, embeddings and residuals multiplied.
        "granite": ("GraniteConfig", "GraniteForCausalLM",
                    {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
        # Logits are multiplied by a number.
        "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25}),
        "gpt_oss": ("GptOssConfig", "GptOssForCausalLM",
                    {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **windows}),
    }  # fmt: skip

    def build(name: str) -> Any:
        config, model, settings = families[name]
        torch.manual_seed(1)
        return getattr(hf, model)(getattr(hf, config)(**common | settings)).eval()

    return build


@contextlib.contextmanager
def _serve(folder: Path) -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1"}
    with tempfile.NamedTemporaryFile("w+b", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder),
             "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **quiet},
        )  # fmt: skip

        def said() -> str:
            return Path(log.name).read_text(errors="replace")[-3000:]

        try:
            deadline = time.monotonic() + 480
            while True:
                assert process.poll() is None, f"the server ended:\n{said()}"
                assert time.monotonic() < deadline, f"the server did not start:\n{said()}"
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def serve_model() -> Callable[[Path], AbstractContextManager[str]]:
    """``with serve_model(folder) as url``: the server of transformers with the model of a folder, on loopback."""
    return _serve
