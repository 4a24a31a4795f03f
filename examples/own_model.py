"""Train a model of your own in an environment.

Any Hugging Face folder with a decoder-only causal language model, its tokenizer and a chat template will do:

    python examples/own_model.py --model path/to/your/model --environment frozenlake

Without --model a small Qwen3 with random weights is made first. It cannot even spell an answer, so its success stays at
zero; it shows what a model folder has to hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

import rehearsal as rh
from rehearsal.models.load import save_policy
from rehearsal.training.base_tokenizer import train_tokenizer


def make_model(folder: Path, environment: str) -> Path:
    """Write a small model with random weights, and a tokenizer that was trained on what the environment says."""
    env = rh.make(environment)
    texts = [env.instructions, *(env.reset(seed=seed)[0] for seed in range(200))]
    tokenizer = train_tokenizer(texts, 512)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    save_policy(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a model of your own in an environment.")
    parser.add_argument("--model", help="a Hugging Face folder or hub name; a small random one is made if left out")
    parser.add_argument("--environment", default="frozenlake", help="a built-in name or package.module:Class")
    parser.add_argument("--output", type=Path, default=Path("runs/own-model"), help="the run folder, not in use yet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=64, help="held-out tasks before and after")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    options = parser.parse_args(arguments)

    model = options.model or make_model(options.output.with_name(options.output.name + "-model"), options.environment)
    recipe = {
        "name": "own-model",
        "model": {"path": str(model)},
        "environment": {"name": options.environment},
        "algorithm": {"name": "grpo"},
        "training": {
            "steps": options.steps,
            "groups": options.groups,
            "group_size": options.group_size,
            "learning_rate": options.learning_rate,
        },
        "evaluation": {"episodes": options.episodes, "every": 0},
    }
    run = rh.train(recipe, output=options.output)
    for name, value in run.summary.items():
        print(f"{name}: {value}")
    print(f"report: {rh.write_report(run.path)}")
    print(f"trained model: {run.path / 'policy'}")


if __name__ == "__main__":
    main()
