"""The subject head: tells individuals apart by the frozen pocket DINO's patches, in any pose, place and dress.

It becomes the scorer `subject` (`ibkit.scorers.subject`), which may be a reward. So it is trained apart from the judge:
other features, another loss, other pictures, and individuals that neither a test nor a user's run shows.

In a group of pictures an individual and three look-alikes, who differ from it in one attribute each, act the same
scenes. So neither the scene nor any single colour settles who it is.

Shapes: G groups, P = 4 individuals of a group, K scenes of a group, E embedding width.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from ibkit.experiments.subject_analysis import subject_auc
from ibkit.experiments.subject_changes import CONTRASTS, controlled_pairs, training_individuals
from ibkit.experiments.subject_head import identity_loss
from ibkit.pocket.build.autoencoder import rebuilt
from ibkit.pocket.build.clip import degrade, normalise
from ibkit.pocket.build.common import Budget, Row, cached, fit, hash_seed, load_float, save_half
from ibkit.pocket.build.data import in_processes, to_range
from ibkit.pocket.build.judge import ATTRIBUTES
from ibkit.pocket.draw import render
from ibkit.pocket.world import SHAPES, Scene, Subject, sample_scene
from ibkit.runs import hash_file, hash_json
from ibkit.scorers.base import IMAGENET_MEAN, IMAGENET_STD
from ibkit.scorers.dino import Dino
from ibkit.scorers.subject import IdentityHead, SubjectFidelity, middle_layer, tokens_of

BUDGET = Budget(steps=3000, batch=128, lr=2e-3, muon_lr=0.01)  # pictures a step: two of each individual
N_GROUPS, PARADE, N_SCENES = 3000, 4, 8
N_REBUILT = 3  # scenes of a group that are shown as reconstructions by the autoencoder
TEMPERATURE = 0.1
# of the AUC of same against other individual, by what else changes
TARGETS = {"pose": 0.95, "place": 0.97, "everything": 0.93}
N_PAIRS = 96  # references of a class in the test: four of each individual that is kept for it


def look_alike(rng: random.Random, individual: Subject) -> Subject:
    """An individual that differs in one attribute: a colour, the pattern, the body's shape, or long or short ears."""
    looks, taken = ATTRIBUTES | {"shape": SHAPES[individual.group]}, tuple(vars(individual).values())
    choices = {k: [v for v in values if v not in taken] for k, values in looks.items()}
    attribute = rng.choice([k for k, values in choices.items() if values])
    return replace(individual, **{attribute: rng.choice(choices[attribute])})


def group_of(numbers: dict[Subject, int], leader: Subject, index: int) -> list[Subject]:
    """The `index`-th group: the leader and look-alikes among the individuals that have a number."""
    rng, group = random.Random(f"look-alikes {index}"), [leader]
    while len(group) < PARADE:
        other = look_alike(rng, leader)
        if other in numbers and other not in group:
            group.append(other)
    return group


def scenes_of(individual: Subject, index: int) -> list[Scene]:
    """The scenes of the `index`-th group, acted by the individual that leads it."""
    rng = random.Random(f"scenes of look-alikes {index}")
    return [sample_scene(rng, individual) for _ in range(N_SCENES)]


def _draw(numbered: Sequence[tuple[int, list[Subject]]]) -> np.ndarray:
    """Groups of pictures, uint8 (groups, P, K, 64, 64, 3)."""
    images = []
    for index, group in numbered:
        scenes = scenes_of(group[0], index)
        images.append([[np.asarray(render(replace(scene, subject=who))) for scene in scenes] for who in group])
    return np.array(images)


class Groups:
    """Groups of look-alikes: `images` uint8 (G, P, K, 64, 64, 3), `who` (G, P) numbers individuals. Cached in `folder`.

    Args:
        individuals: all that may be shown, in the order in which they lead a group.
        vae: reconstructs the last scenes of each group, since no generated picture looks better; None = renders alone.
    """

    def __init__(self, folder: Path, individuals: Sequence[Subject], vae: nn.Module | None, device, n: int = N_GROUPS):
        numbers = {who: i for i, who in enumerate(individuals)}
        groups = [group_of(numbers, individuals[i % len(individuals)], i) for i in range(n)]
        decoder = [float(p.detach().double().sum()) for p in vae.decoder.parameters()] if vae else []
        shown = repr([(group, scenes_of(group[0], i)) for i, group in enumerate(groups)])
        path = folder / f"look-alikes-{hash_json([decoder, N_REBUILT, shown])[:12]}.npy"

        def draw() -> np.ndarray:
            images = in_processes(_draw, list(enumerate(groups)), 25)
            if vae:
                last = images[:, :, -N_REBUILT:]
                last[:] = rebuilt(last.reshape(-1, 64, 64, 3), vae, device).reshape(last.shape)
            return images

        self.images = cached(path, draw)
        self.who = torch.tensor([[numbers[who] for who in group] for group in groups])

    def batch(self, n: int, generator: torch.Generator, device) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` groups in two scenes each: pictures (2, n * P, 3, 64, 64) in [-1, 1], and whom they show (n * P,)."""
        groups = torch.randperm(len(self.images), generator=generator)[:n]
        scenes = torch.rand(n, N_SCENES, generator=generator).argsort(1)[:, :2].T.numpy()
        pictures = [to_range(self.images[groups.numpy(), :, k].reshape(-1, 64, 64, 3), device) for k in scenes]
        return torch.stack(pictures), self.who[groups].flatten().to(device)


def train(
    folder: Path, groups: Groups, dino: Dino, device: torch.device, dtype: torch.dtype, budget: Budget = BUDGET
) -> IdentityHead:
    """Train a head on DINO's middle layer, on degraded pictures (see `degrade`)."""
    torch.manual_seed(hash_seed("subject head weights"))
    head = IdentityHead(dino.model.config.hidden_size)

    def loss_fn(work, average, step, generator):
        pictures, who = groups.batch(budget.batch // (2 * PARADE), generator, device)
        pixels = normalise(degrade(pictures.flatten(0, 1), generator), IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            tokens = tokens_of(dino.model, pixels, middle_layer(dino))
        first, second = work(tokens.to(dtype)).float().chunk(2)
        loss = identity_loss(first, second, who, TEMPERATURE)
        found = (first @ second.T).argmax(1) == torch.arange(len(first), device=device)
        return loss, {"found": found.float().mean()}

    return fit("subject", folder, head, loss_fn, budget, device, dtype)


def build(
    folder: Path,
    weights: Path,
    vae: nn.Module | None,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget = BUDGET,
    n_groups: int = N_GROUPS,
    n_pairs: int = N_PAIRS,
) -> None:
    """The whole stage: draw, train, measure, and write `weights/subject/`; reads `weights/dino/`.

    Args:
        folder: cache and checkpoints.
        vae: the finished autoencoder, see `Groups` and `measure`.
        n_groups: of look-alikes, `PARADE` individuals in `N_SCENES` scenes each.
        n_pairs: see `measure`.
    """
    dino = Dino.load(weights, device)
    groups = Groups(folder, training_individuals([]), vae, device, n_groups)
    head = train(folder, groups, dino, device, dtype, budget)
    path = weights / "subject" / "subject.safetensors"
    save_half(head.state_dict(), path)
    head.load_state_dict(load_float(path))  # measured as it is shipped
    card = {"sizes": head.sizes, "dino": hash_file(weights / "dino" / "model.safetensors")}
    card |= measure(SubjectFidelity(dino, head), vae, n_pairs)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")


def measure(scorer: SubjectFidelity, vae: nn.Module | None, n_pairs: int = N_PAIRS) -> dict:
    """AUC of the same against another individual, neither seen in training, under each of `CONTRASTS`.

    Args:
        vae: to measure on its reconstructions too; None = on renders alone.
        n_pairs: references of each class, four of an individual.

    Returns:
        {"auc": {"renders": {change: AUC}, with a vae also "reconstructions"}, "n": references}
    """
    pairs = controlled_pairs([], n_pairs, seed=1)  # the notebook's default seed is another
    ends = pd.Series([scene for pair in pairs for scene in (pair.reference, pair.changed)], dtype=object)
    rows, scenes = pd.factorize(ends)
    images = np.stack([np.asarray(render(scene)) for scene in scenes])
    kinds = {"renders": images}
    if vae:
        kinds["reconstructions"] = rebuilt(images, vae, scorer.dino.device)
    table = pd.DataFrame(
        [(pair.reference.subject.class_noun, pair.subject, pair.number, pair.change) for pair in pairs],
        columns=["class_noun", "subject", "pair", "change"],
    )
    for kind, pictures in kinds.items():
        with torch.inference_mode():
            z = scorer.embed([Image.fromarray(picture) for picture in pictures]).cpu()
        table[kind] = (z[rows[::2]] * z[rows[1::2]]).sum(1).double().numpy()
    auc = {kind: {k: round(subject_auc(table, kind, *c).value, 4) for k, c in CONTRASTS.items()} for kind in kinds}
    return {"auc": auc, "n": len(table.drop_duplicates(["subject", "pair"]))}


def card_rows(weights: Path) -> list[Row]:
    """Rows of the model card, as `build` measured them."""
    card = json.loads((weights / "subject" / "subject.json").read_text(encoding="utf-8"))
    return [
        (f"subject, AUC of same over other individual, change of {change}, {kind}", value, target, card["n"])
        for kind, aucs in card["auc"].items()
        for change, value in aucs.items()
        for target in (TARGETS[change] if kind == "renders" else None,)
    ]
