"""The counter of the pocket world: of which class, how many, of which colour, and where, with one to four subjects.

It answers for prompts of count, colour and background (`ibkit.pocket.feedback`), where the judge, which knows pictures
of one subject, does not. It is a small network of the judge's kind, trained apart from every scorer
(`ibkit.pocket.build.counter`), and never a reward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image

from ibkit.errors import ScoreError
from ibkit.pocket.feedback import Asked
from ibkit.pocket.words import NUMBERS
from ibkit.pocket.world import CLASSES, COLOURS, PLACES
from ibkit.scorers.judge import RATER_WIDTHS, Answering, JudgeNet, to_tensor

COUNTED: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "count": tuple(NUMBERS.values()),
    "colour": tuple(COLOURS),  # of the body
    "place": tuple(PLACES),
}


def counter_net() -> JudgeNet:
    return JudgeNet(RATER_WIDTHS, COUNTED)


class Counter(Answering):
    """Answers `COUNTED` about pictures."""

    @classmethod
    def load(cls, device: str | torch.device = "cpu", folder: str | Path = "") -> Self:
        """Load the shipped one, or that of another folder, as the build's stage `counter` writes it."""
        return cls.read("counter", device, folder, "counter", lambda card: counter_net())

    @torch.inference_mode()
    def answers(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The likeliest answer to each question, for each picture."""
        if not images:
            raise ScoreError("counter: there are no images to look at.")
        parts = [self.net(x.to(self.device))[0] for x in to_tensor(images).split(self.batch_size)]
        found = {q: torch.cat([part[q] for part in parts]).argmax(1).tolist() for q in COUNTED}
        return [{q: COUNTED[q][found[q][i]] for q in COUNTED} for i in range(len(images))]

    def agrees(self, images: Sequence[Image.Image], asked: Sequence[Asked]) -> torch.Tensor:
        """1.0 where a picture shows all that its prompt asks for, else 0.0; (N,)."""
        pairs = zip(self.answers(images), asked, strict=True)
        return torch.tensor([float(one.fulfilled(answers)) for answers, one in pairs])
