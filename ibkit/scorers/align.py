"""ALIGN-T and ALIGN-I: text and subject fidelity by ALIGN (Jia et al. 2021), and their λ-harmonic mean, RPO's reward.

The official model is `kakaobrain/align-base` (EfficientNet-B7 and BERT). A local folder `align/` holds any other ALIGN
in transformers' format with its tokenizer; the pocket weights have none, and their CLIP takes its place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ibkit.fields import field
from ibkit.scorers.clip import ClipEncoder
from ibkit.scorers.encoder import Encoder, OnEncoder, TransformersEncoder, load_with_tokenizer

OFFICIAL_REPOSITORY = "kakaobrain/align-base"
TEXT_TOKENS = 64
RESIZE_TO_CROP = 346 / 289  # the official preprocessing squashes to 346 px and cuts the central 289


class AlignEncoder(TransformersEncoder):
    """transformers' `AlignModel` with its own preprocessing."""

    label = "ALIGN"

    def _configure(self, config) -> tuple[int, str]:
        self.crop_px = config.vision_config.image_size
        self.resize_px = round(self.crop_px * RESIZE_TO_CROP)
        return TEXT_TOKENS, f"squashed to {self.resize_px} px bilinear, centre crop {self.crop_px}"

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load `"official"` or the `align/` of a local weights folder; raises ModelError as `load_with_tokenizer`."""
        from transformers import AlignModel

        model, tokenizer, origin = load_with_tokenizer(cls.label, AlignModel, OFFICIAL_REPOSITORY, weights, "align")
        return cls(model, tokenizer, device, f"ALIGN {origin}")

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A picture as network input: (3, crop, crop) float32 in [-1, 1]."""
        squashed = image.convert("RGB").resize((self.resize_px, self.resize_px), Image.Resampling.BILINEAR)
        edge = (self.resize_px - self.crop_px) // 2
        cut = np.asarray(squashed.crop((edge, edge, edge + self.crop_px, edge + self.crop_px)))
        return torch.from_numpy((cut - 127.5) / 127.5).permute(2, 0, 1).float()


class _OnAlign(OnEncoder):
    """Cosines of ALIGN, scaled to [0, 1] as (cosine + 1) / 2."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.evaluator += "; (cosine + 1) / 2"

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu", **options: Any) -> Self:
        loader = ClipEncoder if str(weights) == "pocket" else AlignEncoder
        return cls(loader.load(weights, device), **options)

    def _text(self, pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return (super()._text(pictures, texts) + 1) / 2

    def _subject(self, pictures: torch.Tensor, references: list[Image.Image]) -> torch.Tensor:
        return (super()._subject(pictures, references) + 1) / 2


class AlignT(_OnAlign):
    """ALIGN-T: (cosine + 1) / 2 of picture and text; the text is without the identifier.

    Source: RPO (arXiv 2407.12164), T of its reward.
    """

    name = "align_t"
    needs = frozenset({"text"})


class AlignI(_OnAlign):
    """ALIGN-I: (mean cosine with all reference photos + 1) / 2.

    Source: RPO (arXiv 2407.12164), I of its reward.
    """

    name = "align_i"
    needs = frozenset({"references"})


@dataclass(frozen=True)
class HarmonicOptions:
    """λ; RPO validates with .3, .5 and .7."""

    weight: float = field(0.5, "λ, the subject's weight: 0 is ALIGN-T alone, 1 is ALIGN-I", "ours", low=0.0, high=1.0)


class Harmonic(_OnAlign):
    """RPO's λ-harmonic reward 1 / (λ / I + (1 - λ) / T) of ALIGN-I and ALIGN-T, its parts: high only where both are.

    Source: RPO (arXiv 2407.12164), equation of the λ-harmonic reward.
    """

    name = "harmonic"
    needs = frozenset({"text", "references"})
    options = HarmonicOptions

    def __init__(self, encoder: Encoder, weight: float = 0.5) -> None:
        super().__init__(encoder)
        self.weight = weight
        self.evaluator += f", λ-harmonic mean, λ = {weight:g}"

    def _score(self, images, texts, references):
        pictures = self.encoder.images(images)
        parts = {"align_i": self._subject(pictures, references), "align_t": self._text(pictures, texts)}
        return 1 / (self.weight / parts["align_i"] + (1 - self.weight) / parts["align_t"]), parts
