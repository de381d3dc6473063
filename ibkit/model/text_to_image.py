"""A text-to-image model as the methods see it: predict noise, encode text and pictures, decode latents.

One class serves the pocket model and Stable Diffusion: both are folders in diffusers format.

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
from safetensors import SafetensorError

from ibkit.device import park, working
from ibkit.errors import ModelError, ParameterError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, ModelMixin, UNet2DConditionModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POCKET_PIPELINE = Path(__file__).parents[1] / "pocket" / "weights" / "pipeline"
HUB_NAMES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
OTHER_PARTS_OF_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")  # read by no method


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
            with working(self.text_encoder), torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                known[prompt] = self.text_encoder(ids.to(self.device)).last_hidden_state[0].float()
        return torch.stack([known[p] for p in prompts])

    def predict_noise(self, x_t: torch.Tensor, t: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """ε̂ (B, C, H, W) fp32 from noisy latents (B, C, H, W), timesteps (B,) and a prompt for each row.

        It takes prompts as text, so that a method may train the text encoder.
        """
        text = self.encode_text(prompts)
        autocast = torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
        with working(self.unet), autocast:
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
        """Scaled latents (B, C, H, W) of pictures, `pictures_at_once`.

        With a generator a sample of the posterior, else its mean.
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
                pixels = ((self.decode_pixels(part) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                images += [Image.fromarray(p) for p in pixels]
        return images

    def park(self) -> None:
        """Keep it off the GPU but while it works; see `ibkit.device.park`."""
        park(self.unet, self.vae, self.text_encoder)

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
    """Default batch size to draw pictures: fits a laptop at 64 px, 8 GiB of GPU memory at 512."""
    return 32 if image_px <= 128 else 4


def pictures_at_once(image_px: int) -> int:
    """How many the autoencoder takes at a time: at 512 px one picture takes 0.8 GiB, and keeps a GPU busy."""
    return 32 if image_px <= 128 else 1


def load_model(model: str = "pocket", revision: str = "", device: torch.device | str = "cpu") -> TextToImage:
    """Load a text-to-image model for sampling and training, all weights fp32.

    Args:
        model: "pocket", "sd15" (from the hub), or a local folder in diffusers format.
        revision: of the hub's repository; empty = its main branch.

    Raises:
        ModelError: no such folder, a damaged one, weights that do not fit their config or are not finite, or the hub
            cannot be reached and nothing is cached; or a large model on a GPU without bf16.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    device = torch.device(device)
    local = model not in HUB_NAMES
    source = HUB_NAMES.get(model) or str(POCKET_PIPELINE if model == "pocket" else Path(model).expanduser())
    if local and not (Path(source) / "model_index.json").is_file():
        raise ModelError(
            f"model {model!r}: {source} is not a folder in diffusers format (it "
            f"has no model_index.json); give 'pocket', 'sd15' or such a folder."
        )
    fp32 = torch.float32
    options = {"revision": revision or None} if not local else {}
    try:
        unet = load_weights(UNet2DConditionModel, source, "unet", torch_dtype=fp32, **options)
        vae = load_weights(AutoencoderKL, source, "vae", torch_dtype=fp32, **options)
        text_encoder = load_weights(CLIPTextModel, source, "text_encoder", dtype=fp32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer", **options)
        scheduler = DDIMScheduler.from_pretrained(source, subfolder="scheduler", clip_sample=False, **options)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        if local:
            raise ModelError(f"model {model!r}: a part of {source} cannot be read: {first}") from error
        raise ModelError(
            f"model {model!r}: {source} is neither in the hub's cache nor can it be downloaded now "
            f"({first}); go online once, or give a local diffusers-format folder as the model."
        ) from error
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise ModelError(
            f"model {model!r}: the tokenizer has {len(tokenizer)} tokens and the text "
            f"encoder {text_encoder.config.vocab_size}: its files are incomplete."
        )
    if scheduler.config.prediction_type != "epsilon":
        raise ModelError(
            f"model {model!r} predicts {scheduler.config.prediction_type}; ibkit's "
            f"methods are written for noise prediction (epsilon), as in SD 1.x."
        )
    autocast = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else None
    if device.type == "cuda" and not autocast and unet.config.sample_size > 16:
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} has no bf16, which NVIDIA's GPUs have from Ampere (2020) on, "
            f"and a model of the size of {model!r} is not run without: use such a GPU, or the pocket model."
        )
    for part in (unet, vae, text_encoder):
        part.to(device).eval().requires_grad_(False)
    use_quick_attention(unet, device)
    return TextToImage(model, unet, vae, text_encoder, tokenizer, scheduler, device, autocast)


def load_weights(
    architecture: type[ModelMixin] | type[PreTrainedModel], source: str, part: str, **options
) -> torch.nn.Module:
    """A part of a diffusers folder, every weight of which comes from its file; `from_pretrained` only logs what does
    not fit and leaves the weights concerned random.

    Raises:
        ModelError: weights are missing, left over, of another shape or not finite, or the file is damaged.
    """
    where = f"the {part} in {source}"
    try:
        module, report = architecture.from_pretrained(
            source, subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise ModelError(f"{where}: its weights file is damaged ({error}): restore it.") from error
    missing = sorted(report["missing_keys"])
    left_over = sorted(key for key in report["unexpected_keys"] if not key.startswith(OTHER_PARTS_OF_CLIP))
    reshaped = sorted(key for key, *_ in report["mismatched_keys"])
    wrapped = next((key for key in left_over if missing and key.endswith(f".{missing[0]}")), "")
    prefix = wrapped.removesuffix(missing[0]) if wrapped else ""
    if prefix and {prefix + key for key in missing} <= set(left_over):
        raise ModelError(
            f"{where}: the names of {len(missing)} weights begin with {prefix!r}, the first {wrapped}: they were saved "
            "inside a wrapper; save the model inside it, or remove that prefix from the names."
        )
    found = {"missing": missing, "not of this model": left_over, "of another shape than its config says": reshaped}
    if not (missing or reshaped):  # else some weights hold no values
        found["not finite"] = [key for key, weight in module.state_dict().items() if not is_finite(weight)]
    if wrong := [f"{len(keys)} {what} (first {keys[0]})" for what, keys in found.items() if keys]:
        raise ModelError(
            f"{where} has weights that cannot be used: {', '.join(wrong)}; restore or download its files "
            "again, or save it again with save_pretrained."
        )
    return module


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are finite; a finite sum proves it five times faster."""
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())


def use_quick_attention(unet: torch.nn.Module, device: torch.device) -> None:
    """Plain attention for small latents on a CPU, where PyTorch's fused kernel is slow backwards: for the pocket U-Net
    a third of a training step. Large latents keep the fused kernel, whose memory does not grow with their square.
    """
    if device.type == "cpu" and unet.config.sample_size <= 16:
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
