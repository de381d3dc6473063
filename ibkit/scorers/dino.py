"""DINO: subject fidelity as the self-supervised ViT-S/16 sees it (Caron et al. 2021; the DINO metric of DreamBooth).

The official model is `facebook/dino-vits16`. A local folder holds any other ViT in transformers' format
(`config.json`, `model.safetensors`).

Shapes: N pictures, R reference photos, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from ibkit.scorers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ReferenceCache,
    Scorer,
    batches,
    from_hub,
    hub_name,
    load_transformer,
    mean_cosine,
    reading,
    require_files,
    to_pixel_values,
    weights_folder,
)

OFFICIAL_REPOSITORY = "facebook/dino-vits16"


def resize_px_for(image_px: int) -> int:
    """Length of the shorter side before the centre crop of `image_px`.

    DINO's own evaluation resizes to 256 and crops 224 (the hub's image processor squashes to 224 instead, which
    gives other numbers). Models of other sizes are trained on whole pictures: nothing is cropped.
    """
    return 256 if image_px == 224 else image_px


class Dino(Scorer):
    """Mean cosine of the picture's class token with those of all reference photos.

    Above the value of real photos among themselves (.774 on DreamBench) it means copying. No pair is left out: a
    picture that is itself a reference counts its cosine of 1 with itself.

    Args:
        model: transformers' `ViTModel`; its final layer-normed class token is the embedding, a pooler is not used.
        device: Where the model runs.
        evaluator: Model in words.
        batch_size: Pictures a forward pass.

    Source: DreamBooth, section 4.1; its mean over pictures is the mean over all pairs.
    """

    name = "dino"
    needs = frozenset({"references"})

    def __init__(
        self, model: nn.Module, device: str | torch.device = "cpu", evaluator: str = "DINO", batch_size: int = 64
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.image_px = model.config.image_size
        self.resize_px = resize_px_for(self.image_px)
        crop = "" if self.resize_px == self.image_px else f" + centre crop {self.image_px}"
        self.evaluator = f"{evaluator}, class token; {self.resize_px} px bicubic{crop}, ImageNet mean/std"
        self._references = ReferenceCache(self.embed)

    @classmethod
    def load(cls, weights: str | Path = "pocket", device: str | torch.device = "cpu") -> Dino:
        """Load from `"pocket"`, `"official"` or a local weights folder; see `make_scorer`.

        Raises:
            ModelError: The weights are missing, damaged, or do not fit the model.
        """
        if str(weights) == "official":
            with from_hub(cls.name, OFFICIAL_REPOSITORY):
                model = _load_vit(OFFICIAL_REPOSITORY)
            return cls(model, device, f"DINO ViT-S/16 ({hub_name(OFFICIAL_REPOSITORY)})")
        folder = weights_folder(cls.name, weights, "dino")
        require_files(cls.name, folder, "config.json", "model.safetensors")
        with reading(cls.name, "model.safetensors", folder):
            model = _load_vit(folder)
        return cls(model, device, "pocket DINO" if str(weights) == "pocket" else f"DINO in {folder.parent.name}")

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, D) of unit length, on `device`."""
        features = []
        for batch in batches(images, self.batch_size):
            pixels = to_pixel_values(batch, self.resize_px, self.image_px, IMAGENET_MEAN, IMAGENET_STD)
            features.append(self.model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0])
        return normalize(torch.cat(features).float(), dim=-1)

    def _score(self, images, texts, references):
        return mean_cosine(self.embed(images), self._references(references))


def _load_vit(source: str | Path) -> nn.Module:
    """transformers' ViT without a pooler."""
    from transformers import ViTModel

    return load_transformer(Dino.name, ViTModel, source, add_pooling_layer=False)
