"""The model card: the quality of what was built, measured on pictures that no stage trained on, with n and the
target beside it.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ibkit.pocket.build import labels, subject
from ibkit.pocket.build.autoencoder import psnr
from ibkit.pocket.build.clip import with_activity, zero_shot_activity
from ibkit.pocket.build.common import load_float, save_half
from ibkit.pocket.build.data import facts
from ibkit.pocket.build.reward import PAIR_KINDS, ranks, write_levels
from ibkit.pocket.draw import render
from ibkit.pocket.world import (
    CLASSES,
    HELD_OUT,
    NO_ACCESSORY,
    NO_ACTIVITY,
    PARTS,
    PLACES,
    Subject,
    activities_of,
    line_up,
    mixtures_of,
    sample_mixture,
    sample_scene,
    sample_subject,
)
from ibkit.runs import hash_file
from ibkit.scorers.judge import ANSWERS, JUDGE_WIDTHS, RATER_WIDTHS, RATERS, THINGS_TAKEN, Judge, JudgeNet, to_tensor

if TYPE_CHECKING:
    from ibkit.pocket.build.stages import Build

N_PICTURES, N_PARADES, N_SAMPLES = 2000, 400, 360
STRANGER_THAN = 0.01  # share of true pictures that may be less like their individual than what a judge accepts


def write_card(build: Build) -> None:
    """Measure everything, write `MODEL_CARD.md`, `card.json` (numbers, recipe, hashes) and the judge's own
    accuracy file.
    """
    from ibkit.model.text_to_image import load_model

    measure_judges(build, {"judge": JUDGE_WIDTHS})
    judge = Judge.load(build.device, build.weights / "judge")
    accuracy = judge.card["accuracy"]
    model = load_model(str(build.weights / "pipeline"), device=build.device)
    numbers = [(f"judge, {q}, renders", a["renders"], 0.98, a["n"]) for q, a in accuracy.items()]
    numbers += [(f"judge, {q}, reconstructions", a["reconstructions"], 0.95, a["n"]) for q, a in accuracy.items()]
    numbers += _blind_spots(judge)
    numbers.append(("judge, identity under a changed pose", _identity_in_another_pose(judge), 0.97, N_PARADES))
    numbers.append(("autoencoder PSNR, dB", _psnr(build), 29.0, N_PICTURES))
    numbers += _prompt_following(model, judge)
    numbers += _scorers(build)
    numbers += subject.card_rows(build.weights)
    numbers += labels.card_rows(judge)
    _write(build, numbers)


def write_raters(build: Build) -> None:
    """Measure the simulated raters and, where there is a card already, put them on it; its other numbers stay."""
    measure_judges(build, dict.fromkeys(RATERS, RATER_WIDTHS))
    path = build.weights / "card.json"
    if path.exists():
        _write(build, [(r["name"], r["value"], r["target"], r["n"]) for r in json.loads(path.read_text())["numbers"]])


def measure_judges(build: Build, widths: dict[str, tuple[int, ...]]) -> None:
    """Measure judges on pictures that no stage trained on: held-out renders, and the finished autoencoder's pictures of
    them.

    Writes `judge/<name>.safetensors`, and `judge/<name>.json` with the network's widths and its accuracy.

    Args:
        widths: name of a trained judge -> widths of its network.
    """
    scenes = build.mixed_test_pictures.scenes[:N_PICTURES]
    renders = [Image.fromarray(build.mixed_test_pictures.images[i]) for i in range(N_PICTURES)]
    truths = {q: torch.tensor([ANSWERS[q].index(facts(s)[q]) for s in scenes]) for q in ANSWERS}
    kinds = {"renders": renders, "reconstructions": _reconstruct(build, renders)}
    parades, others = _parades(build, "identity parades"), _parades(build, "likeness of true pictures")
    for name, width in widths.items():
        net = JudgeNet(width)
        net.load_state_dict(load_float(build.folder / f"{name}.safetensors"))
        judge = Judge(net, {}, build.device)
        accuracy = {q: {} for q in (*ANSWERS, "activity", "identity")}
        for kind, images in kinds.items():
            answers, _ = judge.look(images)
            right = {q: answers[q].argmax(1) == truth for q, truth in truths.items()}
            right["activity"] = right["pose"] & right["things"]
            for q, hits in right.items():
                accuracy[q][kind] = hits.float().mean().item()
        true = [judge.look(shown["reconstructions"])[1] @ judge.centres([who]).T for who, shown in others]
        judge.card["threshold"] = round(torch.cat(true).quantile(STRANGER_THAN).item(), 4)
        picked = {kind: [] for kind in kinds}
        for who, shown in parades:
            for kind, images in shown.items():
                picked[kind].append(judge.identifies(images, who))
        accuracy["identity"] = {kind: torch.cat(hits).float().mean().item() for kind, hits in picked.items()}
        for q, shares in accuracy.items():
            shares["n"] = N_PARADES if q == "identity" else N_PICTURES
        save_half(net.state_dict(), build.weights / "judge" / f"{name}.safetensors")
        card = json.dumps({"widths": width, "threshold": judge.card["threshold"], "accuracy": accuracy}, indent=2)
        (build.weights / "judge" / f"{name}.json").write_text(card + "\n")


def _reconstruct(build: Build, images: list[Image.Image]) -> list[Image.Image]:
    vae, decoded = build.vae(True), []
    with torch.inference_mode():
        for i in range(0, len(images), 100):
            x = vae.decode(vae.encode(to_tensor(images[i : i + 100]).to(build.device)).latent_dist.mode()).sample
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            decoded += [Image.fromarray(p) for p in pixels]
    return decoded


def _psnr(build: Build) -> float:
    vae, pictures = build.vae(True), build.test_pictures
    values = []
    with torch.inference_mode():
        for i in range(0, N_PICTURES, 100):
            x = pictures.batch(range(i, i + 100), build.device)
            values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x))
    return torch.cat(values).mean().item()


def _parades(build: Build, name: str) -> list[tuple[Subject, dict[str, list[Image.Image]]]]:
    """Ten pictures each of fresh individuals in any activity, place and accessory: does a judge pick the right one of
    eight?
    """
    rng, parades = random.Random(name), []
    for _ in range(N_PARADES // 10):
        subject = line_up(sample_subject(rng))[0]
        images = [render(sample_scene(rng, subject)) for _ in range(10)]
        parades.append((subject, {"renders": images, "reconstructions": _reconstruct(build, images)}))
    return parades


def _blind_spots(judge: Judge) -> list[tuple[str, float, float, int]]:
    """How often the judge takes a mixture for the activity of which it has a part; at most the target."""
    rng, rows = random.Random("blind spots"), []
    for kind, name, part, most in (
        ("things at rest", THINGS_TAKEN, "things", 0.03),
        ("pose without things", "judge, a pose without its things taken for the activity", "pose", 0.05),
        ("another pose", "judge, another pose among an activity's things taken for the activity", "things", 0.02),
    ):
        able = [noun for noun in CLASSES if mixtures_of(noun)[kind]]
        scenes = []
        while len(scenes) < N_PARADES:
            scene = sample_mixture(rng, sample_subject(rng, rng.choice(able)), kind)
            if len(PARTS[getattr(scene, part)]) == 2:  # popcorn alone is the whole activity
                scenes.append(scene)
        taken = judge.agrees([render(s) for s in scenes], "activity", [getattr(s, part) for s in scenes])
        rows.append((name, taken.mean().item(), -most, len(scenes)))
    return rows


def _identity_in_another_pose(judge: Judge) -> float:
    """The share of pictures with a pose for which the judge picks the right one of eight."""
    rng, hits = random.Random("identity in another pose"), []
    for _ in range(N_PARADES // 10):
        subject = sample_subject(rng)
        posed = [a for a in activities_of(subject.class_noun) if "pose" in PARTS[a]]
        scenes = [sample_scene(rng, subject, NO_ACTIVITY) for _ in range(10)]
        images = [render(replace(scene, pose=rng.choice(posed))) for scene in scenes]
        hits.append(judge.identifies(images, subject))
    return torch.cat(hits).mean().item()


def _prompt_following(model, judge) -> list[tuple[str, float, float, int]]:
    """The judge's agreement with the prompts of base-model samples, seen and held-out (class, activity) pairs apart."""
    from ibkit.model.sample import sample
    from ibkit.presets import POCKET

    rng = random.Random("base samples")
    seen = [(c, a) for c in CLASSES for a in activities_of(c) if (c, a) not in HELD_OUT]
    asked = [(*rng.choice(seen), rng.choice(list(PLACES))) for _ in range(N_SAMPLES)]
    asked += [(c, a, "") for c, a in sorted(HELD_OUT) for _ in range(N_SAMPLES // len(HELD_OUT))]
    prompts = [f"a {c} {a} {PLACES[p][0] if p else ''}".strip() for c, a, p in asked]
    images = sample(model, prompts, list(range(len(prompts))), POCKET.sampler)
    first, rest = slice(0, N_SAMPLES), slice(N_SAMPLES, None)

    def agreement(question: str, column: int, part: slice) -> float:
        return judge.agrees(images[part], question, [row[column] for row in asked[part]]).mean().item()

    n_rest = len(asked) - N_SAMPLES
    return [
        ("base model, class", agreement("class", 0, first), 0.95, N_SAMPLES),
        ("base model, activity (pose and things)", agreement("activity", 1, first), 0.95, N_SAMPLES),
        ("base model, place", agreement("place", 2, first), 0.98, N_SAMPLES),
        ("base model, class of held-out pairs", agreement("class", 0, rest), None, n_rest),
        ("base model, activity of held-out pairs", agreement("activity", 1, rest), 0.85, n_rest),
    ]


def _scorers(build: Build) -> list[tuple[str, float, float | None, int]]:
    from ibkit.scorers.clip import ClipEncoder
    from ibkit.scorers.dino import Dino
    from ibkit.scorers.image_reward import ImageReward, WeakReward

    pictures, rows = build.test_pictures, []
    encoder = ClipEncoder.load(build.weights, build.device)
    right, n = zero_shot_activity(encoder.model, build.tokenizer, pictures, with_activity(pictures, 1000), build.device)
    rows.append(("CLIP, zero-shot activity", right / n, 0.95, n))
    reward = ImageReward.load(build.weights, build.device)
    for kind in PAIR_KINDS:
        right, n = ranks(reward, kind, N_PARADES)
        rows.append((f"image_reward, right over {kind}", right / n, 0.98, n))
    right, n = ranks(WeakReward.load(build.weights, build.device), "another activity", N_PARADES)
    rows.append(("weak_reward, right over another activity", right / n, None, n))
    right, n = _same_individual(Dino.load(build.weights, build.device))
    rows.append(("DINO, the same individual at rest over another of its class", right / n, None, n))
    write_levels(reward, lambda images: _reconstruct(build, images), build.weights / "image_reward")
    return rows


def _same_individual(dino) -> tuple[int, int]:
    """(right, asked): a photo is more like another photo of the same individual than like one of another of its class
    in the very same setting.
    """
    rng, photos = random.Random("same individual"), []
    for _ in range(N_PARADES):
        me, other = line_up(sample_subject(rng), 2)
        second = sample_scene(rng, me, NO_ACTIVITY, accessory=NO_ACCESSORY)
        photos += [sample_scene(rng, me, NO_ACTIVITY, accessory=NO_ACCESSORY), second, replace(second, subject=other)]
    vectors = dino.embed([render(s) for s in photos]).view(N_PARADES, 3, -1)
    same, different = ((vectors[:, 0] * vectors[:, k]).sum(1) for k in (1, 2))
    return int((same > different).sum()), N_PARADES


def _write(build: Build, numbers: list[tuple[str, float, float | None, int]]) -> None:
    files = sorted(p for p in build.weights.rglob("*") if p.is_file() and p.name not in ("card.json", "MODEL_CARD.md"))
    seconds = json.loads((build.folder / "seconds.json").read_text())
    raters = {name: json.loads((build.weights / "judge" / f"{name}.json").read_text()) for name in RATERS}
    card = {
        "numbers": [
            {"name": n, "value": v, "target": t, "n": k, "reached": t is None or reaches(v, t)}
            for n, v, t, k in numbers
        ],
        "files": {
            str(p.relative_to(build.weights)): {"sha256": hash_file(p), "bytes": p.stat().st_size} for p in files
        },
        "stages": seconds,
        "raters": raters,
    }
    (build.weights / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    lines = [
        "# Pocket weights",
        "",
        "Built by `python -m ibkit.pocket.build`; numbers of this very build, on pictures that no stage trained on.",
        "",
    ]
    lines += ["| quantity | value | target | n | |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {v:.3f} | {_target(t)} | {k} | {_verdict(v, t)} |" for n, v, t, k in numbers]
    lines += [
        "",
        f"{len(RATERS)} small judges vote with the judge as **simulated** raters in notebook 07; their share of right",
        f"answers on the same pictures, renders / reconstructions (n = {N_PICTURES}; identity {N_PARADES}):",
        "",
        f"| rater | {' | '.join(raters[RATERS[0]]['accuracy'])} |",
        "|---" * (len(raters[RATERS[0]]["accuracy"]) + 1) + "|",
    ]
    for name, rater in raters.items():
        shares = [f"{a['renders']:.3f} / {a['reconstructions']:.3f}" for a in rater["accuracy"].values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    lines += [
        "",
        f"{sum(p.stat().st_size for p in files) / 1e6:.1f} MB in all, fp16.",
        "",
        "| stage | seconds | device | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {stage} | {s['seconds']} | {s['device']} | {s.get('note', '')} |" for stage, s in seconds.items()]
    (build.weights / "MODEL_CARD.md").write_text("\n".join(lines) + "\n")


def reaches(value: float, target: float) -> bool:
    """A target below 0 is the most that a share of mistakes may be."""
    return value <= -target if target < 0 else value >= target


def _target(target: float | None) -> str:
    return "–" if target is None else f"≤ {-target:g}" if target < 0 else f"≥ {target:g}"


def _verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return "reached" if reaches(value, target) else "**short of the target**"
