"""Scoring a batch of pictures beside scoring them one at a time, as the image-reward package does: pictures a second.

    python benchmarks/scoring.py            # every pocket scorer
    python benchmarks/scoring.py --quick

The two take turns on the same pictures, texts and machine. Scores that differ by more than 1e-4 end in exit status 1;
a batch that is less faster than the target is said so, and is no failure: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import median

import torch

from ibkit.device import describe_device, keep_memory, pick_device
from ibkit.pocket.draw import render
from ibkit.pocket.world import sample_scene
from ibkit.scorers import SCORERS as ALL_SCORERS
from ibkit.scorers import make_scorer

# Every scorer with shipped pocket weights (one from feedback is learned first); harmonic, like align_t and align_i,
# reads the pocket CLIP in ALIGN's place.
SCORERS = tuple(name for name in ALL_SCORERS if name not in ("pick_score", "feedback"))
N_REFERENCES = 5
TOLERANCE = 1e-4  # of a score; batched arithmetic sums in another order
TARGETS = {"cpu": 1.5, "cuda": 5.0}  # times as many pictures a second as one by one, by the type of device


def seconds_of(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    scores = work()  # on the CPU, so a GPU has finished
    return time.perf_counter() - started, scores


def measure(name: str, n: int, repeats: int, device: torch.device) -> dict:
    """Median pictures a second of both ways, their ratio, and by how much the scores differ."""
    scorer = make_scorer(name, "pocket", device)
    pictures = [render(sample_scene(random.Random(i))) for i in range(n)]
    references = pictures[:N_REFERENCES]
    texts = [f"a cat playing soccer {i % 7}" for i in range(n)]  # few different texts, as in an evaluation

    def together() -> torch.Tensor:
        return scorer(pictures, texts, references)

    def one_by_one() -> torch.Tensor:
        pairs = zip(pictures, texts, strict=True)
        return torch.cat([scorer([picture], [text], references) for picture, text in pairs])

    together()  # warms up, and embeds the references for both
    ours, single = [], []
    for _ in range(repeats):
        took, batched = seconds_of(together)
        ours.append(took)
        took, alone = seconds_of(one_by_one)
        single.append(took)
    return {
        "scorer": name,
        "images_per_second": n / median(ours),
        "images_per_second_one_by_one": n / median(single),
        "ratio": median(single) / median(ours),
        "max_abs_diff": (batched - alone).abs().max().item(),
    }


def verdicts(rows: list[dict], target: float | None) -> tuple[list[str], list[str]]:
    """Sentences about scorers whose scores differ, and about those that miss the target (None: there is none)."""
    wrong = [
        f"{row['scorer']}: batched and one by one differ by {row['max_abs_diff']:.1e}, more than {TOLERANCE:g}: "
        "a picture's score depends on its batch."
        for row in rows
        if not row["max_abs_diff"] <= TOLERANCE
    ]
    slow = [
        f"{row['scorer']}: {row['ratio']:.2f} times as fast as one by one, short of the target {target:g}."
        for row in rows
        if target and row["ratio"] < target
    ]
    return wrong, slow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="32 pictures, two repeats")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    keep_memory()
    device = pick_device(arguments.device)
    n, repeats = (32, 2) if arguments.quick else (arguments.images, arguments.repeats)
    rows = [measure(name, n, repeats, device) for name in SCORERS]
    print(f"{describe_device(device)}, {n} pictures")
    target = TARGETS.get(device.type)
    print(f"{'scorer':<14}{'batched /s':>12}{'one by one /s':>16}{'ratio':>8}{'target':>8}{'largest difference':>20}")
    for row in rows:
        print(
            f"{row['scorer']:<14}{row['images_per_second']:>12.0f}{row['images_per_second_one_by_one']:>16.0f}"
            f"{row['ratio']:>8.2f}{target or '-':>8}{row['max_abs_diff']:>20.1e}"
        )
    wrong, slow = verdicts(rows, target)
    for line in wrong + slow:
        print(line)
    if arguments.json:
        print(json.dumps({"device": describe_device(device), "images": n, "target": target, "scorers": rows}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
