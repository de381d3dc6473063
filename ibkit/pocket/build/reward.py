"""The pocket reward model: ImageReward's architecture, trained on preferences as ImageReward was (Xu et al. 2023, eq.
1), with hard negatives.

A preference is: for this text, this picture rather than that one. Pictures of one group differ in what the text says
(`grades`): the activity, its pose or its things alone, the place, the accessory, the colour. A picture with a higher
grade in some aspect and a lower one in none is better. So the whole activity beats its things around a subject at rest,
and those beat rest without them. While a policy learns, it draws pictures half-way between activity and rest. Such a
picture, mixed in the autoencoder's latents, is worse than the activity and better than either part. The worse picture
may also be of another scene. Some pictures are reconstructions by the autoencoder, from noisy latents.
"""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ibkit.pocket import world
from ibkit.pocket.build import data
from ibkit.pocket.build.autoencoder import redraw
from ibkit.pocket.build.clip import degrade, normalise
from ibkit.pocket.build.common import Budget, begin_with, fit, hash_seed
from ibkit.pocket.build.data import GROUP, MIXED_GROUP, Pictures
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.draw import render
from ibkit.pocket.words import caption
from ibkit.pocket.world import NO_ACTIVITY, Scene
from ibkit.scorers.base import batches
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


def preferences(pictures: Pictures, tokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts of all G groups of `mixed_group`, and what they prefer; V variants of a text for each whole scene.

    Returns:
        ids: (G, V, 4, tokens) token ids.
        better: (G, V, 4, 9, 9) bool; [..., i, j]: picture i of the group is better than j, the last being half-way.
        is_half_way: (G,) bool; whether the group has a half-way picture, which needs an activity of its base.
    """
    groups = [(i, pictures.scenes[i : i + MIXED_GROUP]) for i in range(0, len(pictures), MIXED_GROUP)]
    tables = data.in_processes(partial(_preferences, tokenizer), groups, 500)
    ids, better = np.split(tables, [CONTEXT_TOKENS], axis=-1)
    half = torch.tensor([scenes[0].activity != NO_ACTIVITY for _, scenes in groups])
    return torch.from_numpy(ids), torch.from_numpy(better != 0).unflatten(-1, (MIXED_GROUP + 1,) * 2), half


def _preferences(tokenizer, groups: list[tuple[int, list[Scene]]]) -> np.ndarray:
    """Token ids and the flattened matrix of preferences side by side, (groups, V, 4, tokens + 81) int16."""
    rng = random.Random(f"preferences {groups[0][0]}")
    texts, rows = [], []
    for _, scenes in groups:
        for _ in range(VARIANTS):
            for i in range(GROUP):
                texts.append(caption(scenes[i], rng) if rng.random() < 0.6 else data.base_caption(scenes[i], rng))
                rows.append(preference_matrix(texts[-1], scenes, i))
    ids = data.encode(tokenizer, texts).numpy().astype(np.int16)
    tables = np.concatenate([ids, np.stack(rows).reshape(len(rows), -1).astype(np.int16)], axis=1)
    return tables.reshape(len(groups), VARIANTS, GROUP, -1)


def preference_matrix(text: str, scenes: list[Scene], i: int) -> np.ndarray:
    """Which pictures of a group a text of scene `i` prefers, (9, 9) bool; the last row and column are half-way."""
    marks = [data.grades(text, scenes[i], other) for other in scenes]
    activity = scenes[0].activity
    if activity != NO_ACTIVITY and activity == scenes[i].activity:
        named = data.says(text, world.ACTIVITIES[activity][1])
        marks.append((ACTIVITY_OF_HALF_WAY if named else 1.0, *marks[0][1:]))
    better = np.zeros((len(scenes) + 1,) * 2, dtype=bool)
    better[: len(marks), : len(marks)] = [[data.is_better(first, second) for second in marks] for first in marks]
    return better


def train(
    folder: Path,
    pictures: Pictures,
    tokenizer,
    vae,
    device,
    dtype,
    budget: Budget,
    name: str,
    hard_negatives: bool = True,
    start: dict | None = None,
    redraw_every: int = 3,
) -> ImageRewardModel:
    """Train on groups of `mixed_group`.

    Args:
        hard_negatives: without them the worse picture is always of another scene; with half the layers, this makes the
            weak reward of the hacking lesson.
        start: earlier weights to begin with.
        redraw_every: steps from one batch with half-way pictures and reconstructions to the next; making them is most
            of the work.
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
        half, without = x[:, 0].clone(), torch.ones_like(is_half_way[groups])
        if step % redraw_every == 0:
            half, without = half_way(vae, x[:, 0], x[:, 4], generator, dtype), ~is_half_way[groups]
            flat, part = x.view(-1, *x.shape[2:]), slice(step // redraw_every % 3, None, 3)
            flat[part] = redraw(vae, flat[part], generator, dtype)
        preferred[without, :, HALF_WAY] = False
        preferred[without, :, :, HALF_WAY] = False
        x = degrade(torch.cat([x, half[:, None]], 1).flatten(0, 1), generator)
        patches = work.vision(normalise(x).to(dtype)).last_hidden_state.unflatten(0, (n, MIXED_GROUP + 1))
        # every text of a group is paired with every picture of it, and with one of the next group
        shown = torch.cat([patches, patches.roll(1, 0)[:, step % MIXED_GROUP][:, None]], 1)
        n_shown = shown.shape[1]
        shown = shown[:, None].expand(-1, GROUP, -1, -1, -1).flatten(0, 2)
        asked = texts[:, :, None].expand(-1, -1, n_shown, -1).flatten(0, 2)
        read = work.text(asked, attention_mask=attention_mask(asked, pad), encoder_hidden_states=shown)
        scores = work.head(read.last_hidden_state[:, 0]).squeeze(-1).float().unflatten(0, (n, GROUP, n_shown))
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
    """Pictures (B, 3, 64, 64) whose latents interpolate between those of two others, with a weight of 0.2 to 0.8."""
    a, b = (vae.encode(x.to(dtype)).latent_dist.mode() for x in (doing_it, at_rest))
    share = (0.2 + 0.6 * torch.rand((len(a), 1, 1, 1), generator=generator, device=a.device)).to(a)
    return vae.decode(share * a + (1 - share) * b).sample.float().clamp(-1, 1)


@torch.inference_mode()
def standardise(model: ImageRewardModel, tokenizer, pictures: Pictures, device) -> ImageRewardModel:
    """Set mean and std so that right captions of 512 whole scenes score 0 ± 1; ImageReward does so on its own data."""
    rng = random.Random(hash_seed("reward standardisation"))
    indices = [i for i in range(len(pictures)) if i % pictures.size < GROUP][:512]
    ids = data.encode(tokenizer, [caption(pictures.scenes[i], rng) for i in indices]).to(device)
    mask = attention_mask(ids, tokenizer.pad_token_id)
    parts = zip(batches(indices, 64), ids.split(64), mask.split(64), strict=True)
    raw = torch.cat([model(normalise(pictures.batch(some, device)), *texts) for some, *texts in parts])
    model.config = replace(model.config, mean=float(raw.mean()), std=float(raw.std()))
    return model


@torch.inference_mode()
def write_levels(scorer, redraw_all, folder: Path, n: int = 32) -> None:
    """Write `level.json`: mean and standard deviation of the reward of true pictures, by prompt; "" is all of them.

    Args:
        scorer: the finished `ImageReward`.
        redraw_all: pictures -> their reconstructions, since a policy's pictures come from the autoencoder too.
        n: pictures of random individuals for each prompt.
    """
    rng, scores = random.Random("reward levels"), {}
    asked: list[tuple[str, tuple[str, str | None, str | None]]]
    for noun in world.CLASSES:
        asked = [(activity, (activity, None, None)) for activity in world.activities_of(noun)]
        asked += [(ways[0], (NO_ACTIVITY, place, None)) for place, ways in world.PLACES.items()]
        asked += [(world.ACCESSORIES[worn][0], (NO_ACTIVITY, None, worn)) for worn in world.accessories_of(noun)[1:]]
        for phrase, given in asked:
            text = f"a {noun} {phrase}"
            images = [render(world.sample_scene(rng, world.sample_subject(rng, noun), *given)) for _ in range(n)]
            scores[text] = scorer(redraw_all(images), [text] * n)
    scores[""] = torch.cat(list(scores.values()))
    levels = {text: [round(s.mean().item(), 4), round(s.std().item(), 4)] for text, s in scores.items()}
    (folder / "level.json").write_text(json.dumps(levels, indent=1) + "\n")


# --- how good it is ----------------------------------------------------------------------------------------------


# kind -> parts of the activity in the better and in the worse picture
PART_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rest": (("pose", "things"), ()),
    "things without the pose": (("pose", "things"), ("things",)),
    "pose without the things": (("pose", "things"), ("pose",)),
    "rest against things": (("things",), ()),
    "rest against pose": (("pose",), ()),
}
PAIR_KINDS = ("another activity", *PART_KINDS, "another place", "another accessory", "another colour")


def tested_pairs(rng: random.Random, kind: str, n: int) -> list[tuple[str, Scene, Scene]]:
    """`n` (text, better, worse) of a kind of preference, with random individuals and settings."""
    pairs: list[tuple[str, Scene, Scene]] = []
    while len(pairs) < n:
        scene = world.sample_scene(rng)
        subject, activity = scene.subject, scene.activity
        noun, parts = subject.class_noun, world.PARTS.get(activity, ())
        if kind == "another activity" and parts:
            other = rng.choice([a for a in world.activities_of(noun) if a != activity])
            pairs.append((f"a {noun} {activity}", scene, replace(scene, **world.doing(other))))
        elif kind == "rest" and parts or kind in PART_KINDS and len(parts) == 2:
            better, worse = (world.keeping(scene, *kept) for kept in PART_KINDS[kind])
            pairs.append((f"a {noun} {activity}", better, worse))
        elif kind == "another place":
            place = rng.choice([p for p in world.PLACES if p != scene.place])
            pairs.append((f"a {noun} {world.PLACES[scene.place][0]}", scene, replace(scene, place=place)))
        elif kind == "another accessory" and len(world.accessories_of(noun)) > 1:
            worn = rng.choice(world.accessories_of(noun)[1:])
            without = replace(scene, accessory=rng.choice([a for a in world.accessories_of(noun) if a != worn]))
            pairs.append((f"a {noun} {world.ACCESSORIES[worn][0]}", replace(scene, accessory=worn), without))
        elif kind == "another colour":
            body = rng.choice([c for c in world.COLOURS if c not in (subject.body, subject.second)])
            text = f"a {subject.body} {noun}".replace("a orange", "an orange")
            pairs.append((text, scene, replace(scene, subject=replace(subject, body=body))))
    return pairs


def ranks(scorer, kind: str, n: int) -> tuple[int, int]:
    """(right, asked): how many of `n` unseen pairs of a kind the reward orders rightly."""
    pairs = tested_pairs(random.Random(f"reward pairs {kind}"), kind, n)
    texts, *sides = zip(*pairs, strict=True)
    better, worse = (scorer([render(scene) for scene in scenes], texts) for scenes in sides)
    return int((better > worse).sum()), n
