"""Does a learned subject metric generalize to activities that it never saw? Quick heads, each trained on half of them.

The kit's own head, the scorer `subject`, was trained on every activity (`ibkit.pocket.build.subject`). The heads here
are of the same kind, trained for seconds to embed pictures of one individual close together, whatever it does.

Shapes: N pictures, L patches, D token width, B individuals a step, E embedding width.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from ibkit.device import generator
from ibkit.errors import TrainingError
from ibkit.experiments.subject_changes import N_FOLDS, Pair, fold_of, score_pairs
from ibkit.experiments.subject_metrics import FoundMask, MaskedMean, TrueMask
from ibkit.pocket.draw import render
from ibkit.pocket.world import NO_ACTIVITY, Scene, Subject, sample_scene
from ibkit.scorers.base import Scorer, batches, column_of
from ibkit.scorers.dino import Dino
from ibkit.scorers.judge import Judge
from ibkit.scorers.subject import LAST_LAYER, IdentityHead, PatchMatch, SubjectFidelity, middle_layer, patch_tokens


def identity_loss(first: torch.Tensor, second: torch.Tensor, who: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of finding, among all other pictures of both halves, the other one of the same individual.

    Args:
        first, second: embeddings (B, E) of unit length; row i of both shows individual `who[i]`.
        who: (B,) integers; further pictures of an individual are left out, as neither right nor wrong.
        temperature: divides the cosines.

    Source: NT-Xent (Chen et al. 2020, SimCLR, equation 1), with the individual as the class (Khosla et al. 2020).
    """
    z, who = torch.cat([first, second]), torch.cat([who, who])
    partner = torch.arange(len(z), device=z.device).roll(len(first))
    left_out = (who[:, None] == who).scatter(1, partner[:, None], False)
    return cross_entropy((z @ z.T / temperature).masked_fill(left_out, -torch.inf), partner)


@dataclass(frozen=True)
class HeadConfig:
    """How a head is trained; about ten seconds on one CPU core for the pocket DINO.

    Attributes:
        n_pictures: of each individual, with random pose, place, accessory and view.
        batch: individuals a step, two pictures of each.
        temperature: see `identity_loss`.
    """

    n_pictures: int = 8
    n_steps: int = 400
    batch: int = 64
    learning_rate: float = 2e-3
    temperature: float = 0.1


@dataclass(frozen=True)
class TrainingPictures:
    """Tokens (N, L, D) in half precision, and of each picture the individual (N,) and the fold (N,), −1 at rest."""

    tokens: torch.Tensor
    individual: torch.Tensor
    fold: torch.Tensor


def training_pictures(
    dino: Dino, individuals: Sequence[Subject], config: HeadConfig = HeadConfig(), seed: int = 0
) -> TrainingPictures:
    """Draw random scenes of every individual and encode them by DINO's middle layer."""
    rng = random.Random(f"identity head {seed}")
    scenes = [sample_scene(rng, individual) for individual in individuals for _ in range(config.n_pictures)]
    layer = middle_layer(dino)
    parts = [patch_tokens(dino, list(map(render, part)), layer).half().cpu() for part in batches(scenes, 256)]
    folds = [-1 if scene.activity == NO_ACTIVITY else fold_of(scene.activity) for scene in scenes]
    who = torch.arange(len(individuals)).repeat_interleave(config.n_pictures)
    return TrainingPictures(torch.cat(parts), who, torch.tensor(folds))


def train_head(
    pictures: TrainingPictures,
    without_fold: int,
    config: HeadConfig = HeadConfig(),
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float], None] = lambda done, loss: None,
) -> IdentityHead:
    """Train one head.

    Args:
        pictures: of `training_pictures`.
        without_fold: activities of this fold (`subject_changes.fold_of`) are left out.
        on_step: called with the number of steps done and the loss.

    Raises:
        TrainingError: fewer than two individuals have two pictures, or the loss is not finite.
    """
    kept = torch.arange(len(pictures.fold))[pictures.fold != without_fold]
    who = pictures.individual[kept]
    albums = [album for i in who.unique() if len(album := kept[who == i]) > 1]
    if len(albums) < 2:
        raise TrainingError(f"Only {len(albums)} individual has two pictures to learn from: raise n_individuals.")
    stream = generator(seed, "identity head", without_fold)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.randint(2**31, (), generator=stream).item())
        head = IdentityHead(pictures.tokens.shape[-1]).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.n_steps)
    for step in range(config.n_steps):
        chosen = torch.randperm(len(albums), generator=stream)[: config.batch]
        drawn = [albums[i][torch.randperm(len(albums[i]), generator=stream)[:2]] for i in chosen.tolist()]
        first, second = (head(pictures.tokens[half].to(device).float()) for half in torch.stack(drawn).T)
        loss = identity_loss(first, second, chosen.to(device), config.temperature)
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
) -> list[IdentityHead]:
    """For each fold, a head that never saw its activities; see `train_head`. `on_step` counts through all heads."""

    def counted_from(before: int) -> Callable[[int, float], None]:
        return lambda done, loss: on_step(before + done, loss)

    folds = range(N_FOLDS)
    return [train_head(pictures, k, config, seed, device, counted_from(k * config.n_steps)) for k in folds]


def measure(
    pairs: Sequence[Pair],
    pictures: Mapping[Scene, Image.Image],
    dino: Dino,
    clip_i: Scorer | None,
    subject: Scorer,
    heads: Sequence[IdentityHead],
    judge: Judge,
    on_pair: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Score pairs by DINO, CLIP-I, the metrics of patches, those of `ibkit.experiments.subject_metrics`, and heads.

    Args:
        pairs, pictures, judge, on_pair: as in `subject_changes.score_pairs`.
        clip_i: None where its weights are missing; then the table has no such column.
        subject: the scorer of that name.
        heads: of `train_heads`.

    Returns:
        The table of `score_pairs` with the columns dino, clip_i, patch_match, true_mask_last, true_mask, found_mask,
        subject_score, and learned_unseen: by the head that never saw the activities of the pair's fold.
    """
    true, middle = TrueMask(dino, pictures), middle_layer(dino)
    scorers = {
        "dino": dino,
        **({"clip_i": clip_i} if clip_i else {}),
        "patch_match": PatchMatch(dino),
        "true_mask_last": MaskedMean(dino, true, LAST_LAYER),
        "true_mask": MaskedMean(dino, true, middle),
        "found_mask": MaskedMean(dino, FoundMask(dino), middle),
        column_of(subject.name): subject,
    }
    unseen = {f"learned_without_{fold}": SubjectFidelity(dino, head) for fold, head in enumerate(heads)}
    table = score_pairs(pairs, pictures, scorers | unseen, judge, on_pair)
    table["learned_unseen"] = [row[f"learned_without_{row['fold']}"] for _, row in table.iterrows()]
    return table.drop(columns=list(unseen))
