"""A replay buffer of trajectories, as a part of a training's state."""

from collections.abc import Mapping
from typing import Any

import torch

from ibkit.methods.engine.rollout import Trajectories
from ibkit.train.kept import Kept


class Replay(Kept):
    """The newest trajectories and their rewards: `n`, or those of one iteration where they are more; `nbytes` of all of
    them.
    """

    def __init__(self, n: int, nbytes: int):
        self.n, self._nbytes = n, nbytes
        self.trajectories: Trajectories | None = None
        self.rewards = torch.empty(0)
        self.fresh = 0  # of the newest iteration

    def add(self, made: Trajectories, rewards: torch.Tensor) -> None:
        """Put an iteration's trajectories (T + 1, B, ...) and rewards (B,) behind the others."""
        kept, self.fresh = max(self.n, len(rewards)), len(rewards)
        if (old := self.trajectories) is not None:
            latents = torch.cat([old.latents, made.latents], 1)
            log_probs = torch.cat([old.log_probs, made.log_probs], 1)
            made = Trajectories(latents, log_probs, old.prompts + made.prompts)
            rewards = torch.cat([self.rewards, rewards])
        self.trajectories = Trajectories(made.latents[:, -kept:], made.log_probs[:, -kept:], made.prompts[-kept:])
        self.rewards = rewards[-kept:]

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.trajectories is None:
            return {}
        made = self.trajectories
        return {"latents": made.latents.cpu(), "log_probs": made.log_probs.cpu(), "rewards": self.rewards}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if tensors:
            self.trajectories = Trajectories(tensors["latents"], tensors["log_probs"], [])
            self.rewards = tensors["rewards"]

    def facts(self) -> Any:
        return {"prompts": self.trajectories.prompts if self.trajectories else [], "fresh": self.fresh}

    def recall(self, facts: Any) -> None:
        self.fresh = facts["fresh"]
        if self.trajectories is not None:
            self.trajectories.prompts = facts["prompts"]

    def draw(self, n: int, n_steps: int, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and step of `n` different transitions among the first `n_steps`, (n,); of all where there are fewer."""
        found = torch.randperm(len(self.rewards) * n_steps, generator=stream)[:n]
        return found // n_steps, found % n_steps
