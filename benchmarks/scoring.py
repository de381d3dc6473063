"""Scoring a batch of pictures beside scoring them one at a time, as the image-reward package does: pictures a second.

    python benchmarks/scoring.py            # every pocket scorer
    python benchmarks/scoring.py --quick

The two take turns on the same pictures, texts and machine; the largest difference of their scores is printed.
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
from ibkit.scorers import make_scorer

SCORERS = ("image_reward", "clip_t", "clip_i", "dino")
N_REFERENCES = 5


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
    print(f"{'scorer':<14}{'batched /s':>12}{'one by one /s':>16}{'ratio':>8}{'largest difference':>20}")
    for row in rows:
        print(
            f"{row['scorer']:<14}{row['images_per_second']:>12.0f}{row['images_per_second_one_by_one']:>16.0f}"
            f"{row['ratio']:>8.1f}{row['max_abs_diff']:>20.1e}"
        )
    if arguments.json:
        print(json.dumps({"device": describe_device(device), "images": n, "scorers": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
