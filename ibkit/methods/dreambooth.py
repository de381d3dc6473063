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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from ibkit.adapt import attach, freeze
from ibkit.device import generator
from ibkit.fields import field
from ibkit.methods.engine import photos as engine
from ibkit.methods.engine.photos import Examples, PhotoConfig, fit
from ibkit.methods.records import Method, Work, delta_of
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import hash_json
from ibkit.train.loop import hash_pictures, settings_origin

MAY_CHANGE = (*engine.MAY_CHANGE, "n_class_images")  # the pictures have a hash


@dataclass(frozen=True)
class DreamBoothConfig(PhotoConfig):
    """Settings; the defaults are InstructBooth's (appendix C), or where it is silent those of diffusers' recipe."""

    n_steps: int = field(800, "training steps", "diffusers' recipe; InstructBooth is silent", low=1, high=1_000_000)
    batch: int = field(1, "photos in a step, and as many class pictures", "InstructBooth: 1 + 1", low=1, high=1024)
    learning_rate: float = field(2e-5, "of AdamW, constant", "InstructBooth", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.99), "of AdamW", "InstructBooth", low=0.0, high=1.0)
    weight_decay: float = field(0.01, "of AdamW", "InstructBooth", low=0.0, high=1.0)
    max_grad_norm: float = field(1.0, "gradients are clipped to this norm; 0 = not", "diffusers' recipe", low=0.0)
    prior_weight: float = field(1.0, "λ of prior preservation; 0 = without it", "InstructBooth", low=0.0, high=100.0)
    n_class_images: int = field(200, "class pictures for it", "InstructBooth", low=1, high=100_000)


def prior_preservation_loss(
    eps_hat: torch.Tensor, noise: torch.Tensor, prior_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L_P of a batch whose first half is the subject and whose second half is the class, its instance and prior term;
    scalars.

    Args:
        eps_hat, noise: (2B, C, H, W); with prior_weight 0, (B, C, H, W) of the subject alone.
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
    name: str = "dreambooth",
    kind: str = "unet",
    kind_settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[dict[str, float]]:
    """Personalize `model` in place and return one row a step: step, loss, loss_instance, loss_prior, seconds.

    Args:
        photos: of the subject, at the model's size.
        prompt: `a [identifier] [description] [class noun]`.
        class_prompt: "a [class noun]".
        class_pictures: by the base model, see `class_images`; empty with prior_weight 0.
        folder: for checkpoints; training continues from the newest one there, on the same random streams.
        name, kind, kind_settings: of the delta that is trained, see `ibkit.adapt`; by default all weights of the U-Net.

    Raises:
        TrainingError, ArtifactError: see `engine.photos.fit`.
    """
    with_prior = config.prior_weight > 0
    latents = model.encode_images(photos)
    prior_latents = model.encode_images(class_pictures) if with_prior else None
    prompts = [prompt] * config.batch + [class_prompt] * config.batch * with_prior
    origin = settings_origin(config, MAY_CHANGE) | {"model": model_fingerprint(model), "seed": str(seed)}
    origin |= {"prompts": hash_json([prompt, class_prompt]), "photos": hash_pictures(photos)}
    origin["class pictures"] = hash_pictures(class_pictures if with_prior else [])
    weights = attach(model, kind, name, kind_settings, generator(seed, name))

    def draw(stream: torch.Generator) -> Examples:
        z_0 = latents[torch.randint(len(latents), (config.batch,), generator=stream)]
        if prior_latents is not None:
            z_0 = torch.cat([z_0, prior_latents[torch.randint(len(prior_latents), (config.batch,), generator=stream)]])
        return Examples(z_0, prompts)

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        terms = prior_preservation_loss(eps_hat, noise, config.prior_weight)
        return dict(zip(("loss", "loss_instance", "loss_prior"), terms, strict=True))

    history = fit(model, weights, draw, loss, config, folder, origin, (seed, "dreambooth"), on_step)
    freeze(model)
    return history


def personalize(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """DreamBooth as a stage, of the U-Net or, where the settings have a rank, of an adapter; see `records.Train`."""
    words = job.subject.instance_prompt, job.subject.class_prompt
    on_step = (lambda row: on_row(row, model)) if on_row else None
    kind, of_kind = delta_of(settings)
    return train(
        model, job.photos, *words, job.class_pictures, settings, job.folder, job.seed, on_step, job.name, kind, of_kind
    )


def class_pictures(settings: DreamBoothConfig) -> int:
    """How many pictures of the class are needed."""
    return settings.n_class_images if settings.prior_weight else 0


def work(settings: DreamBoothConfig, kind: str = "") -> Work:
    """Rows of both halves of a step's batch; `kind` of the delta where it is not the settings'."""
    kinds = 2 if settings.prior_weight else 1
    rows = settings.n_steps * settings.batch * kinds
    graph_rows = kinds * min(settings.micro_batch or settings.batch, settings.batch)
    return Work.of(kind or delta_of(settings)[0], rows, graph_rows=graph_rows)


METHOD = Method(
    name="dreambooth",
    label="DreamBooth",
    stage="personalize",
    settings=DreamBoothConfig,
    train=personalize,
    source="Ruiz et al. 2023, arXiv 2208.12242",
    pocket={
        "n_steps": (800, "the trade of text against subject, by benchmarks/personalize.py"),
        "batch": (4, "64 px pictures: four cost little more than one"),
        "learning_rate": (5e-4, "a U-Net of 6 M weights takes larger steps than one of 860 M"),
        "prior_weight": (0.3, "at 1 the subject comes with the bare prompt alone, and an activity drives it out"),
        "ema_decay": (0.98, "single steps of this size smear the pictures"),
        "n_class_images": (64, "minutes"),
        "checkpoint_every": (150, "minutes"),
    },
    class_pictures=class_pictures,
    work=work,
)
