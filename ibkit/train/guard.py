"""The reward guard: it watches what the reward does not see, warns, stops in time, and keeps the best policy.

RL maximizes the reward. Two numbers that it does not optimize show whether pictures improved: subject fidelity, and
another text scorer. Both are cosines, so RPO's λ-harmonic mean combines them (arXiv 2407.12164):

    frontier = 1 / (λ / I + (1 - λ) / T),  I = (subject cosine + 1) / 2,  T = (text cosine + 1) / 2

Single epochs are noisy; everything here compares means over a window of epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ibkit.fields import field

SUBJECT, TEXT = "monitor", "text_monitor"  # columns of the history: cosines, see `ibkit.train.monitor.SubjectMonitor`
REWARDS = ("reward", "reward_subject")  # columns of the history: what is optimised
FEWEST = 16  # epochs; fewer say too little of their own autocorrelation
LARGEST_AUTOCORRELATION = 0.8  # a few dozen epochs cannot show more; near 1 the effective number of epochs is zero
LEVEL_COST = 1.5  # degrees of freedom of a level of a monotone fit (Meyer and Woodroofe 2000)
RISE = 2.0  # standard errors; an alarm needs a reward that rose, which is what one expects of training


def harmonic(subject: float, text: float, weight: float) -> float:
    """λ-harmonic mean of two numbers in (0, 1], `weight` = λ on the subject; 0 where one of them is not positive."""
    if min(subject, text) <= 0:
        return 0.0
    return 1.0 / (weight / subject + (1.0 - weight) / text)


def change(values: Sequence[float], window: int) -> float:
    """By how much the mean of the last `window` values lies above that of the first, in standard errors.

    The noise is the residual of the best monotone fit, so a straight fall, a sudden one and one that levels off all
    count as signal. It is modelled as AR(1) with autocorrelation φ: a mean over w epochs has the variance
    σ²/w (1 + 2 Σ (1 - k/w) φ^k), k = 1 ... w - 1, and n epochs are worth n (1 - φ)/(1 + φ) independent ones. The fit
    lowers the estimates of σ² and φ; both are corrected to first order. With so few degrees of freedom the ratio is
    Student's t; it is returned as the normal deviate of the same probability.

    Args:
        values: of n epochs, at least `FEWEST`, and two windows.
    """
    from scipy.optimize import isotonic_regression

    y, n = np.asarray(values, dtype=float), len(values)
    difference = y[-window:].mean() - y[:window].mean()
    rising = math.copysign(1.0, difference) * y
    fit = isotonic_regression(rising)
    noise, n_levels = rising - fit.x, len(fit.blocks) - 1
    square = noise @ noise
    if square <= 1e-18 * (y @ y):  # nothing is left to chance
        return math.copysign(math.inf, difference) if difference else 0.0
    bias = min(n_levels, 4)
    phi = (n * (noise[1:] @ noise[:-1]) / square + bias) / (n - 2 * bias)
    phi = min(max(phi, 0.0), LARGEST_AUTOCORRELATION)
    k = np.arange(1, window)
    variance = square / max(n - LEVEL_COST * n_levels, n / 4) / window * (1 + 2 * np.sum((1 - k / window) * phi**k))
    t = difference / math.sqrt(2 * variance)
    freedom = max(1.0, n * (1 - phi) / (1 + phi) - 2)
    # Wallace's approximation (1959) of the normal deviate; in the far tail a little below it, the careful side
    deviate = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t**2 / freedom))
    return math.copysign(deviate, difference)


@dataclass(frozen=True)
class Guard:
    """Settings of the guard.

    With the default window and certainty, a run of up to 100 epochs in which no watched number falls has a false alarm
    with a probability of at most 5 % over all looks, one a window, at autocorrelations up to .7. `benchmarks/guard.py`
    simulates it, and which falls are found.

    The best policy is the one that drew the last pictures of the best window: the policy itself, and not the moving
    average of `DDPOConfig.ema_decay`. Training draws no picture of the average, and judging it would take as many
    pictures again.

    A single look at independent epochs would need a certainty of 2. The rest corrects for many looks at two numbers, a
    curve of any shape, and an unknown autocorrelation.
    """

    weight: float = field(0.5, "λ, the subject's in the frontier", "RPO validates with .3, .5, .7", low=0.0, high=1.0)
    window: int = field(8, "epochs in a mean", "ours", low=1)
    patience: int = field(
        0, "epochs without a better frontier before the training stops and returns the best policy; 0 = never", "ours",
        low=0,
    )  # fmt: skip
    certainty: float = field(4.4, "standard errors by which a watched number must have fallen", "ours", low=0.0)

    def look(self, history: Sequence[dict[str, float]]) -> dict[str, float]:
        """What to add to the newest row of the history.

        Returns:
            `frontier` of the newest window, once it is full, where both cosines are watched; and `alarm`: 1 when,
            between the first window and the newest, a reward has risen and a watched number has fallen; else 0.
        """
        numbers = {}
        subject, text = (_values(history[-self.window :], column) for column in (SUBJECT, TEXT))
        if subject and text and len(history) >= self.window:
            numbers["frontier"] = harmonic((fmean(subject) + 1) / 2, (fmean(text) + 1) / 2, self.weight)
        return numbers | {"alarm": float(bool(self.fallen(history)))}

    def fallen(self, history: Sequence[dict[str, float]]) -> list[str]:
        """The watched columns that have fallen while a reward has risen, as of the last full window.

        It looks once a window, since each look is a chance of a false alarm, and not before `FEWEST` epochs, or two
        windows.
        """
        history = history[: len(history) // self.window * self.window]
        if not any(self._moved(history, column) > RISE for column in REWARDS):
            return []
        return [column for column in (SUBJECT, TEXT) if self._moved(history, column) < -self.certainty]

    def best(self, history: Sequence[dict[str, float]]) -> int:
        """Index of the row with the best frontier; of the newest row while there is none."""
        rows = [i for i, row in enumerate(history) if "frontier" in row]
        return max(rows, key=lambda i: history[i]["frontier"], default=len(history) - 1)

    def gives_up(self, history: Sequence[dict[str, float]]) -> bool:
        """Whether patience has run out."""
        return self.patience > 0 and len(history) - 1 - self.best(history) >= self.patience

    def _moved(self, history: Sequence[dict[str, float]], column: str) -> float:
        values = _values(history, column)
        return change(values, self.window) if len(values) >= max(FEWEST, 2 * self.window) else 0.0


def _values(rows: Sequence[dict[str, float]], column: str) -> list[float]:
    """A column's numbers; an epoch without a picture of the subject has none."""
    return [row[column] for row in rows if column in row]
