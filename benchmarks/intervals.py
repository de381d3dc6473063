"""How often the kit's 95 % intervals hold the truth, and how often a verdict finds an effect where there is none.

    python benchmarks/intervals.py            # a minute and a half on one core; --quick: 25 s
    python benchmarks/intervals.py --quick

Pictures are drawn as an experiment draws them: DreamBooth once and InstructBooth under each RL seed, on the same
subjects, prompts and noise. A picture's quality adds up from deviations of .25 between prompts and between subjects
(half of that variance is each method's own), .12 between RL seeds, and .35 between pictures of a prompt. It is measured
as it is (a score), or as a yes or no (a share). The two methods are equally good, so every verdict is false. With a
single RL seed nothing is known of others: there the truth is that of this seed, and no deviation is drawn for it.
Images to reach a level (notebook 06) come from a log-normal of deviation .3, equal for both arms.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ibkit.errors import ScoreError
from ibkit.evaluate.intervals import bootstrap_statistic, difference_interval, mean_interval

PROMPT, SEED, IMAGE = 0.25, 0.12, 0.35
N_RESAMPLES = 1000  # the kit takes 10 000


@dataclass(frozen=True)
class Design:
    """An experiment.

    Attributes:
        prompts: of each subject.
        seeds: RL seeds.
        subjects: their number.
        images: of each prompt.
        share: share of pictures that are right; None: a score is measured instead.
        crossed: whether the subjects share their prompts.
    """

    prompts: int
    seeds: int
    subjects: int = 1
    images: int = 30
    share: float | None = None
    crossed: bool = False

    def __str__(self) -> str:
        parts = [f"{self.subjects} subjects"] if self.subjects > 1 else []
        parts += [f"{self.prompts} {'shared ' if self.crossed else ''}prompts"]
        parts += [f"{self.seeds} seed{'s' * (self.seeds > 1)}"]
        return " × ".join(parts) + (f", {self.share:.0%}" if self.share is not None else "")

    @property
    def truth(self) -> float:
        return 0.4 if self.share is None else self.share

    def groups(self) -> list[np.ndarray]:
        subjects = np.repeat(np.arange(self.subjects), self.prompts * self.images)
        prompts = np.tile(np.repeat(np.arange(self.prompts), self.images), self.subjects)
        return [subjects, prompts if self.crossed else subjects * self.prompts + prompts]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Scores of InstructBooth (S, N) and DreamBooth (1, N)."""

        def deviations(scale: float, n_methods: int) -> np.ndarray:
            """Of subjects, and of prompts, which subjects may share: (n_methods, 1, subjects, prompts, 1)."""
            shape = (n_methods, 1, 1 if self.crossed else self.subjects, self.prompts, 1)
            of_subjects = rng.standard_normal((n_methods, 1, self.subjects, 1, 1)) * (self.subjects > 1)
            return scale * (rng.standard_normal(shape) + of_subjects)

        # The deviation of a single seed is part of the truth about it.
        seed = SEED * (self.seeds > 1)
        quality = deviations(PROMPT / np.sqrt(2), 1) + deviations(PROMPT / np.sqrt(2), 2)
        noise = (self.subjects, self.prompts, self.images)
        ours = quality[0] + seed * rng.standard_normal((self.seeds, 1, 1, 1))
        ours = ours + IMAGE * rng.standard_normal((self.seeds, *noise))
        # DreamBooth has no RL seed, and as much variance without: the two are equally good as shares, too.
        theirs = quality[1] + np.hypot(seed, IMAGE) * rng.standard_normal((1, *noise))
        spread = np.sqrt(PROMPT**2 * (1 + (self.subjects > 1)) + seed**2 + IMAGE**2)
        ours, theirs = (scores.reshape(len(scores), -1) for scores in (ours, theirs))
        if self.share is None:
            return self.truth + ours, self.truth + theirs
        level = NormalDist(0, spread).inv_cdf(self.share)
        return (ours + level > 0).astype(float), (theirs + level > 0).astype(float)


DESIGNS = (
    *(
        Design(prompts, seeds)
        for prompts, seeds in ((2, 1), (2, 3), (3, 1), (5, 1), (5, 3), (8, 3), (40, 1), (40, 2), (40, 3))
    ),
    *(Design(prompts, 3, share=share) for share in (0.5, 0.9, 0.98) for prompts in (2, 5, 8, 40)),
    *(Design(5, 3, subjects, 10, crossed=crossed) for subjects in (2, 8) for crossed in (False, True)),
    *(Design(5, 3, subjects, 10, 0.9, crossed) for subjects in (2, 8) for crossed in (False, True)),
    *(Design(5, 2, subjects, 10, share) for subjects in (3, 4) for share in (None, 0.9)),
    Design(25, 3, 30, 4),
)
QUICK = (Design(2, 1), Design(2, 3), Design(5, 3), Design(40, 2), Design(40, 3), Design(5, 3, share=0.9))
SUBJECTS_AND_SEEDS = ((1, 3), (1, 6), (2, 3), (2, 5), (4, 3))


def trial(design: Design, rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """Whether the interval of InstructBooth's mean holds the truth, and whether that of the difference lies below
    zero, or above.
    """
    ours, theirs = design.draw(rng)
    mean = mean_interval(ours, design.groups(), n_resamples=N_RESAMPLES)
    difference = difference_interval(ours, theirs, design.groups(), n_resamples=N_RESAMPLES)
    return mean.low <= design.truth <= mean.high, difference.side() < 0, difference.side() > 0


def measure(design: Design, n_draws: int, rng: np.random.Generator) -> dict[str, float]:
    """Shares of draws: `coverage`, and the false verdicts `below` and `above` zero."""
    found = np.mean([trial(design, rng) for _ in range(n_draws)], axis=0)
    return dict(zip(("coverage", "below", "above"), map(float, found), strict=True))


def of_ratio(n_subjects: int, n_seeds: int, n_draws: int, rng: np.random.Generator) -> dict[str, float]:
    """The same for the ratio of two equal arms, whose truth is 1; `refused`: of so few runs a ratio has no interval."""
    groups, found = list(np.repeat(np.arange(n_subjects), n_seeds)), []
    for _ in range(n_draws):
        both, other = np.exp(0.3 * rng.standard_normal((2, n_subjects * n_seeds)))
        try:
            interval = bootstrap_statistic(
                {"both": both, "other": other},
                lambda both, other: np.log(other / both),
                groups,
                n_resamples=N_RESAMPLES,
            )
        except ScoreError:
            found.append((False, False, False, True))
            continue
        found.append((interval.low <= 0 <= interval.high, interval.side() < 0, interval.side() > 0, False))
    return dict(zip(("coverage", "below", "above", "refused"), map(float, np.mean(found, axis=0)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="six designs and the ratios")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    n, designs = arguments.draws, QUICK if arguments.quick else DESIGNS
    rng, rows = np.random.default_rng(0), {}
    print(f"{n} draws each; a share has a standard error of up to {np.sqrt(0.05 * 0.95 / n):.1%} at 5 %")
    print(f"{'':46}{'truth within 95 %':>18}{'verdict: lower':>16}{'higher':>8}")
    for design in designs:
        rows[str(design)] = row = measure(design, n, rng)
        print(f"{design!s:46}{row['coverage']:>18.1%}{row['below']:>16.1%}{row['above']:>8.1%}", flush=True)
    for n_subjects, n_seeds in SUBJECTS_AND_SEEDS:
        name = f"ratio: {n_subjects} subject{'s' * (n_subjects > 1)} × {n_seeds} seeds"
        rows[name] = row = of_ratio(n_subjects, n_seeds, n, rng)
        print(f"{name:46}{row['coverage']:>18.1%}{row['below']:>16.1%}{row['above']:>8.1%}", flush=True)
    if arguments.json:
        print(json.dumps({"draws": n, "designs": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
