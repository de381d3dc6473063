"""Does a learned reward predict feedback better than CLIP's score, and does the auxiliary loss help on unseen prompts?

    python -m ibkit.pocket.build --folder BUILD --stages counter     # once: BUILD/weights/counter
    python -m benchmarks.feedback --counter FOLDER --out outputs/feedback --seeds 0 1
    python -m benchmarks.feedback --out outputs/feedback --tables         # print what is there

The base draws pictures for prompts of colour and background (and count, with --kinds: the shipped base never saw
counts). The counter says what they show; a simulated rater errs in 10 % and skips 5 %. The reward learns from the
pictures of seen prompts; on those of unseen combinations and of unseen objects it is asked whether a picture fulfils
its prompt, by the counter, which the rater's errors are no part of. CLIP's score has its threshold from the same
pictures that the reward learned from. Best-of-n: the share of fulfilled prompts among the best of a prompt's pictures.

Writes `pictures.npz` (not to be committed), and `reward.csv`, one row a picture of an unseen prompt and a seed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ibkit.device import generator
from ibkit.evaluate.intervals import difference_interval, mean_interval
from ibkit.model.loading import load_model
from ibkit.model.sample import sample
from ibkit.pocket.feedback import KINDS, Asked, alternatives, simulated_labels, split
from ibkit.presets import POCKET
from ibkit.scorers import make_scorer
from ibkit.scorers.counter import Counter
from ibkit.scorers.feedback import (
    FeedbackReward,
    FeedbackRewardConfig,
    agreement,
    best_of,
    best_threshold,
    save_reward,
    train_reward,
)

ERRORS, SKIPS = 0.1, 0.05
SUBSETS = ("seen", "unseen combination", "unseen object")
N_OTHERS = 8  # of the prompt classification; a prompt of a colour has 16
REWARDS = {"reward": {}, "without auxiliary loss": {"aux_weight": 0.0}}


def asked_for(kinds: Sequence[str], n: int) -> list[tuple[str, str, Asked]]:
    """(subset, kind, prompt) of every prompt; `n` seen ones a kind, and a third as many of each of the others."""
    rows = []
    for kind in kinds:
        for subset, found in zip(SUBSETS, split(kind, n), strict=True):
            rows += [(subset, kind, one) for one in found[: n if subset == "seen" else max(1, n // 3)]]
    return rows


def draw(rows: Sequence[tuple[str, str, Asked]], n: int, path: Path) -> list[Image.Image]:
    """`n` pictures of each prompt by the base, prompt by prompt; kept in a file."""
    prompts = [one.text for *_, one in rows for _ in range(n)]
    if path.exists():
        with np.load(path) as kept:
            if kept["prompts"].tolist() == prompts:
                return [Image.fromarray(pixels) for pixels in kept["pictures"]]
    pictures = sample(load_model("pocket"), prompts, list(range(len(prompts))), POCKET.sampler)
    np.savez_compressed(path, pictures=np.stack([np.asarray(p) for p in pictures]), prompts=np.array(prompts))
    return pictures


def measure(counter: Path, out: Path, kinds: Sequence[str], n_prompts: int, n: int, seeds: Sequence[int]) -> None:
    """Write `reward.csv`."""
    rows = asked_for(kinds, n_prompts)
    pictures = draw(rows, n, out / "pictures.npz")
    of_picture = [row for row in rows for _ in range(n)]
    asked = [one for *_, one in of_picture]
    texts = [one.text for one in asked]
    truth = Counter.load(counter).agrees(pictures, asked)
    clip = make_scorer("clip_t")
    similar = clip(pictures, texts)
    found = []
    for seed in seeds:
        labels = simulated_labels([bool(t) for t in truth], ERRORS, SKIPS, generator(seed, "raters"))
        rng = random.Random(f"alternatives {seed}")
        learned = [i for i, row in enumerate(of_picture) if row[0] == "seen" and labels[i] is not None]
        y = [labels[i] for i in learned]
        scores = {"CLIP": (similar, best_threshold(similar[learned], torch.tensor(y)))}
        others = [[o.text for o in alternatives(asked[i], N_OTHERS, rng)] for i in learned]
        for name, changes in REWARDS.items():
            config = FeedbackRewardConfig(**changes)
            chosen = ([pictures[i] for i in learned], [texts[i] for i in learned], y)
            net, _ = train_reward(clip.encoder, *chosen, others, config, seed)
            save_reward(net, clip.encoder, out / f"head-{name.replace(' ', '-')}-{seed}", config, {"labels": len(y)})
            scores[name] = (FeedbackReward(clip.encoder, net)(pictures, texts), 0.5)
        for i, (subset, kind, one) in enumerate(of_picture):
            row = {"seed": seed, "subset": subset, "kind": kind, "prompt": one.text, "picture": i % n}
            row |= {"fulfilled": int(truth[i]), "rated": labels[i]}
            for name, (score, threshold) in scores.items():
                row |= {name: round(score[i].item(), 4)}
                row |= {f"{name} right": int(agreement(score[i], truth[i], threshold))}
            found.append(row)
    pd.DataFrame(found).to_csv(out / "reward.csv", index=False)


def tables(out: Path, keep: int) -> str:
    """The numbers in words: shares right with intervals over prompts and seeds, and best-of-n."""
    table = pd.read_csv(out / "reward.csv")
    lines = []
    for subset, part in table.groupby("subset"):
        wide = {
            name: part.pivot_table(index="seed", columns=["prompt", "picture"], values=f"{name} right")
            for name in ("CLIP", *REWARDS)
        }
        prompts = wide["CLIP"].columns.get_level_values("prompt").to_numpy()
        lines.append(f"{subset}: {len(prompts)} pictures of {len(set(prompts))} prompts, {wide['CLIP'].shape[0]} seeds")
        fulfilled = mean_interval(part[part["seed"] == part["seed"].min()]["fulfilled"].to_numpy())
        lines.append(f"  fulfilled {_shown(fulfilled)}")
        for name, right in wide.items():
            lines.append(f"  {name} predicts {_shown(mean_interval(right.to_numpy(), prompts))}")
        for name, other in (("reward", "CLIP"), ("reward", "without auxiliary loss")):
            gap = difference_interval(wide[name].to_numpy(), wide[other].to_numpy(), prompts)
            lines.append(f"  {name} − {other} {_shown(gap)}")
        for name in ("CLIP", *REWARDS):
            drawn = part.sort_values(["seed", "prompt", "picture"])
            n = int(part["picture"].max()) + 1
            scores, truth = (torch.tensor(drawn[c].to_numpy()).view(-1, n) for c in (name, "fulfilled"))
            share = truth.gather(1, best_of(scores, min(keep, n))).double().mean().item()
            lines.append(f"  best {min(keep, n)} of {n} by {name}: fulfilled {share:.3f}")
    return "\n".join(lines)


def _shown(found) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feedback", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counter", type=Path, help="folder of counter.safetensors and counter.json")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["colour", "place"])
    parser.add_argument("--prompts", type=int, default=24, help="seen prompts of a kind")
    parser.add_argument("--pictures", type=int, default=8, help="of each prompt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--keep", type=int, default=2, help="of best-of-n")
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.tables:
        if given.counter is None:
            parser.error("name the counter's folder: --counter")
        started = time.monotonic()
        measure(given.counter, given.out, given.kinds, given.prompts, given.pictures, given.seeds)
        print(f"{time.monotonic() - started:.0f} s; reward: {asdict(FeedbackRewardConfig())}")
    print(tables(given.out, given.keep))


if __name__ == "__main__":
    main()
