"""Training pictures in groups of scenes that differ in one thing each: every batch holds its own hard negatives."""

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ibkit.pocket import world
from ibkit.pocket.build.common import cached
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.draw import render
from ibkit.pocket.words import caption
from ibkit.pocket.world import NO_ACCESSORY, NO_ACTIVITY, Scene

GROUP = 4  # scenes of a group: a base, another activity, another place or accessory, another individual
MIXED_GROUP = 8  # those four; the base at rest, its things alone, its pose alone, and two activities mixed


def scene_group(seed: int, index: int) -> list[Scene]:
    """A base scene and three that differ from it in one respect each; a pure function of (seed, index)."""
    return _one_difference(random.Random(f"{seed}/{index}"))


def _one_difference(rng: random.Random) -> list[Scene]:
    base = world.sample_scene(rng)
    subject = base.subject
    others = [a for a in world.activities_of(subject.class_noun, with_none=True) if a != base.activity]
    other_activity = replace(base, **world.doing(rng.choice(others)))
    worn = [a for a in world.accessories_of(subject.class_noun) if a != base.accessory]
    if worn and rng.random() < 0.4:
        other_setting = replace(base, accessory=rng.choice(worn))
    else:
        other_setting = replace(base, place=rng.choice([p for p in world.PLACES if p != base.place]))
    body = rng.choice([c for c in world.COLOURS if c not in (subject.body, subject.second)])
    other_one = replace(base, subject=replace(subject, body=body))
    return [base, other_activity, other_setting, other_one]


def mixed_group(seed: int, index: int) -> list[Scene]:
    """`scene_group`, then its base at rest, with its things alone, with its pose alone, and with two activities mixed.

    Where the base has no such part (popcorn has no pose), the scene is another mixture of the same subject.
    """
    rng = random.Random(f"{seed}/{index}")
    group = _one_difference(rng)
    base = group[0]
    whole = len(world.PARTS.get(base.activity, ())) == 2

    def mixture() -> Scene:
        drawn = world.sample_mixture(rng, base.subject)
        return replace(base, pose=drawn.pose, things=drawn.things)

    rest = mixture() if base.activity == NO_ACTIVITY else world.keeping(base)
    things, pose = (world.keeping(base, part) if whole else mixture() for part in ("things", "pose"))
    if not whole:
        return [*group, rest, things, pose, mixture()]
    pairs = world.mixtures_of(base.subject.class_noun)["another pose"]
    another, among = rng.choice([pair for pair in pairs if base.activity in pair])
    return [*group, rest, things, pose, replace(base, pose=another, things=among)]


def in_processes(work: Callable[[Sequence], np.ndarray], items: Sequence, size: int) -> np.ndarray:
    """Apply `work` to pieces of `size` items on all cores, and concatenate the results in order."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(work, [items[i : i + size] for i in range(0, len(items), size)])))


def _render(scenes: Sequence[Scene]) -> np.ndarray:
    return np.stack([np.asarray(render(scene)) for scene in scenes])


class Pictures:
    """Rendered groups of scenes, which `group` makes of (seed, index), `size` to each: `images` uint8 (N, 64, 64, 3),
    `scenes` (N,); the images are cached in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        seed: int,
        n_groups: int,
        group: Callable[[int, int], list[Scene]] = scene_group,
        size: int = GROUP,
    ):
        self.seed, self.n_groups, self.size = seed, n_groups, size
        self.scenes = [scene for i in range(n_groups) for scene in group(seed, i)]
        path = folder / f"{name}-{seed}-{n_groups}.npy"
        self.images = cached(path, lambda: in_processes(_render, self.scenes, 1000))
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices, device: torch.device) -> torch.Tensor:
        """Pictures as float (B, 3, 64, 64) in [-1, 1]. A GPU keeps a copy of all of them: 12 kB each."""
        if device.type == "cpu":
            return to_range(self.images[np.asarray(indices)], device)
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(np.asarray(self.images)).to(device)
        return to_range(self._on_device[device][torch.as_tensor(indices, device=device)], device)

    def groups(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of `n` random groups (n,), on the generator's device."""
        return torch.randint(self.n_groups, (n,), generator=generator, device=generator.device)

    def members(self, groups: torch.Tensor) -> torch.Tensor:
        """Indices of the pictures of groups (n,) -> (n, size)."""
        return groups[:, None] * self.size + torch.arange(self.size, device=groups.device)

    @cached_property
    def seen(self) -> np.ndarray:
        """Indices that the diffusion model may train on: whole activities or rest; no held-out pair, and none of the
        subjects that users personalize.
        """
        reserved = {*world.DEMO_SUBJECTS.values(), world.RARE_SUBJECT}

        def allowed(scene: Scene) -> bool:
            return (scene.subject.class_noun, scene.activity) not in world.HELD_OUT and scene.subject not in reserved

        return np.array([i for i, scene in enumerate(self.scenes) if i % self.size < GROUP and allowed(scene)])


def to_range(images: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pictures of bytes (B, H, W, 3) as float (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def says(text: str, ways: Sequence[str]) -> bool:
    return any(way in text for way in ways)


def grades(text: str, scene: Scene, other: Scene) -> tuple[float, ...]:
    """How far `other`, a scene of the same group, agrees with `text`, a caption of `scene`, in each aspect.

    The aspects are activity, place, accessory and colour. A grade is 1 where the scene agrees or the text says nothing;
    one part of a two-part activity is worth half.
    """
    activity, parts = scene.activity, world.PARTS.get(scene.activity, ())
    named = parts and says(text, world.ACTIVITIES[activity][1])
    colour = f"{scene.subject.body} {scene.subject.class_noun}"
    return (
        sum(getattr(other, part) == activity for part in parts) / len(parts) if named else 1.0,
        float(other.place == scene.place or not says(text, world.PLACES[scene.place])),
        float(other.accessory == scene.accessory or not says(text, world.ACCESSORIES.get(scene.accessory, ()))),
        float(other.subject.body == scene.subject.body or colour not in text),
    )


def is_better(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first of two `grades` is at least as high in every aspect and higher in one."""
    return all(a >= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def partial_caption(scene: Scene, rng: random.Random, whose: bool = False) -> str:
    """A caption that leaves whole parts out (the subject only without `whose`), such as "playing tennis in the park".

    The model thereby learns an activity apart from the class, even of pairs that it never sees together.
    """
    parts = [rng.choice((f"a {scene.subject.class_noun}", f"a {scene.subject.body} {scene.subject.class_noun}"))]
    if scene.accessory != NO_ACCESSORY:
        parts.append(rng.choice(world.ACCESSORIES[scene.accessory]))
    if scene.activity != NO_ACTIVITY:
        parts.append(rng.choice(world.ACTIVITIES[scene.activity][1]))
    parts.append(rng.choice(world.PLACES[scene.place]))
    kept = [part for i, part in enumerate(parts) if (whose and i == 0) or rng.random() < 0.5]
    return " ".join(kept or [rng.choice(parts)]).replace("a orange", "an orange")


def base_caption(scene: Scene, rng: random.Random) -> str:
    """What the diffusion model reads: a caption, a partial one, or the plain prompt of an evaluation."""
    return _any_caption(scene, rng, 0.3, 0.4, whose=False)


def naming_caption(scene: Scene, rng: random.Random) -> str:
    """What the diffusion model reads at the end of its training: the same, always with the class."""
    return _any_caption(scene, rng, 0.2, 0.5, whose=True)


def _any_caption(scene: Scene, rng: random.Random, partly: float, plainly: float, whose: bool) -> str:
    draw = rng.random()
    if draw < partly:
        return partial_caption(scene, rng, whose)
    if draw < plainly and scene.activity != NO_ACTIVITY and scene.accessory == NO_ACCESSORY:
        return f"a {scene.subject.class_noun} {scene.activity}"
    return caption(scene, rng)


def token_table(
    pictures: Pictures, tokenizer, write: Callable[[Scene, random.Random], str], n_variants: int
) -> torch.Tensor:
    """Token ids of `n_variants` captions of every picture, (N, n_variants, tokens) int16."""
    work = partial(_tokens, tokenizer, write, n_variants, pictures.seed)
    return torch.from_numpy(in_processes(work, list(enumerate(pictures.scenes)), 4000))


def _tokens(tokenizer, write, n_variants: int, seed: int, numbered: Sequence[tuple[int, Scene]]) -> np.ndarray:
    rng = random.Random(f"{write.__name__} {seed} {numbered[0][0]}")
    texts = [write(scene, rng) for _, scene in numbered for _ in range(n_variants)]
    return encode(tokenizer, texts).numpy().astype(np.int16).reshape(len(numbered), n_variants, -1)


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (B, CONTEXT_TOKENS), padded and cut."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_TOKENS, return_tensors="pt")[
        "input_ids"
    ]


def facts(scene: Scene) -> dict[str, str]:
    """The answers to the judge's questions about a scene."""
    asked = ("pose", "things", "place", "accessory")
    return {"class": scene.subject.class_noun} | {question: getattr(scene, question) for question in asked}
