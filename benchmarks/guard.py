"""Simulate the guard's alarm: how often it rings when nothing falls, and how often it finds what does.

Each run is a history of 100 (for falls, 40) epochs: a reward that has risen, which is the worst case for false alarms,
and two watched numbers that are AR(1) noise of deviation 1, of which one may fall as well. The alarm looks after every
window, as in training.

    python benchmarks/guard.py            # 4,000 runs a line, some minutes on one core
    python benchmarks/guard.py --quick
"""

from __future__ import annotations

import argparse
import json
import math

import numpy as np

from ibkit.train.guard import REWARDS, SUBJECT, TEXT, Guard

AUTOCORRELATIONS = (0.0, 0.3, 0.5, 0.7)
SHAPES = {  # share of training done -> share of the fall
    "straight": lambda done: done,
    "levels off": lambda done: 1 - np.exp(-5 * done),
    "sudden": lambda done: (done >= 0.8).astype(float),
}
LOOKED_FOR = (3.0, 4.0, 6.0, 12.0)  # a fall over 40 epochs, in deviations of an epoch


def noise(rng: np.random.Generator, n_epochs: int, autocorrelation: float) -> np.ndarray:
    """Stationary AR(1) noise of deviation 1."""
    draws = rng.standard_normal(n_epochs)
    for i in range(1, n_epochs):
        draws[i] = autocorrelation * draws[i - 1] + math.sqrt(1 - autocorrelation**2) * draws[i]
    return draws


def rings(rng: np.random.Generator, autocorrelation: float, fall: np.ndarray, guard: Guard) -> bool:
    """Whether the alarm rings in one run, of as many epochs as `fall` has."""
    n_epochs = len(fall)
    columns = {REWARDS[0]: np.arange(n_epochs)}
    columns |= {SUBJECT: noise(rng, n_epochs, autocorrelation) - fall, TEXT: noise(rng, n_epochs, autocorrelation)}
    history = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return any(guard.fallen(history[:n]) for n in range(guard.window, n_epochs + 1, guard.window))


def share_of_runs(
    n_runs: int,
    n_epochs: int,
    autocorrelation: float,
    fall: float = 0.0,
    shape: str = "straight",
    guard: Guard | None = None,
    seed: int = 0,
) -> float:
    """The share of simulated runs in which the alarm rings."""
    rng, curve = np.random.default_rng(seed), fall * SHAPES[shape](np.linspace(0, 1, n_epochs))
    return sum(rings(rng, autocorrelation, curve, guard or Guard()) for _ in range(n_runs)) / n_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="200 runs a line")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    n_runs = 200 if arguments.quick else 4000
    rows = []
    for epochs, shape, fall in [(100, "straight", 0.0), *((40, s, f) for s in SHAPES for f in LOOKED_FOR)]:
        rung = {phi: share_of_runs(n_runs, epochs, phi, fall, shape) for phi in AUTOCORRELATIONS}
        rows += [{"epochs": epochs, "shape": shape, "fall": fall, "rings": rung}]
    if arguments.json:
        print(json.dumps({"runs": n_runs, "rows": rows}, indent=1))
        return
    print("runs with an alarm, by autocorrelation" + "".join(f"{phi:>8}" for phi in AUTOCORRELATIONS))
    for row in rows:
        what = f"{row['fall']:g} deviations, {row['shape']}" if row["fall"] else "nothing falls"
        print(f"{row['epochs']:>4} epochs, {what:<25}" + "".join(f"{rate:>8.1%}" for rate in row["rings"].values()))


if __name__ == "__main__":
    main()
