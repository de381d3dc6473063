"""The model card: the quality of what was built, measured on pictures that no stage trained on, with n and the
target beside it.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ibkit.pocket.build.autoencoder import psnr
from ibkit.pocket.build.clip import with_activity, zero_shot_activity
from ibkit.pocket.build.common import load_float, save_half
from ibkit.pocket.build.data import facts
from ibkit.pocket.build.reward import ranks_activity
from ibkit.pocket.world import (
    CLASSES,
    HELD_OUT,
    NO_ACCESSORY,
    NO_ACTIVITY,
    PLACES,
    activities_of,
    line_up,
    sample_scene,
    sample_subject,
)
from ibkit.runs import hash_file

if TYPE_CHECKING:
    from ibkit.pocket.build.stages import Build

N_PICTURES, N_PARADES, N_SAMPLES = 2000, 400, 360


def write_card(build: Build) -> None:
    """Measure everything, write `MODEL_CARD.md`, `card.json` (numbers, recipe, hashes) and the judge's own
    accuracy file.
    """
    from ibkit.models import load_model
    from ibkit.scorers.judge import ANSWERS, Judge, JudgeNet

    net = JudgeNet()
    net.load_state_dict(load_float(build.folder / "judge.safetensors"))
    judge = Judge(net, {}, build.device)
    model = load_model(str(build.weights / "pipeline"), device=build.device)
    renders, decoded = _pictures(build)
    scenes = build.test_pictures.scenes[:N_PICTURES]
    accuracy = {
        q: {
            "renders": judge.agrees(renders, q, [facts(s)[q] for s in scenes]).mean().item(),
            "reconstructions": judge.agrees(decoded, q, [facts(s)[q] for s in scenes]).mean().item(),
            "n": len(scenes),
        }
        for q in ANSWERS
    }
    accuracy["identity"] = _identity(build, judge, model)
    save_half(net.state_dict(), build.weights / "judge" / "judge.safetensors")
    (build.weights / "judge" / "judge.json").write_text(json.dumps({"accuracy": accuracy}, indent=2) + "\n")

    numbers = [(f"judge, {q}, renders", a["renders"], 0.98, a["n"]) for q, a in accuracy.items()]
    numbers += [(f"judge, {q}, reconstructions", a["reconstructions"], 0.95, a["n"]) for q, a in accuracy.items()]
    numbers.append(("autoencoder PSNR, dB", _psnr(build), 27.0, N_PICTURES))
    numbers += _prompt_following(model, judge)
    numbers += _scorers(build)
    _write(build, numbers)


def _pictures(build: Build):
    from PIL import Image

    vae, pictures = build.vae(True), build.test_pictures
    renders = [Image.fromarray(pictures.images[i]) for i in range(N_PICTURES)]
    decoded = []
    with torch.inference_mode():
        for i in range(0, N_PICTURES, 100):
            x = vae.decode(vae.encode(pictures.batch(range(i, i + 100), build.device)).latent_dist.mode()).sample
            decoded += [
                Image.fromarray(p)
                for p in ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            ]
    return renders, decoded


def _psnr(build: Build) -> float:
    vae, pictures = build.vae(True), build.test_pictures
    values = []
    with torch.inference_mode():
        for i in range(0, N_PICTURES, 100):
            x = pictures.batch(range(i, i + 100), build.device)
            values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x))
    return torch.cat(values).mean().item()


def _identity(build: Build, judge, model) -> dict[str, float]:
    """How often the judge picks the right one of eight, over fresh individuals in any activity, place and accessory."""
    from ibkit.pocket.draw import render

    rng, shares = random.Random("identity parades"), {"renders": [], "reconstructions": []}
    for _ in range(N_PARADES // 10):
        parade = line_up(sample_subject(rng))
        images = [render(sample_scene(rng, parade[0])) for _ in range(10)]
        shares["renders"].append(judge.identifies(images, parade[0]))
        shares["reconstructions"].append(judge.identifies(model.decode(model.encode_images(images)), parade[0]))
    return {k: torch.cat(v).mean().item() for k, v in shares.items()} | {"n": N_PARADES}


def _prompt_following(model, judge) -> list[tuple[str, float, float, int]]:
    """The judge's agreement with the prompts of base-model samples, seen and held-out (class, activity) pairs apart."""
    from ibkit.presets import POCKET
    from ibkit.sample import sample

    rng = random.Random("base samples")
    seen = [(c, a) for c in CLASSES for a in activities_of(c) if (c, a) not in HELD_OUT]
    asked = [(*rng.choice(seen), rng.choice(list(PLACES))) for _ in range(N_SAMPLES)]
    asked += [(c, a, "") for c, a in sorted(HELD_OUT) for _ in range(N_SAMPLES // len(HELD_OUT))]
    prompts = [f"a {c} {a} {PLACES[p][0] if p else ''}".strip() for c, a, p in asked]
    images = sample(model, prompts, list(range(len(prompts))), POCKET.sampler)
    first, rest = slice(0, N_SAMPLES), slice(N_SAMPLES, None)

    def agreement(question: str, column: int, part: slice) -> float:
        return judge.agrees(images[part], question, [row[column] for row in asked[part]]).mean().item()

    return [
        ("base model, class", agreement("class", 0, first), 0.90, N_SAMPLES),
        ("base model, activity", agreement("activity", 1, first), 0.90, N_SAMPLES),
        ("base model, place", agreement("place", 2, first), 0.90, N_SAMPLES),
        ("base model, activity of held-out pairs", agreement("activity", 1, rest), 0.60, len(asked) - N_SAMPLES),
    ]


def _scorers(build: Build) -> list[tuple[str, float, float | None, int]]:
    from ibkit.scorers.clip import ClipEncoder
    from ibkit.scorers.dino import Dino
    from ibkit.scorers.image_reward import ImageRewardModel

    pictures, rows = build.test_pictures, []
    encoder = ClipEncoder.load(build.weights, build.device)
    right, n = zero_shot_activity(encoder.model, build.tokenizer, pictures, with_activity(pictures, 1000), build.device)
    rows.append(("CLIP, zero-shot activity", right / n, 0.95, n))
    for name, target in (("image_reward", 0.98), ("weak_reward", None)):
        reward = ImageRewardModel.from_pretrained(build.weights / name).to(build.device).eval()
        right, n = ranks_activity(reward, build.tokenizer, pictures, build.device, 400)
        rows.append((f"{name}, right over wrong activity", right / n, target, n))
    right, n = _same_individual(Dino.load(build.weights, build.device))
    rows.append(("DINO, the same individual at rest over another of its class", right / n, None, n))
    return rows


def _same_individual(dino) -> tuple[int, int]:
    """(right, asked): a photo is more like another photo of the same individual than like one of another of its class
    in the very same setting.
    """
    from ibkit.pocket.draw import render

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
    card = {
        "numbers": [
            {"name": n, "value": v, "target": t, "n": k, "reached": t is None or v >= t} for n, v, t, k in numbers
        ],
        "files": {
            str(p.relative_to(build.weights)): {"sha256": hash_file(p), "bytes": p.stat().st_size} for p in files
        },
        "stages": seconds,
    }
    (build.weights / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    lines = [
        "# Pocket weights",
        "",
        "Built by `python -m ibkit.pocket.build`; numbers of this very build, on pictures that no stage trained on.",
        "",
    ]
    lines += ["| quantity | value | target | n | |", "|---|---|---|---|---|"]
    lines += [
        f"| {n} | {v:.3f} | {'–' if t is None else format(t, 'g')} | {k} | {_verdict(v, t)} |" for n, v, t, k in numbers
    ]
    lines += [
        "",
        f"{sum(p.stat().st_size for p in files) / 1e6:.1f} MB in all, fp16.",
        "",
        "| stage | seconds | device |",
        "|---|---|---|",
    ]
    lines += [f"| {stage} | {s['seconds']} | {s['device']} |" for stage, s in seconds.items()]
    (build.weights / "MODEL_CARD.md").write_text("\n".join(lines) + "\n")


def _verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return "reached" if value >= target else "**short of the target**"
