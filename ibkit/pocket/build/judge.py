"""The judge of the pocket world and the raters, trained apart from everything that is optimised; see
`ibkit.scorers.judge` for what they answer.

A small convolutional network, trained on renders (mixtures of pose and things among them) with noise, blur and a slight
turn, and on the autoencoder's reconstructions. Identity is an embedding trained by classification of the visible
attributes, so it also works for individuals that training never showed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ibkit.pocket.build.autoencoder import redraw
from ibkit.pocket.build.clip import degrade
from ibkit.pocket.build.common import Budget, begin_with, fit, hash_seed
from ibkit.pocket.build.data import Pictures, facts
from ibkit.pocket.world import COLOURS, PATTERNS, SHAPES
from ibkit.scorers.judge import ANSWERS, JUDGE_WIDTHS, JudgeNet

BUDGET = Budget(steps=4000, batch=512, ema=0.998)
CONTINUED = Budget(steps=1730, batch=512, ema=0.998)  # from earlier weights
RATER_BUDGET = Budget(steps=600, batch=128, ema=0.99)
RATER_REDRAWS = 4  # steps between redrawn pictures
ATTRIBUTES: dict[str, Sequence] = {  # of an individual
    "body": tuple(COLOURS),
    "second": tuple(COLOURS),
    "pattern": tuple(PATTERNS),
    "shape": SHAPES["container"],  # all there are
    "long_ears": (False, True),
}
TURN_DEGREES, SHIFT, STRETCH = 4.0, 0.05, 0.06


def jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, shift and stretch each picture (B, C, H, W) a little, since a model never draws a pose exactly."""

    def uniform(size: float) -> torch.Tensor:
        return size * (2 * torch.rand(len(images), generator=generator, device=images.device) - 1)

    turn, scale = uniform(math.radians(TURN_DEGREES)), 1 + uniform(STRETCH)
    theta = torch.stack(
        [scale * turn.cos(), -turn.sin(), uniform(SHIFT), turn.sin(), scale * turn.cos(), uniform(SHIFT)], 1
    ).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(
    folder: Path,
    pictures: Pictures,
    vae,
    device,
    dtype,
    name: str = "judge",
    widths: tuple[int, ...] = JUDGE_WIDTHS,
    budget: Budget = BUDGET,
    start: dict | None = None,
    redraw_every: int = 1,
) -> JudgeNet:
    """Train a judge or rater; its `name` seeds its first weights and its batches. Of `redraw_every` steps one has
    reconstructions, making which is most of the work when the network is small.
    """
    torch.manual_seed(hash_seed(f"{name} weights"))
    net = JudgeNet(widths)
    begin_with(net, start)
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(net.identity.out_features, len(v)) for k, v in ATTRIBUTES.items()})
    whole = torch.nn.ModuleDict({"net": net, "heads": heads})
    truths = [facts(scene) | vars(scene.subject) for scene in pictures.scenes]
    known = ANSWERS | ATTRIBUTES
    labels = {q: torch.tensor([a.index(t[q]) for t in truths], device=device) for q, a in known.items()}
    vae = vae.to(device=device, dtype=dtype).requires_grad_(False)

    def loss_fn(work, average, step, generator):
        indices = pictures.members(pictures.groups(budget.batch // pictures.size, generator)).flatten()
        x = pictures.batch(indices, device)
        if step % redraw_every == 0:
            part = slice(step // redraw_every % 3, None, 3)
            x[part] = redraw(vae, x[part], generator, dtype)
        answers, embedding = work["net"](degrade(jitter(x, generator), generator).to(dtype))
        losses = {q: F.cross_entropy(answers[q].float(), labels[q][indices], label_smoothing=0.02) for q in ANSWERS}
        for k, head in work["heads"].items():
            losses[k] = 0.5 * F.cross_entropy(head(embedding).float(), labels[k][indices])
        right = {q: (answers[q].argmax(1) == labels[q][indices]).float().mean() for q in ("class", "pose", "things")}
        return sum(losses.values()), right | {k: losses[k].detach() for k in ("second", "pattern")}

    fit(name, folder, whole, loss_fn, budget, device, dtype)
    return net
