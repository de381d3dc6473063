"""Best of n: draw n pictures and keep the one that a reward likes best, the baseline that trains nothing.

Lee et al. (2023, arXiv 2302.12192) found it stronger than their own fine-tuning with the same reward, at n times the
price of every picture. It is an arm like any other, "dreambooth+best_of_4", on each personalization.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ibkit.adapt import Adapted
from ibkit.device import generator
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage
from ibkit.scorers.base import Scorer, column_of

PREFIX = "best_of_"


@dataclass(frozen=True)
class BestOf:
    """The arm that keeps the best of `n` pictures.

    Attributes:
        n: pictures drawn for one that is kept.
        reward: reads the prompt without the identifier, and sees the photos.
        references: the subject's photos.
    """

    n: int
    reward: Scorer
    references: Sequence[Image.Image] = ()

    def added_to(self, models: Mapping[tuple, Adapted]) -> dict[tuple, Adapted]:
        """The models, and after each that is personalized and not tuned the same one under this arm's name."""
        found: dict[tuple, Adapted] = {}
        for (arm, seed, tune_seed), adapted in models.items():
            found[arm, seed, tune_seed] = adapted
            if seed is not None and tune_seed is None:
                found[f"{arm}+{PREFIX}{self.n}", seed, None] = adapted
        return found

    @property
    def column(self) -> str:
        """The score that is optimised, which says nothing of this arm."""
        return column_of(self.reward.name)

    def draw(
        self,
        model: TextToImage,
        prompts: Sequence[str],
        texts: Sequence[str],
        seeds: Sequence[int],
        sampler: Sampler,
        batch_size: int = 0,
    ) -> list[Image.Image]:
        """The best picture for each prompt and seed. The first of the n has the noise of that seed, which the arm
        without choice draws from; the others have noise of their own. `texts` are the prompts without the identifier.
        """
        n = self.n
        drawn = sample(
            model,
            [prompt for prompt in prompts for _ in range(n)],
            [candidate(seed, i) for seed in seeds for i in range(n)],
            sampler,
            batch_size,
        )
        scores = self.reward(drawn, [text for text in texts for _ in range(n)], list(self.references))
        best = scores.view(-1, n).argmax(1).tolist()
        return [drawn[n * row + i] for row, i in enumerate(best)]


def is_chosen(arm: str) -> bool:
    """Whether an arm is one of these."""
    return arm.rpartition("+")[2].startswith(PREFIX)


def candidate(seed: int, i: int) -> int:
    """The noise seed of candidate `i` for a picture."""
    return seed if i == 0 else int(torch.randint(2**31, (), generator=generator(seed, "best of n", i)))
