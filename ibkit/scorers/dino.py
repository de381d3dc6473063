"""DINO: subject fidelity as the self-supervised ViT-S/16 sees it (Caron et al. 2021; the DINO metric of DreamBooth).

The official model is `facebook/dino-vits16`. A local folder holds any other ViT in transformers' format
(`config.json`, `model.safetensors`).

Shapes: N pictures, R reference photos, D embedding width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import nn

from ibkit.scorers import base

OFFICIAL_REPOSITORY = "facebook/dino-vits16"


class Dino(base.Scorer):
    """Mean cosine of the picture's class token with those of all reference photos.

    Above the value of real photos among themselves (.774 on DreamBench) it means copying. No pair is left out: a
    picture that is itself a reference counts its cosine of 1 with itself.

    Args:
        model: transformers' `ViTModel`; its final layer-normed class token is the embedding, a pooler is not used.

    Source: DreamBooth, section 4.1; its mean over pictures is the mean over all pairs.
    """

    name = "dino"
    needs = frozenset({"references"})
    batch_size = 64

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", evaluator: str = "DINO") -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.image_px = model.config.image_size
        # DINO's own evaluation resizes to 256 and crops 224 (the hub's image processor squashes to 224 instead, which
        # gives other numbers). Models of other sizes are trained on whole pictures: nothing is cropped.
        self.resize_px = 256 if self.image_px == 224 else self.image_px
        crop = "" if self.resize_px == self.image_px else f" + centre crop {self.image_px}"
        self.evaluator = f"{evaluator}, class token; {self.resize_px} px bicubic{crop}, ImageNet mean/std"
        self._references = base.ReferenceCache(self.embed)

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Self:
        from transformers import ViTModel

        if str(weights) == "official":
            with base.from_hub(cls.name, OFFICIAL_REPOSITORY):
                model = base.load_transformer(cls.name, ViTModel, OFFICIAL_REPOSITORY, add_pooling_layer=False)
            return cls(model, device, f"DINO ViT-S/16 ({base.hub_name(OFFICIAL_REPOSITORY)})")
        folder = base.weights_folder(cls.name, weights, "dino", "config.json", "model.safetensors")
        with base.reading(cls.name, "model.safetensors", folder):
            model = base.load_transformer(cls.name, ViTModel, folder, add_pooling_layer=False)
        return cls(model, device, "pocket DINO" if str(weights) == "pocket" else f"DINO in {folder.parent.name}")

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Network input (B, 3, H, W), on `device`."""
        scale = base.IMAGENET_MEAN, base.IMAGENET_STD
        return base.to_pixel_values(images, self.resize_px, self.image_px, *scale).to(self.device)

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, D) of unit length, on `device`."""
        return base.embed(images, lambda batch: self.model(self.pixels(batch)).last_hidden_state[:, 0], self.batch_size)

    def _score(self, images, texts, references):
        return base.mean_cosine(self.embed(images), self._references(references))
