"""The model card: the quality of what was built, on pictures that no stage trained on, with n and the target."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ibkit.model.loading import load_model
from ibkit.model.sample import sample
from ibkit.pocket import world
from ibkit.pocket.build import labels, subject
from ibkit.pocket.build.autoencoder import psnr, rebuilt
from ibkit.pocket.build.clip import zero_shot_activity
from ibkit.pocket.build.common import Row, load_float, save_half
from ibkit.pocket.build.data import facts
from ibkit.pocket.build.reward import PAIR_KINDS, ranks, write_levels
from ibkit.pocket.draw import render
from ibkit.pocket.world import NO_ACCESSORY, NO_ACTIVITY, Scene, Subject
from ibkit.presets import POCKET
from ibkit.runs import hash_file
from ibkit.scorers.clip import ClipEncoder
from ibkit.scorers.dino import Dino
from ibkit.scorers.image_reward import ImageReward, WeakReward
from ibkit.scorers.judge import ANSWERS, JUDGE_WIDTHS, RATER_WIDTHS, RATERS, THINGS_TAKEN, Judge, JudgeNet

if TYPE_CHECKING:
    from ibkit.model.text_to_image import TextToImage
    from ibkit.pocket.build.stages import Build

N_PICTURES, N_PARADES, N_SAMPLES = 2000, 400, 360
STRANGER_THAN = 0.01  # share of true pictures that the judge's threshold of likeness may refuse


def write_card(build: Build) -> None:
    """Measure everything; write `MODEL_CARD.md`, `card.json` (numbers, hashes, times) and the judge's accuracy file."""
    measure_judges(build, {"judge": JUDGE_WIDTHS})
    judge = Judge.load(build.device, build.weights / "judge")
    accuracy = judge.card["accuracy"]
    model = load_model(str(build.weights / "pipeline"), device=build.device)
    targets = {"renders": 0.98, "reconstructions": 0.95}
    numbers: list[Row] = [
        (f"judge, {q}, {kind}", a[kind], target, a["n"])
        for kind, target in targets.items()
        for q, a in accuracy.items()
    ]
    numbers += _blind_spots(judge)
    numbers.append(("judge, identity under a changed pose", _identity_in_another_pose(judge), 0.97, N_PARADES))
    numbers.append(("autoencoder PSNR, dB", _psnr(build), 29.0, N_PICTURES))
    numbers += _prompt_following(model, judge)
    numbers += _scorers(build)
    numbers += subject.card_rows(build.weights)
    numbers += labels.card_rows(judge)
    _write(build, numbers)


def write_raters(build: Build) -> None:
    """Measure the simulated raters and put them on the card, if it exists; its other numbers stay."""
    measure_judges(build, dict.fromkeys(RATERS, RATER_WIDTHS))
    write_again(build, [])


def write_again(build: Build, numbers: Sequence[Row]) -> None:
    """Put numbers on the card, if it exists, in the place of those of the same names; the others stay."""
    path = build.weights / "card.json"
    if path.exists():
        kept = [(r["name"], r["value"], r["target"], r["n"]) for r in json.loads(path.read_text())["numbers"]]
        _write(build, list({row[0]: row for row in [*kept, *numbers]}.values()))


def write_counts(build: Build) -> None:
    """Put the counter on the card, and how well the adapter `counting` makes the base count."""
    facts = {name: json.loads((build.weights / name / f"{name}.json").read_text()) for name in ("counter", "counting")}
    write_again(build, [
        *(
            (f"counter, {question}, {kind}", right[kind], target, facts["counter"]["n"])
            for kind, target in {"renders": 0.97, "reconstructions": 0.93}.items()
            for question, right in facts["counter"]["accuracy"].items()
        ),
        *(
            (f"base with counting, prompts of {kind}, {question} right", value, None, facts["counting"]["n"])
            for kind, shares in facts["counting"]["right"].items()
            for question, value in shares.items()
        ),
    ])  # fmt: skip


def measure_judges(build: Build, widths: dict[str, tuple[int, ...]]) -> None:
    """Measure judges (name -> widths of its network) on held-out renders and their reconstructions by the finished
    autoencoder.

    Writes `judge/<name>.safetensors`, and `judge/<name>.json` with the network's widths and its accuracy.
    """
    scenes = build.mixed_test_pictures.scenes[:N_PICTURES]
    renders = [Image.fromarray(image) for image in build.mixed_test_pictures.images[:N_PICTURES]]
    truths = {q: torch.tensor([ANSWERS[q].index(facts(s)[q]) for s in scenes]) for q in ANSWERS}
    kinds = {"renders": renders, "reconstructions": _reconstruct(build, renders)}
    parades, others = _parades(build, "identity parades"), _parades(build, "likeness of true pictures")
    for name, width in widths.items():
        net = JudgeNet(width)
        net.load_state_dict(load_float(build.folder / f"{name}.safetensors"))
        judge = Judge(net, {}, build.device)
        accuracy: dict[str, dict[str, float]] = {q: {} for q in (*ANSWERS, "activity", "identity")}
        for kind, images in kinds.items():
            answers, _ = judge.look(images)
            right = {q: answers[q].argmax(1) == truth for q, truth in truths.items()}
            right["activity"] = right["pose"] & right["things"]
            for q, hits in right.items():
                accuracy[q][kind] = hits.float().mean().item()
        true = [judge.look(shown["reconstructions"])[1] @ judge.centres([who]).T for who, shown in others]
        judge.card["threshold"] = round(torch.cat(true).quantile(STRANGER_THAN).item(), 4)
        for kind in kinds:
            picked = torch.cat([judge.identifies(shown[kind], who) for who, shown in parades])
            accuracy["identity"][kind] = picked.mean().item()
        for q, shares in accuracy.items():
            shares["n"] = N_PARADES if q == "identity" else N_PICTURES
        save_half(net.state_dict(), build.weights / "judge" / f"{name}.safetensors")
        card = json.dumps({"widths": width, "threshold": judge.card["threshold"], "accuracy": accuracy}, indent=2)
        (build.weights / "judge" / f"{name}.json").write_text(card + "\n")


def _reconstruct(build: Build, images: Sequence[Image.Image]) -> list[Image.Image]:
    pixels = np.stack([np.asarray(image) for image in images])
    return [Image.fromarray(p) for p in rebuilt(pixels, build.vae(True), build.device, 100)]


@torch.inference_mode()
def _psnr(build: Build) -> float:
    vae, values = build.vae(True), []
    for i in range(0, N_PICTURES, 100):
        x = build.test_pictures.batch(range(i, i + 100), build.device)
        values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x))
    return torch.cat(values).mean().item()


def _parades(build: Build, name: str) -> list[tuple[Subject, dict[str, list[Image.Image]]]]:
    """Ten pictures each of new individuals, in any activity, place and accessory."""
    rng, parades = random.Random(name), []
    for _ in range(N_PARADES // 10):
        subject = world.line_up(world.sample_subject(rng))[0]
        images = [render(world.sample_scene(rng, subject)) for _ in range(10)]
        parades.append((subject, {"renders": images, "reconstructions": _reconstruct(build, images)}))
    return parades


def _blind_spots(judge: Judge) -> list[Row]:
    """How often the judge takes a mixture for the activity of which it has a part; at most the target."""
    rng, rows = random.Random("blind spots"), list[Row]()
    for kind, name, part, most in (
        ("things at rest", THINGS_TAKEN, "things", 0.03),
        ("pose without things", "judge, a pose without its things taken for the activity", "pose", 0.05),
        ("another pose", "judge, another pose among an activity's things taken for the activity", "things", 0.02),
    ):
        able = [noun for noun in world.CLASSES if world.mixtures_of(noun)[kind]]
        scenes: list[Scene] = []
        while len(scenes) < N_PARADES:
            scene = world.sample_mixture(rng, world.sample_subject(rng, rng.choice(able)), kind)
            if len(world.PARTS[getattr(scene, part)]) == 2:  # popcorn alone is the whole activity
                scenes.append(scene)
        taken = judge.agrees([render(s) for s in scenes], "activity", [getattr(s, part) for s in scenes])
        rows.append((name, taken.mean().item(), -most, len(scenes)))
    return rows


def _identity_in_another_pose(judge: Judge) -> float:
    """The share of pictures with a pose for which the judge picks the right one of eight."""
    rng, hits = random.Random("identity in another pose"), []
    for _ in range(N_PARADES // 10):
        subject = world.sample_subject(rng)
        posed = [a for a in world.activities_of(subject.class_noun) if "pose" in world.PARTS[a]]
        scenes = [world.sample_scene(rng, subject, NO_ACTIVITY) for _ in range(10)]
        images = [render(replace(scene, pose=rng.choice(posed))) for scene in scenes]
        hits.append(judge.identifies(images, subject))
    return torch.cat(hits).mean().item()


def _prompt_following(model: TextToImage, judge: Judge) -> list[Row]:
    """The judge's agreement with the prompts of base-model samples, separately for seen and held-out (class, activity)
    pairs.
    """
    rng = random.Random("base samples")
    seen = [(c, a) for c in world.CLASSES for a in world.activities_of(c) if (c, a) not in world.HELD_OUT]
    asked = [(*rng.choice(seen), rng.choice(list(world.PLACES))) for _ in range(N_SAMPLES)]
    asked += [(c, a, "") for c, a in sorted(world.HELD_OUT) for _ in range(N_SAMPLES // len(world.HELD_OUT))]
    prompts = [f"a {c} {a} {world.PLACES[p][0] if p else ''}".strip() for c, a, p in asked]
    images = sample(model, prompts, list(range(len(prompts))), POCKET.sampler)
    first, rest = slice(0, N_SAMPLES), slice(N_SAMPLES, None)
    rows = list[Row]()
    for name, question, part, target in (
        ("class", "class", first, 0.95),
        ("activity (pose and things)", "activity", first, 0.95),
        ("place", "place", first, 0.98),
        ("class of held-out pairs", "class", rest, None),
        ("activity of held-out pairs", "activity", rest, 0.85),
    ):
        column = ("class", "activity", "place").index(question)
        agrees = judge.agrees(images[part], question, [row[column] for row in asked[part]])
        rows.append((f"base model, {name}", agrees.mean().item(), target, len(agrees)))
    return rows


def _scorers(build: Build) -> list[Row]:
    clip, reward = ClipEncoder.load(build.weights, build.device), ImageReward.load(build.weights, build.device)
    weak, dino = WeakReward.load(build.weights, build.device), Dino.load(build.weights, build.device)
    named = zero_shot_activity(clip.model, build.tokenizer, build.test_pictures, 1000, build.device)
    counts: list[tuple[str, float | None, tuple[int, int]]] = [("CLIP, zero-shot activity", 0.95, named)]
    counts += [(f"image_reward, right over {kind}", 0.98, ranks(reward, kind, N_PARADES)) for kind in PAIR_KINDS]
    counts += [
        ("weak_reward, right over another activity", None, ranks(weak, "another activity", N_PARADES)),
        ("DINO, the same individual at rest over another of its class", None, _same_individual(dino)),
    ]
    write_levels(reward, lambda images: _reconstruct(build, images), build.weights / "image_reward")
    return [(name, right / n, target, n) for name, target, (right, n) in counts]


def _same_individual(dino: Dino) -> tuple[int, int]:
    """(right, asked): is a photo more like another photo of the same individual than like one of another individual of
    the class in the latter's setting?
    """
    rng, photos = random.Random("same individual"), []
    for _ in range(N_PARADES):
        me, other = world.line_up(world.sample_subject(rng), 2)
        second, first = (world.sample_scene(rng, me, NO_ACTIVITY, accessory=NO_ACCESSORY) for _ in range(2))
        photos += [first, second, replace(second, subject=other)]
    vectors = dino.embed([render(s) for s in photos]).view(N_PARADES, 3, -1)
    same, different = ((vectors[:, 0] * vectors[:, k]).sum(1) for k in (1, 2))
    return int((same > different).sum()), N_PARADES


def _write(build: Build, numbers: Sequence[Row]) -> None:
    files = sorted(p for p in build.weights.rglob("*") if p.is_file() and p.name not in ("card.json", "MODEL_CARD.md"))
    seconds = json.loads((build.folder / "seconds.json").read_text())
    raters = {name: json.loads((build.weights / "judge" / f"{name}.json").read_text()) for name in RATERS}
    hashes = {str(p.relative_to(build.weights)): {"sha256": hash_file(p), "bytes": p.stat().st_size} for p in files}
    reached = [target is None or reaches(value, target) for _, value, target, _ in numbers]
    fields = ("name", "value", "target", "n")
    rows = [dict(zip(fields, n, strict=True)) | {"reached": r} for n, r in zip(numbers, reached, strict=True)]
    card = {"numbers": rows, "files": hashes, "stages": seconds, "raters": raters}
    (build.weights / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    quality = [
        (n, f"{v:.3f}", _target(t), k, "" if t is None else "reached" if r else "**short of the target**")
        for (n, v, t, k), r in zip(numbers, reached, strict=True)
    ]
    votes = [
        (name, *(f"{a['renders']:.3f} / {a['reconstructions']:.3f}" for a in rater["accuracy"].values()))
        for name, rater in raters.items()
    ]
    times = [(stage, s["seconds"], s["device"], s.get("note", "")) for stage, s in seconds.items()]
    text = f"""# Pocket weights

Built by `python -m ibkit.pocket.build`; numbers of this very build, on pictures that no stage trained on.

{_table("| quantity | value | target | n | |", quality)}

{len(RATERS)} small judges vote with the judge as **simulated** raters in notebook 07; their share of right
answers on the same pictures, renders / reconstructions (n = {N_PICTURES}; identity {N_PARADES}):

{_table(f"| rater | {' | '.join(raters[RATERS[0]]['accuracy'])} |", votes)}

{sum(p.stat().st_size for p in files) / 1e6:.1f} MB in all, fp16.

{_table("| stage | seconds | device | |", times)}
"""
    (build.weights / "MODEL_CARD.md").write_text(text)


def _table(head: str, rows: Iterable[tuple]) -> str:
    """A table in Markdown below its first line."""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def reaches(value: float, target: float) -> bool:
    """Whether a value reaches its target; a target below 0 means: at most -target, for shares of mistakes."""
    return value <= -target if target < 0 else value >= target


def _target(target: float | None) -> str:
    return "–" if target is None else f"≤ {-target:g}" if target < 0 else f"≥ {target:g}"
