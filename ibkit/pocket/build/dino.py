"""The pocket DINO: a vision transformer trained on pictures alone, without captions or labels.

It replaces DINO ViT-S/16: same architecture family, same scorer, same use of the final normalised CLS token. Differs
from DINO: the loss is MoCo v3's contrastive one with a momentum encoder (Chen et al. 2021, algorithm 1), since DINO's
self-distillation collapsed to 5 of 512 prototypes within a few hundred steps of 64 pictures.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

from ibkit.pocket.build.clip import normalise
from ibkit.pocket.build.common import Budget, fit, hash_seed
from ibkit.pocket.build.data import Pictures
from ibkit.scorers.base import IMAGENET_MEAN, IMAGENET_STD

BUDGET = Budget(steps=600, batch=128, lr=1e-3, muon_lr=0.01, ema=0.99)  # the average is the momentum encoder
TEMPERATURE = 0.2
WIDTH, PROJECTION = 96, 64


class ContrastiveViT(nn.Module):
    """ViT with MoCo v3's projection and prediction heads."""

    def __init__(self):
        super().__init__()
        config = ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=4 * WIDTH,
            image_size=64,
            patch_size=8,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.projector = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, PROJECTION))
        self.predictor = nn.Sequential(nn.Linear(PROJECTION, 256), nn.GELU(), nn.Linear(256, PROJECTION))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Crops (B, 3, H, W), ImageNet-normalised -> projections (B, 64)."""
        return self.projector(self.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same through the predictor: queries (B, 64)."""
        return self.predictor(self.keys(x))


def contrastive_loss(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of finding each query's own key among all keys of the batch; (B, D), (B, D) -> scalar."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / TEMPERATURE
    return 2 * TEMPERATURE * F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def views(images: torch.Tensor, generator: torch.Generator, size: int, low: float, high: float) -> torch.Tensor:
    """A random crop of each picture (B, 3, 64, 64) in [-1, 1], ImageNet-normalised (B, 3, size, size).

    The crop has an area share of `low` to `high`, may be mirrored, and has mild colour jitter.
    """
    b = len(images)

    def uniform(a: float, z: float) -> torch.Tensor:
        return a + (z - a) * torch.rand(b, generator=generator, device=images.device)

    side = uniform(low, high).sqrt()
    theta = torch.zeros(b, 2, 3, device=images.device)
    theta[:, 0, 0] = side * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1)
    grid = F.affine_grid(theta, [b, 3, size, size], align_corners=False).to(images)
    crop = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    contrast, light = uniform(0.8, 1.2).view(b, 1, 1, 1).to(crop), uniform(-0.15, 0.15).view(b, 1, 1, 1).to(crop)
    return normalise((crop * contrast + light).clamp(-1, 1), IMAGENET_MEAN, IMAGENET_STD)


def train(folder: Path, pictures: Pictures, device, dtype) -> ViTModel:
    torch.manual_seed(hash_seed("dino weights"))
    net = ContrastiveViT()

    def loss_fn(work, average, step, generator):
        x = pictures.batch(torch.randint(len(pictures), (BUDGET.batch,), generator=generator, device=device), device)
        first, second = (views(x, generator, 64, 0.25, 1.0).to(dtype) for _ in range(2))
        with torch.no_grad():
            keys = [average.keys(v.float()) for v in (first, second)]
        queries = [work(v).float() for v in (first, second)]
        loss = contrastive_loss(queries[0], keys[1]) + contrastive_loss(queries[1], keys[0])
        nearest = (F.normalize(queries[0], dim=1) @ F.normalize(keys[1], dim=1).T).argmax(1)
        return loss, {"found": (nearest == torch.arange(len(nearest), device=device)).float().mean()}

    fit("dino", folder, net, loss_fn, BUDGET, device, dtype)
    return net.vit
