"""Lee et al. 2023 in the pocket world: feedback, rewards that learn from it, fine-tuned arms, and best of n.

    python -m benchmarks.feedback --out outputs/feedback
    python -m benchmarks.feedback --out outputs/reference/feedback --tables       # print what is there

The base with the adapter `counting` draws pictures for seen prompts of count, colour, background and all three. The
counter says what they show; a simulated rater errs in 10 % and skips 5 %. Each seed has raters, a reward with and one
without the prompt classification, and three trainings: on rated pictures, on as many unrated ones too, and with the
pre-training term. New pictures from other noise, of seen prompts, unseen combinations and unseen objects, say what the
rewards predict and what the arms draw; best of n keeps those of the base that the reward likes.

Writes `feedback_reward.csv` and `feedback.csv` (see `ibkit.experiments.human_feedback`), which `ibkit claims` reads, a
history of each training, a wall of pictures an arm, and the pictures (`pictures-*.npz`, not to be committed). A stopped
run goes on where it was.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ibkit.device import generator
from ibkit.evaluate.claims import claims_from
from ibkit.evaluate.claims.command import claims_as_text
from ibkit.evaluate.figures import picture_wall
from ibkit.evaluate.score import image_seeds
from ibkit.evaluate.stats import check_scores
from ibkit.experiments import human_feedback as study
from ibkit.model.text_to_image import model_fingerprint
from ibkit.pocket.feedback import KINDS, simulated_labels
from ibkit.presets import POCKET
from ibkit.scorers import make_scorer
from ibkit.scorers.clip import ClipT
from ibkit.scorers.counter import Counter
from ibkit.scorers.feedback import FeedbackReward

ERRORS, SKIPS = 0.1, 0.05
KEEP = 2  # of best of n, and pictures of a prompt in every arm; of 8 as many as the paper's 4 of 16
N_TRUE = 300  # true pictures of the precision


def measure(
    out: Path, n_seen: int, n_unseen: int, n_rated: int, n_best: int, seeds: Sequence[int], given: dict
) -> None:
    """Draw, rate, learn, train and write the tables."""
    base, counter, clip = study.counting_model(), Counter.load(), make_scorer("clip_t")
    assert isinstance(clip, ClipT)
    asked = study.prompts_of(KINDS, n_seen, n_unseen)
    seen = [one for one in asked if one.subset == study.SEEN]
    rated, unrated = (
        draw(out, base, seen, [first + i for i in range(n_rated)], counter, f"seen-{first}") for first in (0, n_rated)
    )
    candidates = draw(out, base, asked, image_seeds(0, n_best), counter, "new")
    first = candidates.take([i for i in range(len(candidates.seeds)) if i % n_best < KEEP])
    fidelity = study.Fidelity.of(base, KINDS, N_TRUE, 0)
    wall(out, study.BASE, first)
    report(f"{len(asked)} prompts, {len(rated.seeds)} pictures to rate, fulfilled {mean(rated.truth):.3f}")
    rewards, rows = [], []
    for seed in seeds:
        labels = simulated_labels(rated.truth, ERRORS, SKIPS, generator(seed, "raters"))
        learned, threshold = study.learn(rated, labels, clip, {}, seed, asked)
        rewards.append(study.predictions(candidates, learned, clip, threshold, seed))
        pd.concat(rewards).to_csv(out / "feedback_reward.csv", index=False)
        reward = learned["reward"]
        rows += [study.scores(study.BASE, first, reward, fidelity, seed)]
        rows += [study.scores(f"best_of_{n_best}", study.best(candidates, reward, KEEP), reward, fidelity, seed)]
        for arm in study.ARMS:
            drawn = train_and_draw(out, arm, asked, rated, unrated, reward, seed, given, counter)
            rows += [study.scores(arm, drawn, reward, fidelity, seed)]
            pd.concat(rows).to_csv(out / "feedback.csv", index=False)


def draw(out: Path, model, prompts, seeds: Sequence[int], counter: Counter, name: str) -> study.Pictures:
    """Pictures of a model; they are kept in a file, which another run with the same prompts and seeds reads."""
    path, asked = out / f"pictures-{name}.npz", [one for one in prompts for _ in seeds]
    noise = [*seeds] * len(prompts)
    facts = np.array([model_fingerprint(model), *(f"{p.asked.text} {n}" for p, n in zip(asked, noise, strict=True))])
    if path.exists():
        with np.load(path) as kept:
            if np.array_equal(kept["facts"], facts):
                images = [Image.fromarray(pixels) for pixels in kept["images"]]
                return study.Pictures(asked, noise, images, counter.answers(images))
    drawn = study.draw(model, prompts, seeds, POCKET.sampler, counter)
    np.savez_compressed(path, images=np.stack([np.asarray(image) for image in drawn.images]), facts=facts)
    return drawn


def train_and_draw(out, arm, asked, rated, unrated, reward: FeedbackReward, seed: int, given: dict, counter: Counter):
    """An arm's pictures from the noise of the evaluation; a finished training is read from its last checkpoint."""
    model, name = study.counting_model(), f"{arm}-{seed}"
    started = time.monotonic()
    history = study.tune(
        model, arm, rated, unrated, reward, study.config_of(POCKET, arm, given), out / "trainings" / name, seed
    )
    pd.DataFrame(history).round(5).to_csv(out / f"history-{name}.csv", index=False)
    drawn = draw(out, model, asked, image_seeds(0, KEEP), counter, name)
    wall(out, name, drawn)
    report(f"{name}: {time.monotonic() - started:.0f} s, fulfilled {mean(drawn.truth):.3f}")
    return drawn


def wall(out: Path, name: str, pictures: study.Pictures, n_prompts: int = 12) -> None:
    """A figure of the first pictures of prompts spread over all."""
    texts = list(dict.fromkeys(pictures.texts))
    chosen = texts[:: max(1, len(texts) // n_prompts)][:n_prompts]
    of: dict[str, list] = {text: [] for text in chosen}
    for image, text in zip(pictures.images, pictures.texts, strict=True):
        if text in of and len(of[text]) < KEEP:
            of[text].append(image)
    figure, _ = picture_wall({textwrap.fill(text, 14): images for text, images in of.items()}, name)
    figure.savefig(out / f"wall-{name}.png", dpi=90)


def mean(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)


def report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def tables(out: Path) -> str:
    """Shares by arm and subset where arms were trained, what the rewards predict, and the verdicts."""
    rewards = pd.read_csv(out / "feedback_reward.csv")
    found, shown = {"feedback_reward.csv": rewards}, []
    if (out / "feedback.csv").exists():
        scores = found["feedback.csv"] = check_scores(pd.read_csv(out / "feedback.csv"))
        columns = ["judge_text", *(c for c in scores if c.startswith("right_")), "precision", "diversity", "feedback"]
        shown.append(scores.groupby(["subset", "arm"], sort=False)[columns].mean())
        shown.append(scores.pivot_table(index=["subset", "arm"], columns="kind", values="judge_text", sort=False))
    right = ["fulfilled", *(c for c in rewards if c.endswith("right")), *study.REWARDS]
    shown.append(rewards.groupby("subset", sort=False)[right].mean())
    findings = [claim for claim in claims_from(found) if claim.id.startswith("L")]
    return "\n\n".join([*(table.round(3).to_string() for table in shown), claims_as_text(findings)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feedback", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seen", type=int, default=8, help="rated prompts of a kind")
    parser.add_argument("--unseen", type=int, default=4, help="of new combinations, and of new objects")
    parser.add_argument("--rated", type=int, default=8, help="rated pictures of each, and as many unrated ones")
    parser.add_argument("--best-of", type=int, default=8, help=f"pictures of which {KEEP} are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=0, help="of each training; 0 = the preset's")
    parser.add_argument("--batch", type=int, default=0, help="pictures in a step; 0 = the preset's")
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.tables:
        chosen = {name: value for name, value in (("n_steps", given.steps), ("batch", given.batch)) if value}
        measure(given.out, given.seen, given.unseen, given.rated, given.best_of, given.seeds, chosen)
    print(tables(given.out))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
