"""Stage 3: the judge, trained apart from every scorer and never used as a reward, and the seven small judges that vote
as simulated raters. See `ibkit.scorers.judge` for what they answer.

A small convolutional network on renders with noise, blur and the autoencoder's own reconstructions. Identity is an
embedding trained by
classification of the visible attributes and a supervised contrastive loss, so that individuals it never saw can stand
in a line-up.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ibkit.pocket.build.clip import degrade
from ibkit.pocket.build.common import Budget, fit, hash_seed
from ibkit.pocket.build.data import GROUP, Pictures, facts
from ibkit.pocket.world import COLOURS, PATTERNS
from ibkit.scorers.judge import ANSWERS, JUDGE_WIDTHS, JudgeNet

BUDGET = Budget(steps=900, batch=128, ema=0.99)
RATER_BUDGET = Budget(steps=700, batch=64, ema=0.99)
ATTRIBUTES = {
    "body": list(COLOURS),
    "second": list(COLOURS),
    "pattern": list(PATTERNS),
    "shape": ["round", "square", "triangular"],
}


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
    vae = vae.to(device=device, dtype=dtype).requires_grad_(False)

    def loss_fn(work, average, step, generator):
        groups = torch.randint(len(pictures) // GROUP, (budget.batch // GROUP,), generator=generator)
        indices = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
        x = pictures.batch(indices, device)
        part = slice(None, None, 4) if step % 2 else slice(1, None, 4)
        with torch.no_grad():
            x[part] = vae.decode(vae.encode(x[part].to(dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
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
