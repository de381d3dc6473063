"""Stage 3: the judge, trained apart from every scorer and never used as a reward, and the small judges that vote as
simulated raters. See `ibkit.scorers.judge` for what they answer.

A small convolutional network on renders with noise, blur and the autoencoder's own reconstructions. Identity is an
embedding trained by
classification of the visible attributes, so that individuals it never saw can stand in a line-up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ibkit.pocket.build.clip import degrade
from ibkit.pocket.build.common import Budget, fit, hash_seed
from ibkit.pocket.build.data import GROUP, Pictures, facts, to_range
from ibkit.pocket.world import COLOURS, PATTERNS
from ibkit.runs import hash_json
from ibkit.scorers.judge import ANSWERS, JUDGE_WIDTHS, JudgeNet

BUDGET = Budget(steps=900, batch=128, ema=0.99)
RATER_BUDGET = Budget(steps=1500, batch=64, ema=0.99)
RECONSTRUCTED = 2  # scenes of a group that are also shown as the autoencoder draws them, one of them in each step
ATTRIBUTES = {
    "body": list(COLOURS),
    "second": list(COLOURS),
    "pattern": list(PATTERNS),
    "shape": ["round", "square", "triangular"],
}


def reconstruct(folder: Path, pictures: Pictures, vae, device, dtype) -> np.ndarray:
    """The autoencoder's pictures of the first scenes of each group, uint8 (groups, RECONSTRUCTED, 64, 64, 3).

    Cached, keyed by the decoder's weights: all judges train on them.
    """
    key = hash_json([float(p.detach().double().sum()) for p in vae.decoder.parameters()])[:12]
    path = folder / f"reconstructions-{len(pictures)}-{key}.npy"
    if not path.exists():
        vae = vae.to(device=device, dtype=dtype).requires_grad_(False)
        indices = (torch.arange(0, len(pictures), GROUP)[:, None] + torch.arange(RECONSTRUCTED)).flatten()
        parts = []
        with torch.inference_mode():
            for chunk in tqdm(indices.split(64), desc="reconstructions", mininterval=10):
                latents = vae.encode(pictures.batch(chunk, device).to(dtype)).latent_dist.mode()
                pixels = (vae.decode(latents).sample.float().clamp(-1, 1) + 1) * 127.5
                parts.append(pixels.round().byte().permute(0, 2, 3, 1).cpu())
        images = torch.cat(parts).view(-1, RECONSTRUCTED, *parts[0].shape[1:])
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, images.numpy())
        temporary.replace(path)
    return np.load(path, mmap_mode="r")


def train(
    folder: Path,
    pictures: Pictures,
    vae,
    device,
    dtype,
    name: str = "judge",
    widths: tuple[int, ...] = JUDGE_WIDTHS,
    budget: Budget = BUDGET,
) -> JudgeNet:
    """Train one; its first weights and its batches are drawn from its name."""
    torch.manual_seed(hash_seed(f"{name} weights"))
    net = JudgeNet(widths)
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(net.identity.out_features, len(v)) for k, v in ATTRIBUTES.items()})
    whole = torch.nn.ModuleDict({"net": net, "heads": heads})
    labels = {q: torch.tensor([ANSWERS[q].index(facts(s)[q]) for s in pictures.scenes]) for q in ANSWERS}
    looks = {k: torch.tensor([v.index(getattr(s.subject, k)) for s in pictures.scenes]) for k, v in ATTRIBUTES.items()}
    reconstructions = reconstruct(folder, pictures, vae, device, dtype)

    def loss_fn(work, average, step, generator):
        groups = torch.randint(len(pictures) // GROUP, (budget.batch // GROUP,), generator=generator)
        indices = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
        x = pictures.batch(indices, device)
        place = step % RECONSTRUCTED
        x[place::GROUP] = to_range(reconstructions[groups.numpy(), place], device)
        x = degrade(x, generator).to(dtype)
        answers, embedding = work["net"](x)
        losses = {
            q: F.cross_entropy(answers[q].float(), labels[q][indices].to(device), label_smoothing=0.02) for q in ANSWERS
        }
        for k, head in work["heads"].items():
            losses[k] = 0.5 * F.cross_entropy(head(embedding).float(), looks[k][indices].to(device))
        accuracy = (answers["activity"].argmax(1).cpu() == labels["activity"][indices]).float().mean().item()
        return sum(losses.values()), {
            "activity": accuracy,
            "second": losses["second"].item(),
            "pattern": losses["pattern"].item(),
        }

    fit(name, folder, whole, loss_fn, budget, device, dtype)
    return net
