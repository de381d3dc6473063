"""DreamBooth with prior preservation (Ruiz et al. 2023), the first stage of InstructBooth (section 2.1).

    L_P = E ‖ε - ε_θ(z_t, t, c)‖² + λ E ‖ε' - ε_θ(z^pr_t', t', c_pr)‖²

The whole U-Net is trained, the text encoder is frozen. Each step runs the instance and the class half through the
network as one batch. The learning rate is constant, t uniform over all timesteps, the target ε, as in the recipe below.

Differs from paper: DreamBooth trains Imagen's pixels, this the latents of Stable Diffusion, as InstructBooth does. What
InstructBooth leaves open follows diffusers' `train_dreambooth.py`, from which it differs in these ways:
- latents are the mean of the autoencoder's posterior, encoded once; the recipe samples the posterior at every step;
- pictures of both halves are drawn with replacement; the recipe goes through them in shuffled epochs;
- photos are cropped at the centre; the recipe crops at random unless told otherwise;
- the U-Net stays in evaluation mode, the recipe's is in training mode: the same where it has no dropout, as SD 1.x;
- the learning rate is 2e-5 and β₂ 0.99 (InstructBooth); the recipe's defaults are 5e-6 and 0.999;
- there are 200 class pictures (InstructBooth), by this kit's sampler (`model.sample`); the recipe's default is 100.

Shapes: B pictures of each half, C/H/W latent channels, height, width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ibkit.device import generator
from ibkit.errors import TrainingError
from ibkit.model.text_to_image import TextToImage
from ibkit.runs import Checkpoints
from ibkit.train.kept import load_optimizer_tensors, memory_advice, optimizer_tensors, part


@dataclass(frozen=True)
class DreamBoothConfig:
    """Settings; the defaults are InstructBooth's (appendix C), or where it is silent diffusers' example.

    Attributes:
        n_steps: 800 (diffusers' recipe with prior preservation; InstructBooth does not give it).
        batch: subject pictures a step, and as many class pictures: 1 + 1 (InstructBooth).
        learning_rate: 2e-5; betas: (0.9, 0.99); weight_decay: 0.01 (InstructBooth).
        prior_weight: λ = 1; n_class_images: 200 (InstructBooth).
        max_grad_norm: 1 (diffusers' recipe).
        ema_decay: of an exponential moving average of the weights over the steps, which is the result of the training;
            it evens out single steps. 0 = the last weights (DreamBooth).
        checkpoint_every: steps between checkpoints.
    """

    n_steps: int = 800
    batch: int = 1
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    prior_weight: float = 1.0
    n_class_images: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    checkpoint_every: int = 200


def add_noise(z0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """z_t = √ᾱ z_0 + √(1 - ᾱ) ε (Ho et al. 2020, eq. 4); z0, noise (B, C, H, W), alpha_bar (B,)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def prior_preservation_loss(
    eps_hat: torch.Tensor, noise: torch.Tensor, prior_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L_P of a batch whose first half is the subject and whose second half is the class.

    Args:
        eps_hat, noise: (2B, C, H, W); with prior_weight 0, (B, C, H, W) of the subject alone.

    Returns:
        (loss, instance term, prior term), scalars.
    """
    error = (eps_hat - noise).square().mean(dim=(1, 2, 3))
    if prior_weight == 0:
        return error.mean(), error.mean(), error.new_zeros(())
    instance, prior = (half.mean() for half in error.chunk(2))
    return instance + prior_weight * prior, instance, prior


def train(
    model: TextToImage,
    photos: Sequence[Image.Image],
    prompt: str,
    class_prompt: str,
    class_pictures: Sequence[Image.Image],
    config: DreamBoothConfig,
    folder: Path,
    seed: int = 0,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Personalize `model` in place and return one row a step: step, loss, loss_instance, loss_prior, seconds.

    Args:
        photos: of the subject, at the model's size.
        prompt: "a [identifier] [description] [class noun]".
        class_prompt: "a [class noun]".
        class_pictures: by the base model, see `class_images`; empty with prior_weight 0.
        folder: for checkpoints; training continues from the newest one there, on the same random streams.

    Raises:
        TrainingError: a non-finite loss, or memory does not suffice.
    """
    with_prior = config.prior_weight > 0
    alphas = model.alphas_cumprod.float().to(model.device)
    latents = model.encode_images(photos)
    prior_latents = model.encode_images(class_pictures) if with_prior else None
    prompts = [prompt] * config.batch + [class_prompt] * config.batch * with_prior
    model.unet.requires_grad_(True)
    parameters = list(model.unet.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,  # one kernel for the whole step; on the CPU 4 times as fast, with losses equal to 1e-6
    )
    average = [p.detach().clone() for p in parameters] if config.ema_decay else []
    history: list[dict[str, float]] = []
    checkpoints = Checkpoints(folder / "checkpoints")
    if (found := checkpoints.latest()) is not None:
        _, tensors, state = found
        model.unet.load_state_dict(part(tensors, "unet"))
        load_optimizer_tensors(optimizer, tensors)
        for i, kept in part(tensors, "average").items():
            average[int(i)].copy_(kept)
        history = state["history"]

    for step in range(len(history), config.n_steps):
        started = time.perf_counter()
        stream = generator(seed, "dreambooth", step)
        z0 = latents[torch.randint(len(latents), (config.batch,), generator=stream)]
        if with_prior:
            z0 = torch.cat([z0, prior_latents[torch.randint(len(prior_latents), (config.batch,), generator=stream)]])
        t = torch.randint(len(alphas), (len(z0),), generator=stream).to(model.device)
        noise = torch.randn(z0.shape, generator=stream).to(model.device)
        with memory_advice(f"lower batch_size (now {config.batch}) or use smaller pictures"):
            eps_hat = model.predict_noise(add_noise(z0, noise, alphas[t]), t, prompts)
            loss, instance, prior = prior_preservation_loss(eps_hat, noise, config.prior_weight)
            loss.backward()
        terms = torch.stack([loss, instance, prior]).tolist()  # waits for the GPU once
        if not math.isfinite(terms[0]):
            raise TrainingError(
                f"step {step}: the loss is {terms[0]}; lower the learning rate ({config.learning_rate:g})."
            )
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            decay = min(config.ema_decay, (step + 1) / (step + 11))  # the first weights are soon forgotten
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        row = {"step": step, **dict(zip(("loss", "loss_instance", "loss_prior"), terms, strict=True))}
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.n_steps:
            tensors = {f"unet.{k}": v.cpu() for k, v in model.unet.state_dict().items()} | optimizer_tensors(optimizer)
            tensors |= {f"average.{i}": kept.cpu() for i, kept in enumerate(average)}
            checkpoints.save(step + 1, tensors, {"history": history})
        if on_step:
            on_step(row)
    model.unet.requires_grad_(False)
    if average:
        torch._foreach_copy_(parameters, average)
    return history
