"""A text-to-image model as the methods see it: predict noise, encode text and pictures, decode latents.

One class serves the pocket model and Stable Diffusion; `ibkit.model.loading` makes it of their files.

Shapes: B batch, L text tokens, D text width, C/H/W latent channels, height, width.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ibkit.errors import ParameterError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Attached:
    """A delta attached to a model: its kind, a key of `ibkit.adapt.KINDS`, and the kind's settings, such as a rank."""

    kind: str
    settings: Mapping[str, Any]


@dataclass
class TextToImage:
    """A diffusion model with everything that sampling and training need.

    Attributes:
        name: "pocket", "sd15" or the folder, for messages and manifests.
        autocast: dtype of the U-Net's forward pass on a GPU (bf16); None computes in fp32. Weights and latents are
            fp32 either way.
        deltas: attached to the model, by name, lowest first; see `ibkit.adapt`.
    """

    name: str
    unet: UNet2DConditionModel
    vae: torch.nn.Module
    text_encoder: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    scheduler: DDIMScheduler
    device: torch.device
    autocast: torch.dtype | None = None
    deltas: dict[str, Attached] = field(default_factory=dict)
    _embeddings: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ_t, (1000,) fp64 on the CPU."""
        return self.scheduler.alphas_cumprod.double()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    @property
    def image_px(self) -> int:
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def token_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt without the start and end marks."""
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def check_prompt(self, prompt: str) -> str:
        """Refuse a prompt that the text encoder would cut off silently.

        Raises:
            ParameterError: empty, or more tokens than fit.
        """
        if not prompt.strip():
            raise ParameterError("a prompt is empty: write what the picture should show.")
        room, n = self.tokenizer.model_max_length - 2, len(self.token_ids(prompt))
        if n > room:
            raise ParameterError(
                f"the prompt {prompt!r} has {n} tokens and {self.name} reads {room}: shorten it by {n - room}."
            )
        return prompt

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text encoder's hidden states (B, L, D), fp32; each distinct prompt is encoded once.

        A frozen encoder's are cached and have no gradient. An encoder in training encodes anew, with gradient.
        """
        trained = any(parameter.requires_grad for parameter in self.text_encoder.parameters())
        known = {} if trained else self._embeddings
        for prompt in dict.fromkeys(p for p in prompts if p not in known):
            if prompt:
                self.check_prompt(prompt)
            ids = self.tokenizer(
                prompt, padding="max_length", max_length=self.tokenizer.model_max_length, return_tensors="pt"
            )["input_ids"]
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                known[prompt] = self.text_encoder(ids.to(self.device)).last_hidden_state[0].float()
        return torch.stack([known[p] for p in prompts])

    def predict_noise(self, x_t: torch.Tensor, t: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """ε̂ (B, C, H, W) fp32 from noisy latents (B, C, H, W), timesteps (B,) and a prompt for each row.

        It takes prompts as text, so that a method may train the text encoder.
        """
        text = self.encode_text(prompts)
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            eps_hat = self.unet(x_t, t, encoder_hidden_states=text).sample
        return eps_hat.float()

    def guided_noise(self, x_t: torch.Tensor, t: torch.Tensor, prompts: Sequence[str], guidance: float) -> torch.Tensor:
        """Classifier-free guidance, both halves in one forward pass (Ho & Salimans 2022, eq. 6)."""
        if guidance == 1.0:
            return self.predict_noise(x_t, t, prompts)
        both = [""] * len(prompts) + list(prompts)
        without, with_text = self.predict_noise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + guidance * (with_text - without)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], generator: torch.Generator | None = None) -> torch.Tensor:
        """Scaled latents (B, C, H, W) of pictures, in batches of `default_batch`.

        With a generator a sample of the posterior, else its mean.
        """
        pixels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images])
        parts = pixels.split(default_batch(self.image_px))
        posteriors = [self.vae.encode(part.to(self.device).float() / 127.5 - 1).latent_dist for part in parts]
        z = torch.cat([posterior.mean for posterior in posteriors])
        if generator is not None:  # drawn at once: the noise does not depend on the batches
            std = torch.cat([posterior.std for posterior in posteriors])
            z = z + std * torch.randn(z.shape, generator=generator).to(z)
        return z * self.vae.config.scaling_factor

    def decode_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) in [-1, 1], fp32, of scaled latents (B, C, H, W), with their gradient."""
        return self.vae.decode(latents.to(self.device) / self.vae.config.scaling_factor).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (B, C, H, W), in batches of `default_batch`."""
        images = []
        for part in latents.split(default_batch(self.image_px)):
            pixels = ((self.decode_pixels(part) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            images += [Image.fromarray(p) for p in pixels]
        return images

    def save_pipeline(self, folder: str | Path) -> None:
        """Write the model as a diffusers pipeline folder that `StableDiffusionPipeline.from_pretrained` loads."""
        from diffusers import StableDiffusionPipeline

        StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    def copy(self) -> TextToImage:
        """A model with a U-Net of its own; frozen parts are shared."""
        return dataclasses.replace(self, unet=copy.deepcopy(self.unet), deltas=dict(self.deltas), _embeddings={})


def model_fingerprint(model: TextToImage) -> str:
    """SHA-256 of the weights that decide a picture, as hex: the same on every device, with any number of threads."""
    digest = hashlib.sha256()
    for name in ("unet", "vae", "text_encoder"):
        for key, weight in getattr(model, name).state_dict().items():
            digest.update(f"{name}.{key} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def default_batch(image_px: int) -> int:
    """Default batch size to draw, encode or decode pictures: fits a laptop at 64 px, 12 GiB of GPU memory at 512."""
    return 32 if image_px <= 128 else 4


def use_quick_attention(unet: torch.nn.Module, device: torch.device) -> None:
    """Plain attention for small latents on a CPU, where PyTorch's fused kernel is slow backwards: for the pocket U-Net
    a third of a training step. Large latents keep the fused kernel, whose memory does not grow with their square.
    """
    if device.type == "cpu" and unet.config.sample_size <= 16:
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
