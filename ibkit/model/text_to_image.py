"""A text-to-image model as the methods see it: predict noise, encode text and pictures, decode latents.

One class serves the pocket model and Stable Diffusion; `ibkit.model.loading` makes it of their files.

Shapes: B batch, L text tokens, D text width, C/H/W latent channels, height, width.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ibkit.device import park, working
from ibkit.errors import ModelError, ParameterError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import PreTrainedTokenizerBase

    from ibkit.model.mapper import MappedText


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
        mapped: a learned word whose text depends on step and layer; see `ibkit.model.mapper`.
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
    mapped: MappedText | None = None
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

    def spelled_out(self, prompt: str) -> str:
        """A prompt whose learned words of several vectors are followed by the others, "<sks> <sks>_1", as diffusers'
        pipelines do it."""
        known = self.tokenizer.get_added_vocab()
        for word in known:
            others = itertools.takewhile(known.__contains__, (f"{word}_{i}" for i in itertools.count(1)))
            prompt = prompt.replace(word, " ".join([word, *others]))
        return prompt

    def token_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt without the start and end marks."""
        return self.tokenizer(self.spelled_out(prompt), add_special_tokens=False, verbose=False)["input_ids"]

    def check_prompt(self, prompt: str) -> str:
        """Refuse (ParameterError) an empty prompt, and one that the text encoder would cut off silently."""
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

        Those of frozen weights are cached and have no gradient. Others are encoded anew, with gradient: all prompts
        where the encoder itself is trained, those that have a learned word where only its rows are.
        """
        trained = {n.rpartition(".")[2] for n, p in self.text_encoder.named_parameters() if p.requires_grad}
        new = {p: self.padded_ids(p) for p in dict.fromkeys(prompts) if trained or p not in self._embeddings}
        moving = new if trained else {}
        if trained == {"rows"}:
            table = self.text_encoder.config.vocab_size
            moving = {p: ids for p, ids in new.items() if max(self.token_ids(p), default=0) >= table}
        with torch.no_grad():
            fixed = [p for p in new if p not in moving and p not in self._embeddings]
            self._embeddings |= {p: self._hidden_states(new[p])[0] for p in fixed}
        states = self._embeddings
        if moving:
            states = states | dict(zip(moving, self._hidden_states(torch.cat([*moving.values()])), strict=True))
        return torch.stack([states[p] for p in prompts])

    def _hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        with working(self.text_encoder):
            return self.text_encoder(ids).last_hidden_state.float()

    def padded_ids(self, prompt: str) -> torch.Tensor:
        """Token ids of a prompt with start, end and padding, (1, L)."""
        if prompt:
            self.check_prompt(prompt)
        text, length = self.spelled_out(prompt), self.tokenizer.model_max_length
        encoded = self.tokenizer(text, padding="max_length", max_length=length, return_tensors="pt")
        return encoded["input_ids"].to(self.device)

    def forget_text(self) -> None:
        """Encode all prompts anew: the text encoder has changed."""
        self._embeddings.clear()
        if self.mapped:
            self.mapped.forget()

    def parts(self) -> dict[str, torch.nn.Module]:
        """All that has weights, by name."""
        mapper = {"mapper": self.mapped.mapper} if self.mapped else {}
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder, **mapper}

    def predict_noise(self, x_t: torch.Tensor, t: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """ε̂ (B, C, H, W) fp32 from noisy latents (B, C, H, W), timesteps (B,) and a prompt for each row.

        It takes prompts as text, so that a method may train the text encoder.
        """
        text = self.encode_text(prompts)
        mapped = self.mapped.read(self, t, prompts, text) if self.mapped else nullcontext()
        autocast = torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
        with working(self.unet), mapped, autocast:
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
        """Scaled latents (B, C, H, W) of pictures, `pictures_at_once`: with a generator a sample of the posterior, else
        its mean.
        """
        pixels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images])
        parts = pixels.split(pictures_at_once(self.image_px))
        with working(self.vae):
            posteriors = [self.vae.encode(part.to(self.device).float() / 127.5 - 1).latent_dist for part in parts]
        z = torch.cat([posterior.mean for posterior in posteriors])
        if generator is not None:  # drawn at once: the noise does not depend on the batches
            std = torch.cat([posterior.std for posterior in posteriors])
            z = z + std * torch.randn(z.shape, generator=generator).to(z)
        return z * self.vae.config.scaling_factor

    def decode_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) in [-1, 1], fp32, of scaled latents (B, C, H, W), with their gradient."""
        with working(self.vae):
            pixels = self.vae.decode(latents.to(self.device) / self.vae.config.scaling_factor).sample
        return pixels.float().clamp(-1, 1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (B, C, H, W), decoded `pictures_at_once`."""
        images = []
        with working(self.vae):
            for part in latents.split(pictures_at_once(self.image_px)):
                decoded = self.decode_pixels(part)
                if not bool(decoded.isfinite().all()):  # they would be shown black
                    raise ModelError(
                        f"the autoencoder of {self.name} gives pixels that are not finite numbers: its weights or the "
                        "latents are damaged; restore the model."
                    )
                images += to_pictures(decoded)
        return images

    def park(self) -> None:
        """Keep it off the GPU but while it works; see `ibkit.device.park`."""
        park(*self.parts().values())

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


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Pictures of pixels (B, 3, height, width) in [-1, 1]."""
    rounded = ((pixels.detach() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in rounded]


def model_fingerprint(model: TextToImage) -> str:
    """SHA-256 of the weights that decide a picture, as hex: the same on every device, with any number of threads."""
    digest = hashlib.sha256()
    for name, part in model.parts().items():
        for key, weight in part.state_dict().items():
            digest.update(f"{name}.{key} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def default_batch(image_px: int) -> int:
    """Default batch size to draw pictures: fits a laptop at 64 px, 8 GiB of GPU memory at 512."""
    return 32 if image_px <= 128 else 4


def pictures_at_once(image_px: int) -> int:
    """How many the autoencoder takes at a time: at 512 px one picture takes 0.8 GiB, and keeps a GPU busy."""
    return 32 if image_px <= 128 else 1


def use_quick_attention(unet: torch.nn.Module, device: torch.device) -> None:
    """Plain attention for small latents on a CPU, where PyTorch's fused kernel is slow backwards: for the pocket U-Net
    a third of a training step. Large latents keep the fused kernel, whose memory does not grow with their square.
    """
    if device.type == "cpu" and unet.config.sample_size <= 16:
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
