"""The pocket reward model: ImageReward's architecture, trained on preferences as ImageReward was (Xu et al. 2023, eq.
1), with hard negatives.

A preference is: for this text, this picture rather than that one. Pictures of one group differ in what the text says
(`grades`): the activity, or the pose or the things of it alone, the place, the accessory, the colour. One that agrees
further in some aspect and less far in none is the better one, so that the whole activity beats its things around a
subject at rest, and those beat rest with nothing. A picture half-way between activity and rest, mixed in the
autoencoder's latents, is what a policy draws while it learns: worse than the activity, better than either part. The
worse picture may also be of another scene altogether. Some pictures come out of the autoencoder with noisy latents.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ibkit.pocket.build.autoencoder import redraw
from ibkit.pocket.build.clip import degrade, normalise
from ibkit.pocket.build.common import Budget, begin_with, fit, hash_seed
from ibkit.pocket.build.data import (
    GROUP,
    MIXED_GROUP,
    Pictures,
    base_caption,
    encode,
    grades,
    in_processes,
    is_better,
    says,
)
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.draw import render
from ibkit.pocket.words import caption
from ibkit.pocket.world import (
    ACCESSORIES,
    ACTIVITIES,
    CLASSES,
    COLOURS,
    NO_ACTIVITY,
    PARTS,
    PLACES,
    Scene,
    accessories_of,
    activities_of,
    doing,
    sample_scene,
    sample_subject,
)
from ibkit.scorers.image_reward import ImageRewardModel, RewardConfig

BUDGET = Budget(steps=4000, batch=384)  # pictures, in groups
CONTINUED = Budget(steps=3400, batch=96)  # from earlier weights
WEAK_BUDGET = Budget(steps=150, batch=96)
VARIANTS = 2  # sets of texts of a group
HALF_WAY = MIXED_GROUP  # index of the mixed picture among those of a group
ACTIVITY_OF_HALF_WAY = 0.75  # its grade: above a part alone, below the whole


def new_reward_model(tokenizer, n_layers: int) -> ImageRewardModel:
    return ImageRewardModel(
        RewardConfig(
            image_px=64,
            patch_px=8,
            vision_width=96,
            vision_mlp=384,
            vision_layers=n_layers,
            vision_heads=4,
            vocab_size=len(tokenizer),
            tokenizer_size=len(tokenizer),
            text_width=96,
            text_mlp=384,
            text_layers=n_layers - 1,
            text_heads=4,
            text_positions=CONTEXT_TOKENS,
            head_widths=(96, 32, 16),
            head_dropout=(0.0, 0.0),
            max_tokens=CONTEXT_TOKENS,
            mean=0.0,
            std=1.0,
        )
    )


def score_pairs(model: ImageRewardModel, patches: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Raw rewards (P,) of P pairs from encoded pictures (P, tokens, V): many texts can share one pass through
    the vision tower.
    """
    tokens = model.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
    return model.head(tokens[:, 0]).squeeze(-1)


class Preferences(NamedTuple):
    """Texts of groups, and what they prefer; G groups, V variants, a text for each of the four whole scenes.

    Attributes:
        ids: (G, V, 4, tokens) token ids.
        better: (G, V, 4, 9, 9) bool; [..., i, j]: picture i of the group is better than j, the last being half-way.
        is_half_way: (G,) bool, whether the group has a half-way picture: its base does something that can be seen.
    """

    ids: torch.Tensor
    better: torch.Tensor
    is_half_way: torch.Tensor


def preferences(pictures: Pictures, tokenizer) -> Preferences:
    """The preferences of all groups of `mixed_group`, drawn once, on all cores."""
    groups = [(i, pictures.scenes[i : i + MIXED_GROUP]) for i in range(0, len(pictures), MIXED_GROUP)]
    tables = in_processes(partial(_preferences, tokenizer), groups, 500)
    ids, better = np.split(tables, [CONTEXT_TOKENS], axis=-1)
    half = torch.tensor([scenes[0].activity != NO_ACTIVITY for _, scenes in groups])
    size = MIXED_GROUP + 1
    return Preferences(torch.from_numpy(ids), torch.from_numpy(better != 0).unflatten(-1, (size, size)), half)


def _preferences(tokenizer, groups: list[tuple[int, list[Scene]]]) -> np.ndarray:
    """Token ids and the flattened matrix of preferences side by side, (groups, V, 4, tokens + 81) int16."""
    rng = random.Random(f"preferences {groups[0][0]}")
    texts, rows = [], []
    for _, scenes in groups:
        for _ in range(VARIANTS):
            for i in range(GROUP):
                texts.append(caption(scenes[i], rng) if rng.random() < 0.6 else base_caption(scenes[i], rng))
                rows.append(preference_matrix(texts[-1], scenes, i))
    ids = encode(tokenizer, texts).numpy().astype(np.int16)
    tables = np.concatenate([ids, np.stack(rows).reshape(len(rows), -1).astype(np.int16)], axis=1)
    return tables.reshape(len(groups), VARIANTS, GROUP, -1)


def preference_matrix(text: str, scenes: list[Scene], i: int) -> np.ndarray:
    """Which pictures of a group a text of scene `i` prefers, (9, 9) bool; the last row and column are half-way."""
    marks = [grades(text, scenes[i], other) for other in scenes]
    base = scenes[0]
    half_way = None
    if base.activity != NO_ACTIVITY and base.activity == scenes[i].activity:
        named = says(text, ACTIVITIES[base.activity][1])
        half_way = (ACTIVITY_OF_HALF_WAY if named else 1.0, *marks[0][1:])
    better = np.zeros((len(scenes) + 1,) * 2, dtype=bool)
    for a, first in enumerate([*marks, half_way]):
        for b, second in enumerate([*marks, half_way]):
            if first is not None and second is not None:
                better[a, b] = is_better(first, second)
    return better


def train(
    folder: Path,
    pictures: Pictures,
    tokenizer,
    vae,
    device,
    dtype,
    budget: Budget = BUDGET,
    name: str = "image_reward",
    hard_negatives: bool = True,
    start: dict | None = None,
    redraw_every: int = 3,
) -> ImageRewardModel:
    """Train on groups of `mixed_group`; without `hard_negatives` the worse picture is always of another scene,
    which makes, with half the layers, the weak reward of the hacking lesson.

    Args:
        start: earlier weights to begin with.
        redraw_every: steps between those with half-way pictures and with some by the autoencoder.
    """
    torch.manual_seed(hash_seed("reward weights"))
    model = new_reward_model(tokenizer, 4 if hard_negatives else 2)
    begin_with(model, start)
    ids, better, is_half_way = (t.to(device) for t in preferences(pictures, tokenizer))
    vae = vae.to(device=device, dtype=dtype).requires_grad_(False)
    n = budget.batch // MIXED_GROUP
    pad = tokenizer.pad_token_id

    def loss_fn(work, average, step, generator):
        groups = pictures.groups(n, generator)
        variant = torch.randint(VARIANTS, (n,), generator=generator, device=device)
        texts, preferred = ids[groups, variant].long(), better[groups, variant].clone()
        x = pictures.batch(pictures.members(groups).flatten(), device).unflatten(0, (n, MIXED_GROUP))
        mixed = is_half_way[groups]
        half = x[:, 0].clone()
        if step % redraw_every:  # most of a small model's work is the autoencoder's
            mixed = torch.zeros_like(mixed)
        else:
            half = half_way(vae, x[:, 0], x[:, 4], generator, dtype)
            flat, part = x.view(-1, *x.shape[2:]), slice(step // redraw_every % 3, None, 3)
            flat[part] = redraw(vae, flat[part], generator, dtype)
        preferred[~mixed, :, HALF_WAY] = False
        preferred[~mixed, :, :, HALF_WAY] = False
        x = torch.cat([x, half[:, None]], 1)
        x = degrade(x.flatten(0, 1), generator)
        patches = work.vision(normalise(x).to(dtype)).last_hidden_state.unflatten(0, (n, MIXED_GROUP + 1))
        # every text of a group meets every picture of it, and one of the next group
        shown = torch.cat([patches, patches.roll(1, 0)[:, step % MIXED_GROUP][:, None]], 1)
        n_shown = shown.shape[1]
        shown = shown[:, None].expand(-1, GROUP, -1, -1, -1).flatten(0, 2)
        asked = texts[:, :, None].expand(-1, -1, n_shown, -1).flatten(0, 2)
        scores = score_pairs(work, shown, asked, attention_mask(asked, pad)).float().unflatten(0, (n, GROUP, n_shown))
        own = scores[:, torch.arange(GROUP), torch.arange(GROUP)]  # each text's own picture
        elsewhere = F.logsigmoid(own - scores[..., -1])
        loss = -elsewhere.mean() + 1e-3 * scores.square().mean()
        if hard_negatives:
            margin = scores[..., :-1, None] - scores[..., None, :-1]
            loss = 0.2 * loss - (F.logsigmoid(margin) * preferred).sum() / preferred.sum()
            return loss, {"right": ((margin > 0) & preferred).sum() / preferred.sum()}
        return loss, {"right": (own > scores[..., -1]).float().mean()}

    fit(name, folder, model, loss_fn, budget, device, dtype)
    return standardise(model, tokenizer, pictures, device)


def attention_mask(ids: torch.Tensor, pad: int) -> torch.Tensor:
    """1 up to the end-of-text token, which the pocket tokenizer also pads with; (B, tokens)."""
    ends = (ids == pad).long().cumsum(1)
    return (ends - (ids == pad).long() == 0).long()


@torch.no_grad()
def half_way(vae, doing_it: torch.Tensor, at_rest: torch.Tensor, generator, dtype) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) whose latents lie between those of two others, at a random share of 0.2 to 0.8."""
    a, b = (vae.encode(x.to(dtype)).latent_dist.mode() for x in (doing_it, at_rest))
    share = (0.2 + 0.6 * torch.rand((len(a), 1, 1, 1), generator=generator, device=a.device)).to(a)
    return vae.decode(share * a + (1 - share) * b).sample.float().clamp(-1, 1)


@torch.inference_mode()
def standardise(model: ImageRewardModel, tokenizer, pictures: Pictures, device) -> ImageRewardModel:
    """Set mean and std so that right captions of 512 whole scenes score 0 ± 1, as ImageReward is standardised on its
    own data.
    """
    rng = random.Random(hash_seed("reward standardisation"))
    indices = [i for i in range(len(pictures)) if i % pictures.size < GROUP][:512]
    ids = encode(tokenizer, [caption(pictures.scenes[i], rng) for i in indices]).to(device)
    mask = attention_mask(ids, tokenizer.pad_token_id)
    raw = torch.cat(
        [
            model(normalise(pictures.batch(indices[i : i + 64], device)), ids[i : i + 64], mask[i : i + 64])
            for i in range(0, len(indices), 64)
        ]
    )
    model.config = replace(model.config, mean=float(raw.mean()), std=float(raw.std()))
    return model


@torch.inference_mode()
def write_levels(scorer, redraw_all, folder: Path, n: int = 32) -> None:
    """Write `level.json`: mean and standard deviation of the reward of true pictures, by prompt; "" is all of them.

    Args:
        scorer: the finished `ImageReward`.
        redraw_all: pictures -> the same as the finished autoencoder draws them, since a policy's come out of it too.
        n: pictures of random individuals for each prompt.
    """
    rng, levels, everything = random.Random("reward levels"), {}, []
    for noun in CLASSES:
        asked = [(ACTIVITIES[a][1][0], {"activity": a}) for a in activities_of(noun)]
        asked += [(ways[0], {"place": p, "activity": NO_ACTIVITY}) for p, ways in PLACES.items()]
        asked += [(ACCESSORIES[a][0], {"accessory": a, "activity": NO_ACTIVITY}) for a in accessories_of(noun)[1:]]
        for phrase, given in asked:
            text = f"a {noun} {phrase}"
            images = [render(sample_scene(rng, sample_subject(rng, noun), **given)) for _ in range(n)]
            scores = scorer(redraw_all(images), [text] * n)
            levels[text] = [round(scores.mean().item(), 4), round(scores.std().item(), 4)]
            everything.append(scores)
    together = torch.cat(everything)
    levels[""] = [round(together.mean().item(), 4), round(together.std().item(), 4)]
    (folder / "level.json").write_text(json.dumps(levels, indent=1) + "\n")


# --- how good it is ----------------------------------------------------------------------------------------------


def tested_pairs(rng: random.Random, kind: str, n: int) -> list[tuple[str, Scene, Scene]]:
    """`n` (text, better, worse) of a kind of preference, with individuals and settings drawn at random."""
    pairs = []
    while len(pairs) < n:
        scene = sample_scene(rng)
        noun, activity = scene.subject.class_noun, scene.activity
        whole = len(PARTS.get(activity, ())) == 2
        rest = replace(scene, **doing(NO_ACTIVITY))
        text = f"a {noun} {ACTIVITIES[activity][1][0]}" if activity != NO_ACTIVITY else ""
        if kind == "another activity" and text:
            other = rng.choice([a for a in activities_of(noun) if a != activity])
            pairs.append((text, scene, replace(scene, **doing(other))))
        elif kind == "rest" and text:
            pairs.append((text, scene, rest))
        elif kind == "things without the pose" and whole:
            pairs.append((text, scene, replace(scene, pose=NO_ACTIVITY)))
        elif kind == "pose without the things" and whole:
            pairs.append((text, scene, replace(scene, things=NO_ACTIVITY)))
        elif kind == "rest against things" and whole:
            pairs.append((text, replace(scene, pose=NO_ACTIVITY), rest))
        elif kind == "rest against pose" and whole:
            pairs.append((text, replace(scene, things=NO_ACTIVITY), rest))
        elif kind == "another place":
            place = rng.choice([p for p in PLACES if p != scene.place])
            pairs.append((f"a {noun} {PLACES[scene.place][0]}", scene, replace(scene, place=place)))
        elif kind == "another accessory" and len(accessories_of(noun)) > 1:
            worn = rng.choice(accessories_of(noun)[1:])
            dressed = replace(scene, accessory=worn)
            other = replace(scene, accessory=rng.choice([a for a in accessories_of(noun) if a != worn]))
            pairs.append((f"a {noun} {ACCESSORIES[worn][0]}", dressed, other))
        elif kind == "another colour":
            subject = scene.subject
            body = rng.choice([c for c in COLOURS if c not in (subject.body, subject.second)])
            text = f"a {subject.body} {noun}".replace("a orange", "an orange")
            pairs.append((text, scene, replace(scene, subject=replace(subject, body=body))))
    return pairs


PAIR_KINDS = (
    "another activity",
    "rest",
    "things without the pose",
    "pose without the things",
    "rest against things",
    "rest against pose",
    "another place",
    "another accessory",
    "another colour",
)


def ranks(scorer, kind: str, n: int) -> tuple[int, int]:
    """(right, asked): a reward's choices in `n` pairs of a kind that no training saw."""
    pairs = tested_pairs(random.Random(f"reward pairs {kind}"), kind, n)
    texts = [text for text, _, _ in pairs]
    better, worse = (scorer([render(pair[k]) for pair in pairs], texts) for k in (1, 2))
    return int((better > worse).sum()), n
