"""A learned subject metric: a small head on frozen DINO patches, trained to tell individuals apart in any pose.

It needs what the other metrics do not: many individuals whose identity is known, each in several poses. The pocket
world draws as many as one likes.

Shapes: N pictures, L patches, D token width, B individuals a step, E embedding width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from ibkit.device import generator
from ibkit.errors import TrainingError
from ibkit.experiments.subject_changes import N_FOLDS, Pair, fold_of, score_pairs
from ibkit.experiments.subject_metrics import (
    LAST_LAYER,
    FoundMask,
    MaskedMean,
    PatchMatch,
    TrueMask,
    middle_layer,
    patch_tokens,
)
from ibkit.pocket.draw import render
from ibkit.pocket.world import NO_ACTIVITY, Scene, Subject, sample_scene
from ibkit.scorers.base import Scorer, batches, mean_cosine
from ibkit.scorers.dino import Dino
from ibkit.scorers.judge import Judge


@dataclass(frozen=True)
class HeadConfig:
    """How the head is trained; about ten seconds on one CPU core for the pocket DINO.

    Attributes:
        n_pictures: of each individual, every one with random pose, place, accessory and view.
        batch: individuals a step, two pictures of each.
        temperature: of the cosines in the loss.
    """

    n_pictures: int = 8
    n_steps: int = 400
    batch: int = 64
    learning_rate: float = 2e-3
    temperature: float = 0.1


class IdentityHead(nn.Module):
    """Four learned questions to the patches, each answered by a weighted mean of what the patches say (62 thousand
    weights for the pocket DINO).
    """

    def __init__(self, n_in: int, width: int = 128, n_out: int = 64, n_questions: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_in)
        self.say = nn.Sequential(nn.Linear(n_in, width), nn.GELU(), nn.Linear(width, width))
        self.ask = nn.Linear(n_in, n_questions)
        self.out = nn.Linear(n_questions * width, n_out)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Patch tokens (N, L, D) -> embeddings of unit length (N, E)."""
        tokens = self.norm(tokens)
        weights = self.ask(tokens).softmax(dim=1)  # (N, L, questions)
        answers = torch.einsum("nlq,nlw->nqw", weights, self.say(tokens))
        return normalize(self.out(answers.flatten(1)), dim=-1)


def identity_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Which picture of `second` shows the individual of each picture of `first`, and the other way round.

    Args:
        first, second: embeddings (B, E) of unit length; row i of both shows individual i.
        temperature: divides the cosines.

    Source: the symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3), with the individual as the class
    (Khosla et al. 2020).
    """
    logits = first @ second.T / temperature
    individual = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, individual) + cross_entropy(logits.T, individual)) / 2


@dataclass(frozen=True)
class TrainingPictures:
    """What a head learns from: tokens (N, L, D) in half precision, and for each picture whom it shows and which fold
    of the activities it is of (−1 at rest).
    """

    tokens: torch.Tensor
    individual: torch.Tensor
    fold: torch.Tensor


def training_pictures(
    dino: Dino, individuals: Sequence[Subject], config: HeadConfig = HeadConfig(), seed: int = 0
) -> TrainingPictures:
    """Draw random scenes of every individual and look at them with DINO's middle layer."""
    rng = random.Random(f"identity head {seed}")
    scenes = [sample_scene(rng, individual) for individual in individuals for _ in range(config.n_pictures)]
    parts = [
        patch_tokens(dino, [render(scene) for scene in batch], middle_layer(dino)).half().cpu()
        for batch in batches(scenes, 256)
    ]
    folds = [-1 if scene.activity == NO_ACTIVITY else fold_of(scene.activity) for scene in scenes]
    who = torch.arange(len(individuals)).repeat_interleave(config.n_pictures)
    return TrainingPictures(torch.cat(parts), who, torch.tensor(folds))


def train_head(
    pictures: TrainingPictures,
    config: HeadConfig = HeadConfig(),
    seed: int = 0,
    without_fold: int | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float], None] = lambda done, loss: None,
) -> IdentityHead:
    """Train a head that puts pictures of one individual together, whatever it does and wherever it is.

    Args:
        pictures: of `training_pictures`.
        without_fold: activities of this fold (`subject_changes.fold_of`) are left out; None = nothing is.
        on_step: called with the number of steps done and the loss.

    Raises:
        TrainingError: fewer than two individuals have two pictures, or the loss is not finite.
    """
    rows = torch.arange(len(pictures.fold))
    kept = rows if without_fold is None else rows[pictures.fold != without_fold]
    albums = [kept[pictures.individual[kept] == i] for i in pictures.individual.unique().tolist()]
    albums = [album for album in albums if len(album) > 1]
    if len(albums) < 2:
        raise TrainingError(f"Only {len(albums)} individual has two pictures to learn from: raise n_individuals.")
    stream = generator(seed, "identity head", str(without_fold))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.randint(2**31, (), generator=stream).item())
        head = IdentityHead(pictures.tokens.shape[-1]).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.n_steps)
    for step in range(config.n_steps):
        who = torch.randperm(len(albums), generator=stream)[: config.batch].tolist()
        drawn = [albums[i][torch.randperm(len(albums[i]), generator=stream)[:2]] for i in who]
        first, second = (head(pictures.tokens[half].to(device).float()) for half in torch.stack(drawn).T)
        loss = identity_loss(first, second, config.temperature)
        if not torch.isfinite(loss):
            raise TrainingError(f"The identity head's loss is {loss.item()} at step {step}: lower its learning rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    return head.eval().requires_grad_(False)


def train_heads(
    pictures: TrainingPictures,
    config: HeadConfig = HeadConfig(),
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float], None] = lambda done, loss: None,
) -> dict[int | None, IdentityHead]:
    """A head that learned from all activities (key None), and for each fold one that never saw its activities.

    Args and raises: as `train_head`; `on_step` counts through all heads.
    """
    heads = {}
    for k, fold in enumerate((None, *range(N_FOLDS))):

        def report(done: int, loss: float, before: int = k * config.n_steps) -> None:
            on_step(before + done, loss)

        heads[fold] = train_head(pictures, config, seed, fold, device, report)
    return heads


class LearnedIdentity(Scorer):
    """Cosine of a trained head's embeddings. It knows the kinds of subjects it was trained on, and no others."""

    name = "learned"
    needs = frozenset({"references"})

    def __init__(self, dino: Dino, head: IdentityHead) -> None:
        self.dino, self.head = dino, head
        self.evaluator = f"{dino.evaluator.split(',')[0]}, layer {middle_layer(dino)}, learned head"

    def _describe(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self.head(patch_tokens(self.dino, images, middle_layer(self.dino)))

    def _score(self, images, texts, references):
        return mean_cosine(self._describe(images), self._describe(references))


# --- all metrics together --------------------------------------------------------------------------------------


def measure(
    pairs: Sequence[Pair],
    pictures: Mapping[Scene, Image.Image],
    dino: Dino,
    clip_i: Scorer | None,
    heads: Mapping[int | None, IdentityHead],
    judge: Judge,
    on_pair: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Score pairs by DINO, CLIP-I and all metrics of this module and of `ibkit.experiments.subject_metrics`.

    Args:
        pairs, pictures, judge, on_pair: as in `subject_changes.score_pairs`.
        clip_i: None where its weights are missing; the table has no such column then.
        heads: of `train_heads`.

    Returns:
        The table of `score_pairs` with the columns dino, clip_i, patch_match, true_mask_last, true_mask, found_mask,
        learned, and learned_unseen: by the head that never saw the activities of the pair's fold.
    """
    true, middle = TrueMask(dino, pictures), middle_layer(dino)
    scorers = {
        "dino": dino,
        **({"clip_i": clip_i} if clip_i else {}),
        "patch_match": PatchMatch(dino),
        "true_mask_last": MaskedMean(dino, true, LAST_LAYER),
        "true_mask": MaskedMean(dino, true, middle),
        "found_mask": MaskedMean(dino, FoundMask(dino), middle),
        "learned": LearnedIdentity(dino, heads[None]),
    }
    unseen = {f"learned_without_{fold}": LearnedIdentity(dino, heads[fold]) for fold in range(N_FOLDS)}
    table = score_pairs(pairs, pictures, scorers | unseen, judge, on_pair)
    table["learned_unseen"] = [row[f"learned_without_{row['fold']}"] for _, row in table.iterrows()]
    return table.drop(columns=list(unseen))
