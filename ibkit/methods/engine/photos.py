"""Training on photos, as every personalization does it: noise a few latents, predict the noise, take a step.

A method says what it trains, which latents and captions a step has, and what its loss is.

Shapes: B pictures of a step, C/H/W latent channels, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ibkit.device import generator
from ibkit.errors import TrainingError
from ibkit.fields import field
from ibkit.model.text_to_image import TextToImage
from ibkit.train.kept import Average, Optimizer, Weights, memory_advice
from ibkit.train.loop import loop


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
    checkpoint_every: int = field(200, "steps between checkpoints", "ours", low=1)


@dataclass(frozen=True)
class Examples:
    """What one step learns from.

    Attributes:
        z_0: latents (B, C, H, W).
        prompts: B captions.
        mask: (B, 1, H, W), where the loss counts; None = everywhere.
    """

    z_0: torch.Tensor
    prompts: Sequence[str]
    mask: torch.Tensor | None = None


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
) -> list[dict[str, float]]:
    """Train `weights`, which are on the model, and leave the result there: the last weights, or their average.

    Args:
        draw: the examples of a step, from the step's own random stream.
        loss: ε̂, ε (B, C, H, W) and the examples -> scalars by name; "loss" is what is minimised.
        folder, origin: see `train.loop`.
        stream: seed and name of the random streams.
        on_step: called after each step with its row.

    Returns:
        A row a step: step, what `loss` returns, seconds.

    Raises:
        TrainingError: a loss that is not finite, or memory does not suffice.
        ArtifactError: the checkpoints in `folder` are of another training.
    """
    alphas = model.alphas_cumprod.float().to(model.device)
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # one kernel for the whole step; on the CPU 4 times as fast, with losses equal to 1e-6
    )
    average = Average(weights, settings.ema_decay)

    def step(number: int) -> dict[str, float]:
        own = generator(*stream, number)
        with memory_advice(f"lower batch (now {settings.batch}) or use smaller pictures"):
            examples = draw(own)
            t = torch.randint(len(alphas), (len(examples.z_0),), generator=own).to(model.device)
            noise = torch.randn(examples.z_0.shape, generator=own).to(model.device)
            eps_hat = model.predict_noise(add_noise(examples.z_0, noise, alphas[t]), t, examples.prompts)
            terms = loss(eps_hat, noise, examples)
            terms["loss"].backward()
        values = torch.stack(list(terms.values())).tolist()  # waits for the GPU once
        row = {"step": number, **dict(zip(terms, values, strict=True))}
        if not math.isfinite(row["loss"]):
            raise TrainingError(
                f"step {number}: the loss is {row['loss']}; lower the learning rate ({settings.learning_rate:g})."
            )
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.follow(at_most=(number + 1) / (number + 11))  # the first weights are soon forgotten
        return row

    kept = {"weights": Weights(weights), "average": average, "optimizer": Optimizer(optimizer)}
    history = loop(
        step, settings.n_steps, kept, folder, settings.checkpoint_every, origin,
        on_row=lambda history: on_step(history[-1]) if on_step else None,
    )  # fmt: skip
    average.put_on()
    return history
