"""Pocket DINO: a small ViT by self-distillation without labels (Caron et al. 2021), on pictures alone; no caption or
fact is used.

A student sees two large and two small crops, an averaged teacher the large ones; the student predicts the teacher's
centred, sharpened assignment
of one crop from another. Evaluation uses the teacher's final normalised CLS token, as the paper's DINO score does.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

from ibkit.pocket.build.common import Budget, fit, hash_seed
from ibkit.pocket.build.data import Pictures

BUDGET = Budget(steps=400, batch=64, lr=1e-3, muon_lr=0.01, ema=0.99)  # the average is the teacher
PROTOTYPES, TEACHER_TEMPERATURE, STUDENT_TEMPERATURE, CENTRE_MOMENTUM = 512, 0.05, 0.1, 0.9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoNet(nn.Module):
    """ViT and DINO's projection head (MLP, l2-normalised bottleneck, weight-normalised prototypes)."""

    def __init__(self):
        super().__init__()
        config = ViTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=384,
            image_size=64,
            patch_size=8,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 64))
        self.register_buffer("centre", torch.zeros(PROTOTYPES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Crops (B, 3, H, W), ImageNet-normalised -> prototype logits (B, 512)."""
        cls = self.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return F.normalize(self.head(cls), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def views(images: torch.Tensor, generator: torch.Generator, size: int, low: float, high: float) -> torch.Tensor:
    """A random crop of area share [low, high] with mirror and mild colour jitter for each picture (B, 3, 64,
    64) in [-1, 1] -> (B, 3, size, size).
    """
    b = len(images)

    def uniform(a: float, z: float) -> torch.Tensor:
        return a + (z - a) * torch.rand(b, generator=generator)

    side = uniform(low, high).sqrt()
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = side * torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1)
    crop = F.grid_sample(
        images,
        F.affine_grid(theta, (b, 3, size, size), align_corners=False).to(images),
        padding_mode="reflection",
        align_corners=False,
    )
    contrast, light = uniform(0.8, 1.2).view(b, 1, 1, 1).to(crop), uniform(-0.15, 0.15).view(b, 1, 1, 1).to(crop)
    x = ((crop * contrast + light).clamp(-1, 1) + 1) / 2
    return (x - torch.tensor(MEAN, device=x.device).view(3, 1, 1)) / torch.tensor(STD, device=x.device).view(3, 1, 1)


def train(folder: Path, pictures: Pictures, device, dtype) -> ViTModel:
    torch.manual_seed(hash_seed("dino weights"))
    net = DinoNet()

    def loss_fn(work, average, step, generator):  # student, teacher (DINO, section 3.1)
        x = pictures.batch(torch.randint(len(pictures), (BUDGET.batch,), generator=generator), device)
        large = [views(x, generator, 64, 0.4, 1.0).to(dtype) for _ in range(2)]
        small = [views(x, generator, 32, 0.1, 0.4).to(dtype) for _ in range(2)]
        with torch.no_grad():
            logits = [average(v.float()) for v in large]
            centre = work.centre.float()
            targets = [((t - centre) / TEACHER_TEMPERATURE).softmax(-1) for t in logits]
            work.centre.copy_(CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * torch.cat(logits).mean(0))
        predictions = [(work(v).float() / STUDENT_TEMPERATURE).log_softmax(-1) for v in (*large, *small)]
        terms = [-(q * p).sum(-1).mean() for i, q in enumerate(targets) for j, p in enumerate(predictions) if i != j]
        spread = torch.cat(targets).mean(0)
        return sum(terms) / len(terms), {"used": float((-(spread * (spread + 1e-9).log()).sum()).exp())}

    fit("dino", folder, net, loss_fn, BUDGET, device, dtype)
    return net.vit
