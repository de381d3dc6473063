"""The counter of the pocket world (`ibkit.scorers.counter`), on renders of one to four subjects, noisy and blurred, and
on the autoencoder's reconstructions of some.

It begins with the weights of a rater, which knows class, place and colours of single subjects: from scratch, 600 steps
on 4,000 pictures left it at 86 % of classes and 78 % of colours.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ibkit.pocket import world
from ibkit.pocket.build.autoencoder import rebuilt
from ibkit.pocket.build.clip import degrade
from ibkit.pocket.build.common import Budget, begin_with, cached, fit, hash_seed, load_float, save_half
from ibkit.pocket.build.data import Pictures, to_range
from ibkit.pocket.build.judge import jitter
from ibkit.pocket.words import NUMBERS
from ibkit.pocket.world import Scene
from ibkit.scorers.base import batches
from ibkit.scorers.counter import COUNTED, counter_net
from ibkit.scorers.judge import JudgeNet

BUDGET = Budget(steps=800, batch=64, lr=1e-3, muon_lr=0.01, ema=0.99)
FINISH = Budget(steps=1000, batch=64, lr=1e-3, muon_lr=0.01, ema=0.99)  # the same once more, from its result
TRAIN_SEED, N_TRAIN = 20, 10_000
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


def train(folder: Path, vae, start: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> JudgeNet:
    """Half of the pictures of a batch are reconstructions, made once; half are mirrored. The first weights are a
    rater's, without those of questions that the counter does not answer.
    """
    pictures = pictures_of(folder, "counted", TRAIN_SEED, N_TRAIN)
    labels = _labels(pictures, device)
    half = N_TRAIN // 2
    made = cached(folder / f"counted-rebuilt-{N_TRAIN}.npy", lambda: rebuilt(pictures.images[half:], vae, device))
    images = np.concatenate([pictures.images[:half], made])
    torch.manual_seed(hash_seed("counter weights"))
    net = counter_net()
    begin_with(net, start)

    def loss_fn(work, average, step, generator):
        rows = torch.randint(N_TRAIN, (BUDGET.batch,), generator=generator, device=device)
        x = to_range(images[rows.cpu().numpy()], device)
        x = torch.where(torch.rand((len(x), 1, 1, 1), generator=generator, device=device) < 0.5, x.flip(3), x)
        answers, _ = work(degrade(jitter(x, generator), generator).to(dtype))
        losses = {q: F.cross_entropy(answers[q].float(), labels[q][rows], label_smoothing=0.02) for q in COUNTED}
        right = {q: (answers[q].argmax(1) == labels[q][rows]).float().mean() for q in COUNTED}
        # the identity embedding of the judge's network has no part here
        return sum(losses.values()) + 0 * work.identity.weight.sum() + 0 * work.identity.bias.sum(), right

    for name, budget in (("counter", BUDGET), ("counter-finish", FINISH)):
        fit(name, folder, net, loss_fn, budget, device, dtype)
    return net


@torch.inference_mode()
def accuracy(net: JudgeNet, images: np.ndarray, labels: dict[str, torch.Tensor], device) -> dict[str, float]:
    parts = [net(to_range(np.array(part), device))[0] for part in batches(images, 100)]
    return {q: (torch.cat([p[q] for p in parts]).argmax(1) == labels[q]).float().mean().item() for q in COUNTED}


def build(folder: Path, weights: Path, vae, rater: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Train it from the weights of `rater` and write `counter.safetensors` and `counter.json` to `weights`/counter."""
    net = train(folder, vae, load_float(rater), device, dtype).float().to(device)
    save_half(net.state_dict(), weights / "counter" / "counter.safetensors")
    test = pictures_of(folder, "counted-test", TEST_SEED, N_TEST)
    labels = _labels(test, device)
    found = {
        "renders": accuracy(net, test.images, labels, device),
        "reconstructions": accuracy(net, rebuilt(test.images, vae, device), labels, device),
    }
    card = {"accuracy": {q: {k: v[q] for k, v in found.items()} for q in COUNTED}, "n": N_TEST}
    (weights / "counter" / "counter.json").write_text(json.dumps(card, indent=2) + "\n")
