"""How often the kit's 95 % intervals hold the truth, and how often they find a difference where there is none.

    python benchmarks/intervals.py            # about two minutes
    python benchmarks/intervals.py --quick

Scores are drawn with deviations of .25 between prompts, .12 between RL seeds and .35 between the images of a prompt, 30
images a prompt; images to reach a level (notebook 06) from a log-normal of deviation .3, equal for both arms.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from ibkit.stats import bootstrap_mean, bootstrap_statistic

PROMPTS_AND_SEEDS = ((2, 1), (2, 3), (5, 3), (8, 3), (40, 3))
SUBJECTS_AND_SEEDS = ((1, 3), (2, 3), (2, 5), (4, 3))
N_IMAGES, N_RESAMPLES, TRUTH = 30, 1000, 0.4


def coverage(n_prompts: int, n_seeds: int, n_draws: int, rng: np.random.Generator) -> float:
    """Share of draws whose interval of the mean holds the truth."""
    groups = np.repeat(np.arange(n_prompts), N_IMAGES)
    held = 0
    for _ in range(n_draws):
        scores = TRUTH + 0.25 * rng.standard_normal((1, n_prompts, 1)) + 0.12 * rng.standard_normal((n_seeds, 1, 1))
        scores = scores + 0.35 * rng.standard_normal((n_seeds, n_prompts, N_IMAGES))
        interval = bootstrap_mean(scores.reshape(n_seeds, -1), groups, n_resamples=N_RESAMPLES)
        held += interval.low <= TRUTH <= interval.high
    return held / n_draws


def false_verdicts(n_subjects: int, n_seeds: int, n_draws: int, rng: np.random.Generator) -> float:
    """Share of draws in which the ratio of two equal arms has an interval without 1."""
    groups = list(np.repeat(np.arange(n_subjects), n_seeds))
    wrong = 0
    for _ in range(n_draws):
        both, other = np.exp(0.3 * rng.standard_normal((2, n_subjects * n_seeds)))
        interval = bootstrap_statistic(
            {"both": both, "other": other}, lambda both, other: other / both, groups, n_resamples=N_RESAMPLES
        )
        wrong += interval.low > 1 or interval.high < 1
    return wrong / n_draws


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="50 draws")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    n, rng = 50 if arguments.quick else arguments.draws, np.random.default_rng(0)
    held = {f"{p} prompts, {s} seeds": coverage(p, s, n, rng) for p, s in PROMPTS_AND_SEEDS}
    wrong = {f"{u} subjects, {s} seeds": false_verdicts(u, s, n, rng) for u, s in SUBJECTS_AND_SEEDS}
    for title, shares in (("a 95 % interval holds the truth", held), ("equal arms are told apart", wrong)):
        print(f"{title} ({n} draws each)")
        for what, share in shares.items():
            print(f"  {what:<22} {share:.0%}")
    if arguments.json:
        print(json.dumps({"draws": n, "coverage": held, "false_verdicts": wrong}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
