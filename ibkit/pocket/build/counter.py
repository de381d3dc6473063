"""The counter of the pocket world (`ibkit.scorers.counter`), on renders of one to four subjects, noisy and blurred, and
on the autoencoder's reconstructions of some.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ibkit.pocket import world
from ibkit.pocket.build.autoencoder import rebuilt
from ibkit.pocket.build.clip import degrade
from ibkit.pocket.build.common import Budget, fit, hash_seed, save_half
from ibkit.pocket.build.data import Pictures
from ibkit.pocket.build.judge import jitter
from ibkit.pocket.words import NUMBERS
from ibkit.pocket.world import Scene
from ibkit.scorers.counter import COUNTED, counter_net
from ibkit.scorers.judge import JudgeNet

BUDGET = Budget(steps=600, batch=64, ema=0.99)
TRAIN_SEED, N_TRAIN = 20, 4000
TEST_SEED, N_TEST = 21, 500


def counted_scene(seed: int, index: int) -> list[Scene]:
    """One scene of one to four subjects; a pure function of (seed, index)."""
    return [world.sample_counted(random.Random(f"counted {seed}/{index}"))]


def answers_of(scene: Scene) -> dict[str, str]:
    """The true answers to the counter's questions."""
    subject = scene.subject
    return {"class": subject.class_noun, "count": NUMBERS[scene.count], "colour": subject.body, "place": scene.place}


def pictures_of(folder: Path, name: str, seed: int, n: int) -> Pictures:
    return Pictures(folder, name, seed, n, counted_scene, 1)


def _labels(pictures: Pictures, device: torch.device) -> dict[str, torch.Tensor]:
    truths = [answers_of(scene) for scene in pictures.scenes]
    return {q: torch.tensor([a.index(t[q]) for t in truths], device=device) for q, a in COUNTED.items()}


def train(folder: Path, vae, device: torch.device, dtype: torch.dtype, budget: Budget = BUDGET) -> JudgeNet:
    """Half of the pictures of a batch are reconstructions, made once."""
    pictures = pictures_of(folder, "counted", TRAIN_SEED, N_TRAIN)
    labels = _labels(pictures, device)
    half = N_TRAIN // 2
    images = np.concatenate([pictures.images[:half], rebuilt(pictures.images[half:], vae, device)])
    torch.manual_seed(hash_seed("counter weights"))
    net = counter_net()

    def loss_fn(work, average, step, generator):
        rows = torch.randint(N_TRAIN, (budget.batch,), generator=generator, device=device)
        x = torch.from_numpy(images[rows.cpu().numpy()]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        answers, _ = work(degrade(jitter(x, generator), generator).to(dtype))
        losses = {q: F.cross_entropy(answers[q].float(), labels[q][rows], label_smoothing=0.02) for q in COUNTED}
        right = {q: (answers[q].argmax(1) == labels[q][rows]).float().mean() for q in COUNTED}
        # the identity embedding of the judge's network has no part here
        return sum(losses.values()) + 0 * work.identity.weight.sum() + 0 * work.identity.bias.sum(), right

    return fit("counter", folder, net, loss_fn, budget, device, dtype)


@torch.inference_mode()
def accuracy(net: JudgeNet, images: np.ndarray, labels: dict[str, torch.Tensor], device) -> dict[str, float]:
    parts = []
    for i in range(0, len(images), 100):
        x = torch.from_numpy(np.array(images[i : i + 100])).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(net(x)[0])
    return {q: (torch.cat([p[q] for p in parts]).argmax(1) == labels[q]).float().mean().item() for q in COUNTED}


def build(folder: Path, weights: Path, vae, device: torch.device, dtype: torch.dtype) -> None:
    """Train it and write weights and card, `counter.safetensors` and `counter.json`, to `weights`/counter."""
    net = train(folder, vae, device, dtype).float().to(device)
    save_half(net.state_dict(), weights / "counter" / "counter.safetensors")
    test = pictures_of(folder, "counted-test", TEST_SEED, N_TEST)
    labels = _labels(test, device)
    found = {
        "renders": accuracy(net, test.images, labels, device),
        "reconstructions": accuracy(net, rebuilt(test.images, vae, device), labels, device),
    }
    card = {"accuracy": {q: {k: v[q] for k, v in found.items()} for q in COUNTED}, "n": N_TEST}
    (weights / "counter" / "counter.json").write_text(json.dumps(card, indent=2) + "\n")
