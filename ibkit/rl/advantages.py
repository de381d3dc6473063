"""Per-prompt advantages ("per-prompt stat tracking" of DDPO's reference code)."""

from __future__ import annotations

from collections import deque

import torch


class PromptStats:
    """Running mean and standard deviation of the reward for each prompt string.

    A prompt with and one without the identifier are two prompts. Until a prompt has `min_count` rewards in its
    buffer, the statistics of the whole batch serve. Equal rewards give advantage 0, not a division by zero.

    Args:
        buffer_size: rewards kept for each prompt; 0 keeps none from earlier batches, so that a picture is compared with
            those of its own prompt in the same batch: group-relative advantages (GRPO, Shao et al. 2024, eq. 3).
        min_count: rewards a prompt needs before its own statistics are used; with a buffer of 0 always 2.
    """

    EPSILON = 1e-6

    def __init__(self, buffer_size: int = 64, min_count: int = 8):
        # a group is all that a prompt will ever have; one picture alone has nothing to be compared with in it
        self.buffer_size, self.min_count = buffer_size, min_count if buffer_size else 2
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        """Add a batch of rewards (B,) and return its normalised advantages (B,)."""
        size = self.buffer_size or len(prompts)
        if self.buffer_size == 0:
            self.rewards.clear()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=size)).append(reward)
        advantages = torch.empty_like(rewards, dtype=torch.float64)
        for prompt in dict.fromkeys(prompts):
            rows = [i for i, p in enumerate(prompts) if p == prompt]
            kept = torch.tensor(self.rewards[prompt], dtype=torch.float64)
            known = kept if len(kept) >= self.min_count else rewards.double()
            advantages[rows] = (rewards[rows].double() - known.mean()) / (known.std(unbiased=False) + self.EPSILON)
        return advantages.float()

    def state(self) -> dict[str, list[float]]:
        return {prompt: list(kept) for prompt, kept in self.rewards.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        self.rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state.items()}
