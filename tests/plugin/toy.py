"""A method, a reward that is a metric too, and its label, as another package would bring them."""

from dataclasses import dataclass

import torch

from ibkit.adapt import attach, freeze
from ibkit.device import generator
from ibkit.evaluate.stats import Metric
from ibkit.fields import field
from ibkit.methods.records import Method
from ibkit.scorers import Scorer


@dataclass(frozen=True)
class Settings:
    n_steps: int = field(3, "how often the weights are shaken", "nobody", low=1)
    strength: float = field(0.01, "of a shake", "nobody", low=0.0)


def shake(model, job, settings, *, on_row=None, monitor=None, processes=None):
    weights, rows = attach(model, "lora", job.name, {"rank": 1}, generator(job.seed, job.name)), []
    for step in range(settings.n_steps):
        with torch.no_grad():
            for i, p in enumerate(weights.values()):
                p.add_(settings.strength * torch.randn(p.shape, generator=generator(job.seed, step, i)))
        rows.append({"step": step, "loss": settings.strength})
        on_row(rows[-1], model)
    freeze(model)
    return rows


METHOD = Method("toy_shake", "Shaken", "personalize", Settings, shake, "this test")


class Redness(Scorer):
    name, evaluator, needs = "toy_redness", "mean of the red channel, 64 px", frozenset()

    @classmethod
    def load(cls, weights, device):
        return cls()

    def _score(self, images, texts, references):
        return torch.tensor([image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images])


METRIC = Metric("Redness", "text")
