"""Sampling pictures from a model, so that the same seed gives every method the same noise.

Differs from paper: InstructBooth gives 50 steps and guidance 7.5, but no kind of sampler and no η; here it is DDIM
with η = 1, the policy that RL trains. Diffusers' `train_dreambooth.py` draws class pictures with the pipeline instead:
- its sampler is the scheduler in the model's folder (PNDM for SD 1.5), and its η, where it has one, is 0;
- it draws a batch's noise from the device's global generator; here each picture has a generator of its own, on the CPU.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ibkit.device import generator, working
from ibkit.errors import ModelError, ParameterError
from ibkit.fields import checked, field, fields_of
from ibkit.model.ddim import Schedule, check_spacing, log_prob, make_schedule, step_mean
from ibkit.model.text_to_image import TextToImage, default_batch


@dataclass(frozen=True)
class Sampler:
    """Settings of the DDIM sampler."""

    n_steps: int = field(50, "denoising steps of a picture", "InstructBooth", low=1, high=1000)
    guidance: float = field(7.5, "classifier-free guidance scale; 1 = without", "InstructBooth", low=0.0, high=50.0)
    eta: float = field(1.0, "DDIM's η: 0 deterministic, 1 as DDPO samples", "DDPO", low=0.0, high=1.0)

    def __post_init__(self):
        checked(fields_of(Sampler), vars(self), "The sampler", "setting")
        check_spacing(self.n_steps)  # before hours of a job that would end there

    def schedule(self, model: TextToImage) -> Schedule:
        offset = model.scheduler.config.steps_offset
        return make_schedule(model.alphas_cumprod, self.n_steps, self.eta, offset, model.device)

    @property
    def rows(self) -> int:
        """Rows of the U-Net's passes that a picture takes; guidance makes two of a step."""
        return self.n_steps * self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        return 1 if self.guidance == 1 else 2

    def __str__(self) -> str:
        return f"DDIM, {self.n_steps} steps, guidance {self.guidance:g}, eta {self.eta:g}"


@dataclass(frozen=True)
class Step:
    """One denoising step of B pictures, from x_t to x_prev; the last x_prev are the pictures' latents.

    Attributes:
        t: (B,); x_t, eps_hat, mean, x_prev: (B, C, H, W) fp32.
        std: s, a scalar; log_prob: (B,), NaN for a step without noise, which has no density.
    """

    t: torch.Tensor
    x_t: torch.Tensor
    eps_hat: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    x_prev: torch.Tensor

    @property
    def log_prob(self) -> torch.Tensor:
        if self.std > 0:
            return log_prob(self.x_prev, self.mean, self.std)
        return torch.full((len(self.x_prev),), torch.nan, device=self.x_prev.device)


def denoise(
    model: TextToImage,
    prompts: Sequence[str],
    schedule: Schedule,
    guidance: float,
    generators: Sequence[torch.Generator],
) -> Iterator[Step]:
    """Walk from noise to latents, step by step; the one walk that sampling, RL, its self-check and notebooks use.

    Args:
        generators: one a picture, on the CPU; it draws the initial noise and each step's, so a picture depends on its
            own stream alone, whatever batch it is in.
    """

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators]).to(model.device)

    x = noise()
    with working(model.unet):
        for i in range(len(schedule)):
            t, std = schedule.timesteps[i].expand(len(x)), schedule.std[i]
            eps_hat = model.guided_noise(x, t, prompts, guidance)
            mean = step_mean(x, eps_hat, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], std)
            x_prev = mean + std * noise() if std > 0 else mean
            yield Step(t, x, eps_hat, mean, std, x_prev)
            x = x_prev


def check_prompts(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse what makes no picture.

    Raises:
        ParameterError: no prompt, one that is no text, a text in place of a list, other seeds than whole numbers, or
            another number of them.
    """
    if isinstance(prompts, str):
        raise ParameterError(f"prompts is the text {prompts!r}: give a list of texts, such as [{prompts!r}].")
    if not len(prompts):
        raise ParameterError("there are no prompts to draw: give a list of one or more.")
    if strange := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ParameterError(f"the prompt {strange[0]!r} is no text: give a list of texts.")
    if not isinstance(seeds, Collection) or not all(isinstance(seed, int | np.integer) for seed in seeds):
        raise ParameterError(f"seeds is {seeds!r}: give a list of whole numbers, one a prompt, such as [0].")
    if len(prompts) != len(seeds):
        raise ParameterError(f"there are {len(prompts)} prompts and {len(seeds)} seeds: give one seed a prompt.")


@torch.no_grad()
def sample_latents(
    model: TextToImage,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    batch_size: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Latents (B, C, H, W) of one picture for each prompt.

    Args:
        seeds: one a picture; the noise depends on the seed alone, not on prompt, batch or model.
        batch_size: pictures in a forward pass (twice as many rows with guidance); 0 = what suits their size.
        on_batch: called with the number of pictures done, for progress.
    """
    check_prompts(prompts, seeds)
    schedule = sampler.schedule(model)
    batch_size = batch_size or default_batch(model.image_px)
    parts = []
    for first in range(0, len(prompts), batch_size):
        generators = [generator(seed, "sample") for seed in seeds[first : first + batch_size]]
        for step in denoise(model, prompts[first : first + batch_size], schedule, sampler.guidance, generators):
            x_prev = step.x_prev
        if not bool(x_prev.isfinite().all()):
            raise ModelError(
                f"{model.name} draws latents that are not finite numbers, first for {prompts[first]!r} or one of the "
                f"{len(x_prev) - 1} after it: its weights are damaged or its training went astray; restore the model, "
                "or train again with a lower learning rate."
            )
        parts.append(x_prev)
        on_batch(min(first + batch_size, len(prompts)))
    return torch.cat(parts)


def sample(
    model: TextToImage,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    batch_size: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """Pictures, one for each prompt and seed; see `sample_latents`."""
    return model.decode(sample_latents(model, prompts, seeds, sampler, batch_size, on_batch))
