"""Training on photos, as every personalization does it: noise a few latents, predict the noise, take a step.

A method says what it trains, which latents and captions a step has, and what its loss is.

Shapes: B pictures of a step, C/H/W latent channels, height, width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image, ImageOps

from ibkit.device import generator, working
from ibkit.errors import TrainingError
from ibkit.fields import field
from ibkit.model.text_to_image import TextToImage
from ibkit.train.kept import Average, Kept, Optimizer, Weights, memory_advice
from ibkit.train.loop import Row, loop
from ibkit.train.resources import Resources

Shown = Callable[[], AbstractContextManager[None]]
# may differ on resume: length, and what affects memory and speed only
MAY_CHANGE = ("n_steps", "checkpoint_every", "micro_batch", "resources")


@dataclass(frozen=True)
class PhotoConfig:
    """Settings that all trainings on photos have; a method gives the paper's values."""

    n_steps: int = field(1000, "training steps", "ours", low=1, high=1_000_000)
    batch: int = field(1, "photos in a step", "ours", low=1, high=1024)
    learning_rate: float = field(1e-4, "of AdamW, constant", "ours", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.999), "of AdamW", "PyTorch's", low=0.0, high=1.0)
    weight_decay: float = field(0.01, "of AdamW", "PyTorch's", low=0.0, high=1.0)
    max_grad_norm: float = field(0.0, "gradients are clipped to this norm; 0 = not", "ours", low=0.0)
    ema_decay: float = field(
        0.0,
        "moving average of the weights, which is the result; 0 = the last",
        "the papers: none",
        low=0.0,
        high=0.9999,
    )
    micro_batch: int = field(
        0, "photos in a pass, with as many class pictures: gradients add up to the batch; memory only; 0 = all",
        "ours", low=0,
    )  # fmt: skip
    checkpoint_every: int = field(200, "steps between checkpoints", "ours", low=1)
    resources: Resources = Resources()


@dataclass(frozen=True)
class Examples:
    """What one step learns from: B photos, or B photos and then B class pictures.

    Attributes:
        z_0: latents (B or 2B, C, H, W).
        prompts: a caption for each.
        mask: (B, 1, H, W), where the loss of the photos counts; None = everywhere.
        labels: (B,), a number for each photo that a method's loss reads; None = it reads none.
        z_t, t: the noised latents and their timesteps, one for each row, once `fit` has drawn them.
    """

    z_0: torch.Tensor
    prompts: Sequence[str]
    mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    z_t: torch.Tensor | None = None
    t: torch.Tensor | None = None

    def part(self, rows: torch.Tensor, photos: torch.Tensor) -> "Examples":
        """These rows, of which some are photos."""
        mask, labels = (None if of is None else of[photos] for of in (self.mask, self.labels))
        z_t, t = (None if of is None else of[rows] for of in (self.z_t, self.t))
        return Examples(self.z_0[rows], [self.prompts[row] for row in rows.tolist()], mask, labels, z_t, t)


def add_noise(z_0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """z_t = √ᾱ z_0 + √(1 - ᾱ) ε (Ho et al. 2020, eq. 4); z_0, noise (B, C, H, W), alpha_bar (B,)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * z_0 + (1 - a).sqrt() * noise


def mirrored_latents(model: TextToImage, photos: Sequence[Image.Image]) -> torch.Tensor:
    """Latents (2, n, C, H, W) of n photos and of their mirror images."""
    return torch.stack([model.encode_images(photos), model.encode_images([ImageOps.mirror(p) for p in photos])])


def fit(
    model: TextToImage,
    weights: Mapping[str, torch.nn.Parameter],
    draw: Callable[[torch.Generator], Examples],
    loss: Callable[[torch.Tensor, torch.Tensor, Examples], Mapping[str, torch.Tensor]],
    settings: PhotoConfig,
    folder: Path,
    origin: Mapping[str, str],
    stream: tuple[int, str],
    on_step: Callable[[dict[str, float]], None] | None = None,
    *,
    more: Mapping[str, Kept] = MappingProxyType({}),
    before: Callable[[int], Mapping[str, float]] = lambda number: {},
    after: Callable[[int, Shown], Mapping[str, float]] = lambda number, result: {},
    stop: Callable[[list[Row]], bool] = lambda history: False,
) -> list[dict[str, float]]:
    """Train `weights`, which are on the model, and leave the result there: the last weights, or their average.

    Args:
        draw: the examples of a step, from the step's own random stream.
        loss: ε̂, ε (B, C, H, W) and the examples -> scalars by name; "loss" is what is minimised.
        folder, origin: see `train.loop`.
        stream: seed and name of the random streams.
        on_step: called after each step with its row.
        more: state of the method beside weights, average and optimizer, for checkpoints.
        before, after: called with a step's number before and after its update; columns of its row. `after` is also
            handed a context inside which the model has the weights that are the result, the average where there is one.
        stop: see `train.loop`.

    Returns:
        A row a step: step, what `loss` returns, seconds.

    Raises:
        TrainingError: a loss that is not finite, or memory does not suffice.
        ArtifactError: the checkpoints in `folder` are of another training.
    """
    alphas = model.alphas_cumprod.float().to(model.device)
    settings.resources.prepare(model)
    optimizer = settings.resources.adamw(
        weights.values(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # one kernel for the whole step; on the CPU 4 times as fast, with losses equal to 1e-6
    )
    average = Average(weights, settings.ema_decay)

    micro_batch = settings.micro_batch or settings.batch

    def step(number: int) -> dict[str, float]:
        own = generator(*stream, number)
        sums: dict[str, torch.Tensor] = {}
        with memory_advice(f"lower micro_batch (now {micro_batch}) or set resources.checkpointing"):
            row_before = before(number)
            whole = draw(own)
            t = torch.randint(len(alphas), (len(whole.z_0),), generator=own).to(model.device)
            noise = torch.randn(whole.z_0.shape, generator=own).to(model.device)
            z_t = add_noise(whole.z_0, noise, alphas[t])
            whole = replace(whole, z_t=z_t, t=t)
            for photos in torch.arange(settings.batch).split(micro_batch):
                rows = torch.cat([photos + first for first in range(0, len(z_t), settings.batch)])
                part, share = whole.part(rows, photos), len(photos) / settings.batch
                terms = loss(model.predict_noise(z_t[rows], t[rows], part.prompts), noise[rows], part)
                (share * terms["loss"]).backward()
                sums = {name: sums.get(name, 0) + share * term.detach() for name, term in terms.items()}
        values = torch.stack([*sums.values()]).tolist()  # waits for the GPU once
        row = {"step": number, **dict(zip(sums, values, strict=True))}
        if not math.isfinite(row["loss"]):
            raise TrainingError(
                f"step {number}: the loss is {row['loss']}; lower the learning rate ({settings.learning_rate:g})."
            )
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.follow(at_most=(number + 1) / (number + 11))  # the first weights are soon forgotten
        return row | dict(row_before) | dict(after(number, average.shown))

    moments = Optimizer(optimizer, settings.resources.moment_bytes)
    kept = {"weights": Weights(weights), "average": average, "optimizer": moments, **more}
    with working(model.unet):
        history = loop(
            step, settings.n_steps, kept, folder, settings.checkpoint_every, {**origin, **settings.resources.origin},
            on_row=lambda history: on_step(history[-1]) if on_step else None, stop=stop,
        )  # fmt: skip
    average.put_on()
    return history
