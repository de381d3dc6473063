"""Networks that embed pictures and texts into one space, and the scorers that compare their embeddings.

Shapes: N pictures or texts, R reference photos, B batch, H/W pixels, L text tokens, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from ibkit.scorers import base
from ibkit.scorers.base import Scorer, load_transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Encoder(ABC):
    """A network that embeds pictures and texts, with its own preprocessing.

    Attributes:
        batch_size: Pictures or texts a forward pass.
        evaluator: Model and preprocessing in words.
    """

    model: nn.Module
    device: str | torch.device
    batch_size: int
    evaluator: str

    @abstractmethod
    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A picture as network input (3, H, W)."""

    @abstractmethod
    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Network input (B, 3, H, W) -> features (B, D)."""

    @abstractmethod
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """B texts -> features (B, D); a text over the model's context is cut, and named in a warning."""

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, D) of unit length, on `device`."""

        def features(batch: Sequence[Image.Image]) -> torch.Tensor:
            return self.image_features(torch.stack([self.pixels(image) for image in batch]).to(self.device))

        return base.embed(images, features, self.batch_size)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: (N, D) of unit length, on `device`; each distinct text is encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        embedded = base.embed(list(rows), lambda batch: self.text_features(list(batch)), self.batch_size)
        return embedded[[rows[text] for text in texts]]


class TransformersEncoder(Encoder):
    """A model of transformers' that embeds both, such as `CLIPModel`.

    Args:
        model: with `get_image_features` and `get_text_features`.
        tokenizer: its own.
        evaluator: Model in words; without it, `label`.
    """

    label: str  # in messages
    batch_size = 32

    def __init__(self, model: nn.Module, tokenizer, device: str | torch.device = "cpu", evaluator: str = "") -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.context, preprocessing = self._configure(model.config)
        self.evaluator = f"{evaluator or self.label}; {preprocessing}"
        self._warn_truncated = base.truncation_warning(self.label, self.context)

    @abstractmethod
    def _configure(self, config) -> tuple[int, str]:
        """Take what `pixels` needs from the model's config; how many tokens of a text are read, special tokens
        included, and the preprocessing in words.
        """

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def text_features(self, texts: list[str]) -> torch.Tensor:
        tokens = base.tokenize(self.tokenizer, texts, self.context, self._warn_truncated).to(self.device)
        return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output


def load_with_tokenizer(
    metric: str,
    architecture: type[PreTrainedModel],
    repository: str,
    weights: str | Path,
    subfolder: str,
    tokenizer_from: str = "",
) -> tuple[nn.Module, Any, str]:
    """A model of transformers', its tokenizer, and where both are from, in words for an evaluator.

    Args:
        repository: of the `"official"` weights.
        weights: `"official"`, or a local weights folder, whose `subfolder` holds both.
        tokenizer_from: the official tokenizer's repository where it is another one.

    Raises:
        ModelError: The weights or tokenizer are missing, damaged, or do not fit the model.
    """
    from transformers import AutoTokenizer

    place: str | Path
    if str(weights) == "official":
        place = tokenizer_from or repository
        with base.from_hub(metric, repository):
            model = load_transformer(metric, architecture, repository)
        with base.from_hub(metric, place, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(place)
        other = f", tokenizer {base.hub_name(place, 'tokenizer_config.json')}" if tokenizer_from else ""
        origin = f"({base.hub_name(repository)}{other})"
    else:
        files = ("config.json", "model.safetensors", "tokenizer_config.json")
        place = folder = base.weights_folder(metric, weights, subfolder, *files)
        with base.reading(metric, "model", folder):
            model = load_transformer(metric, architecture, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        origin = f"in {folder.parent.name}"
    base.check_vocabulary(metric, place, len(tokenizer), model.config.text_config.vocab_size)
    return model, tokenizer, origin


class OnEncoder(Scorer):
    """A scorer that compares the embeddings of an encoder; several scorers can share one."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.evaluator = encoder.evaluator
        self._references = base.ReferenceCache(encoder.images)

    def _score(self, images, texts, references):
        pictures = self.encoder.images(images)
        return self._text(pictures, texts) if "text" in self.needs else self._subject(pictures, references)

    def _text(self, pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Cosine of each embedded picture (N, D) with its text, (N,)."""
        return (pictures * self.encoder.texts(texts)).sum(dim=1)

    def _subject(self, pictures: torch.Tensor, references: list[Image.Image]) -> torch.Tensor:
        """Mean cosine of each embedded picture (N, D) with all reference photos, (N,)."""
        return base.mean_cosine(pictures, self._references(references))
