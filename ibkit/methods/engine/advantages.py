"""Per-prompt advantages ("per-prompt stat tracking" of DDPO's reference code)."""

from collections import deque
from collections.abc import Sequence

import torch

from ibkit.data.prompts import Prompt


class PromptStats:
    """Running mean and standard deviation of the reward for each prompt text.

    A prompt with and one without the identifier are two prompts. Until a prompt has `min_count` rewards in its
    buffer, the statistics of the batch's prompts of its kind serve. Equal rewards give advantage 0, not a division by
    zero.

    Differs from DDPO's code (kvablack/ddpo-pytorch, stat_tracking.py), where the whole batch serves. Its prompts are
    all of one kind, and an epoch has 4 x 8 pictures on every GPU (config/dgx.py). InstructBooth's epoch has 16, so that
    3 x 2 prompts take about six epochs to 16 rewards each, and an overfitted model earns less with the identifier:
    against both kinds a picture with it would be bad whatever it shows. The two or three rewards that a prompt gets in
    its first epoch would serve no better: two different ones always make advantages of -1 and 1.

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

    def advantages(
        self, prompts: Sequence[Prompt], rewards: torch.Tensor, least: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add a batch of rewards (B,) and return its normalised advantages (B,).

        Args:
            least: standard deviations (B,), alike for a prompt; no prompt is divided by a smaller one.
        """
        size = self.buffer_size or len(prompts)
        if self.buffer_size == 0:
            self.rewards.clear()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt.text, deque(maxlen=size)).append(reward)
        advantages = torch.empty_like(rewards, dtype=torch.float64)
        for prompt in dict.fromkeys(prompts):
            rows = [i for i, p in enumerate(prompts) if p.text == prompt.text]
            known = torch.tensor(self.rewards[prompt.text], dtype=torch.float64)
            if len(known) < self.min_count:
                known = rewards[[p.identifier == prompt.identifier for p in prompts]].double()
            spread = known.std(unbiased=False) + self.EPSILON
            if least is not None:
                spread = torch.maximum(spread, least[rows[0]].double())
            advantages[rows] = (rewards[rows].double() - known.mean()) / spread
        return advantages.float()

    def state(self) -> dict[str, list[float]]:
        return {prompt: list(kept) for prompt, kept in self.rewards.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        self.rewards = {prompt: deque(kept, maxlen=self.buffer_size) for prompt, kept in state.items()}
