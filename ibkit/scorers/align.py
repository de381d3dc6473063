"""ALIGN-T and ALIGN-I: text and subject fidelity by ALIGN (Jia et al. 2021), and their λ-harmonic mean, RPO's reward.

The official model is `kakaobrain/align-base` (EfficientNet-B7 and BERT). A local folder `align/` holds any other ALIGN
in transformers' format with its tokenizer; the pocket weights have none, and their CLIP takes its place.

Shapes: N pictures or texts, R reference photos, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from ibkit.fields import field
from ibkit.scorers.base import (
    ReferenceCache,
    Scorer,
    TruncationWarning,
    batches,
    check_vocabulary,
    embed_texts,
    from_hub,
    hub_name,
    load_transformer,
    mean_cosine,
    reading,
    require_files,
    tokenize,
    weights_folder,
)
from ibkit.scorers.clip import ClipEncoder

OFFICIAL_REPOSITORY = "kakaobrain/align-base"
TEXT_TOKENS = 64
RESIZE_TO_CROP = 346 / 289  # the official preprocessing squashes to 346 px and cuts the central 289


class Encoder(Protocol):
    """What embeds pictures and texts into one space, each (N, D) of unit length."""

    evaluator: str

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor: ...

    def texts(self, texts: Sequence[str]) -> torch.Tensor: ...


class AlignEncoder:
    """An ALIGN model with its own preprocessing.

    Args:
        model: transformers' `AlignModel`.
        tokenizer: its own.
        device: Where the model runs.
        evaluator: Model in words.
        batch_size: Pictures or texts a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        device: str | torch.device = "cpu",
        evaluator: str = "ALIGN",
        batch_size: int = 32,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.crop_px = model.config.vision_config.image_size
        self.resize_px = round(self.crop_px * RESIZE_TO_CROP)
        self.evaluator = f"{evaluator}; squashed to {self.resize_px} px bilinear, centre crop {self.crop_px}"
        self._warn_truncated = TruncationWarning("ALIGN", TEXT_TOKENS)

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, D) of unit length, on `device`."""
        features = []
        for batch in batches(images, self.batch_size):
            pixels = torch.stack([self.pixels(image) for image in batch])
            features.append(self.model.get_image_features(pixels.to(self.device)).pooler_output)
        return normalize(torch.cat(features).float(), dim=-1)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A picture as network input: (3, crop, crop) float32 in [-1, 1]."""
        squashed = image.convert("RGB").resize((self.resize_px, self.resize_px), Image.Resampling.BILINEAR)
        edge = (self.resize_px - self.crop_px) // 2
        cut = np.asarray(squashed.crop((edge, edge, edge + self.crop_px, edge + self.crop_px)))
        return torch.from_numpy((cut - 127.5) / 127.5).permute(2, 0, 1).float()

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: (N, D) of unit length, on `device`; each different text is encoded once."""

        def embed(batch: list[str]) -> torch.Tensor:
            tokens = tokenize(self.tokenizer, batch, TEXT_TOKENS, self._warn_truncated).to(self.device)
            return self.model.get_text_features(**tokens).pooler_output

        return embed_texts(texts, embed, self.batch_size)


def load_encoder(weights: str | Path = "official", device: str | torch.device = "cpu") -> Encoder:
    """Load ALIGN from `"official"` or the `align/` of a local weights folder; for `"pocket"` the pocket CLIP.

    Raises:
        ModelError: The weights are missing, damaged, or do not fit the model, or the tokenizer does not.
    """
    from transformers import AlignModel, AutoTokenizer

    if str(weights) == "pocket":
        return ClipEncoder.load(weights, device)
    if str(weights) == "official":
        with from_hub("ALIGN", OFFICIAL_REPOSITORY):
            model = load_transformer("ALIGN", AlignModel, OFFICIAL_REPOSITORY)
            tokenizer = AutoTokenizer.from_pretrained(OFFICIAL_REPOSITORY)
        where, kind = OFFICIAL_REPOSITORY, f"ALIGN ({hub_name(OFFICIAL_REPOSITORY)})"
    else:
        where = weights_folder("ALIGN", weights, "align")
        require_files("ALIGN", where, "config.json", "model.safetensors", "tokenizer_config.json")
        with reading("ALIGN", "model", where):
            model = load_transformer("ALIGN", AlignModel, where)
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        kind = f"ALIGN in {where.parent.name}"
    check_vocabulary("ALIGN", where, len(tokenizer), model.config.text_config.vocab_size)
    return AlignEncoder(model, tokenizer, device, kind)


class _OnEncoder(Scorer):
    """A scorer of two unit embeddings; cosines are scaled to [0, 1] as (cosine + 1) / 2."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.evaluator = f"{encoder.evaluator}; (cosine + 1) / 2"
        self._references = ReferenceCache(encoder.images)

    @classmethod
    def load(cls, weights: str | Path = "official", device: str | torch.device = "cpu", **options: Any) -> _OnEncoder:
        """Load from `"pocket"`, `"official"` or a local weights folder; see `make_scorer`."""
        return cls(load_encoder(weights, device), **options)

    def _text(self, pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return ((pictures * self.encoder.texts(texts)).sum(dim=1) + 1) / 2

    def _subject(self, pictures: torch.Tensor, references: list[Image.Image]) -> torch.Tensor:
        return (mean_cosine(pictures, self._references(references)) + 1) / 2


class AlignT(_OnEncoder):
    """ALIGN-T: (cosine + 1) / 2 of picture and text; the text is without the identifier.

    Source: RPO (arXiv 2407.12164), T of its reward.
    """

    name = "align_t"
    needs = frozenset({"text"})

    def _score(self, images, texts, references):
        return self._text(self.encoder.images(images), texts)


class AlignI(_OnEncoder):
    """ALIGN-I: (mean cosine with all reference photos + 1) / 2.

    Source: RPO (arXiv 2407.12164), I of its reward.
    """

    name = "align_i"
    needs = frozenset({"references"})

    def _score(self, images, texts, references):
        return self._subject(self.encoder.images(images), references)


@dataclass(frozen=True)
class HarmonicOptions:
    """λ; RPO validates with .3, .5 and .7."""

    weight: float = field(0.5, "λ, the subject's weight: 0 is ALIGN-T alone, 1 is ALIGN-I", "ours", low=0.0, high=1.0)


class Harmonic(_OnEncoder):
    """RPO's λ-harmonic reward 1 / (λ / I + (1 - λ) / T) of ALIGN-I and ALIGN-T, its parts: high only where both are.

    Args:
        encoder: that embeds pictures and texts.
        weight: see `HarmonicOptions`.

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
