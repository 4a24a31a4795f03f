"""Play held-out tasks with a model behind a server that speaks the OpenAI API (vLLM, SGLang, llama.cpp, a provider).

    python examples/evaluate_remote.py MODEL --url http://localhost:8000/v1 --environment countdown

The server's key is read from the environment variable that --api-key-env names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import rehearsal as rh


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Play held-out tasks with a model behind a server.")
    parser.add_argument("model", help="the model's name on the server")
    parser.add_argument("--url", required=True, help="address of the server, such as http://localhost:8000/v1")
    parser.add_argument("--api-key-env", help="environment variable with the server's key, if it wants one")
    parser.add_argument("--environment", default="countdown", help="a built-in name or package.module:Class")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="sampled tokens of one answer")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args(arguments)

    figures = rh.evaluate(
        options.model,
        url=options.url,
        api_key_env=options.api_key_env,
        overrides={
            "environment.name": options.environment,
            "agent.max_tokens_per_turn": options.tokens,
            "agent.max_context": 8 * options.tokens,
        },
        episodes=options.episodes,
        temperature=options.temperature,
    )
    if "success" in figures:
        low, high = figures["success_low"], figures["success_high"]
        print(f"success {figures['success']:.1%} (95% interval {low:.1%} to {high:.1%})")
    for name, value in figures.items():
        if not name.startswith("success"):
            print(f"{name} {value:.4g}")


if __name__ == "__main__":
    main()
