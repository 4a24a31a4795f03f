"""What the models say about packs of tokens: forward passes at the precision and temperature of a run.

N target tokens of a pack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal.algorithms.batch import PolicyOutput, TokenBatch
from rehearsal.models.head import token_certainties, token_logprobs
from rehearsal.models.packed import causal_lm, packed_hidden
from rehearsal.models.packing import Pack, PackItem
from rehearsal.models.parallel import pack_workers
from rehearsal.models.scoring import each_target, target_logprobs
from rehearsal.training.critic import Critic
from rehearsal.training.options import TrainingOptions


@dataclass
class Passes:
    """The models of a learner.

    Attributes:
        model: the policy.
        critic: or None.
        options: packs and precision.
        temperature: that episodes are sampled at; log-probs are taken at the same one.
        entropy: whether the entropy of each target's distribution is wanted.
    """

    model: Any
    critic: Critic | None
    options: TrainingOptions
    temperature: float = 1.0
    entropy: bool = False

    @property
    def device(self) -> torch.device:
        return next(causal_lm(self.model).parameters()).device

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """The context that forward passes run in."""
        if self.options.autocast:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    def forward(self, pack: Pack, micro: TokenBatch, values: bool) -> PolicyOutput:
        """All that objectives ask for, with gradient; the critic's values if ``values``."""
        logprobs_N, entropy_N = self.policy(pack, micro)
        return PolicyOutput(logprobs_N, entropy_N, self.values(pack) if values else None)

    def policy(self, pack: Pack, micro: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets, and entropies if they are wanted.

        Sampled tokens have the temperature of sampling; what others said has none, which is to say 1.
        """
        temperature: float | Tensor = self.temperature
        if micro.observation_mask_N is not None and self.temperature != 1.0:
            temperature = torch.where(micro.observation_mask_N, 1.0, self.temperature)
        with self.precision():
            hidden_ND = packed_hidden(self.model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
            return token_logprobs(
                causal_lm(self.model), hidden_ND, pack.targets_N, temperature=temperature, entropy=self.entropy
            )

    def values(self, pack: Pack) -> Tensor:
        """The critic's values of the states before the targets."""
        assert self.critic is not None
        with self.precision():
            hidden_ND = packed_hidden(self.critic, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
        return self.critic.values(hidden_ND)

    def score(
        self, items: Sequence[PackItem], model: Any | None = None, temperature: float | None = None
    ) -> list[np.ndarray]:
        """Log-probs of the target tokens of any sequences, one array each, without gradients."""
        options = self.options
        return target_logprobs(
            self.model if model is None else model, items,
            temperature=self.temperature if temperature is None else temperature,
            pack_tokens=options.pack_tokens, share_prefixes=options.share_prefixes, precision=self.precision,
        )  # fmt: skip

    def certainties(self, items: Sequence[PackItem]) -> list[np.ndarray]:
        """Self-certainty of the policy where it drew the target tokens of any sequences, nats, one array each."""
        options = self.options

        def look(pack: Pack) -> np.ndarray:
            with self.precision():
                hidden_ND = packed_hidden(self.model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
                return token_certainties(causal_lm(self.model), hidden_ND, temperature=self.temperature).cpu().numpy()

        return each_target(
            [self.model], items, look, options.pack_tokens, options.share_prefixes, self.device,
            pack_workers(self.model),
        )  # fmt: skip

    def values_of(self, items: Sequence[PackItem]) -> list[np.ndarray]:
        """The critic's values before the target tokens of any sequences, one array each, without gradients."""
        options = self.options
        return each_target(
            [self.critic], items, lambda pack: self.values(pack).float().cpu().numpy(), options.pack_tokens,
            options.share_prefixes, self.device, pack_workers(self.model),
        )  # fmt: skip
