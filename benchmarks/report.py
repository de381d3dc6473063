"""How long a grid's report takes to be written and to open, and how large it is, by its subjects and arms.

    python -m benchmarks.report                  # 30 subjects x 10 arms x 5 prompts x 10 pictures of 512 px
    python -m benchmarks.report --subjects 8 --arms 4 --side 64 --json

The scores are random and the pictures are photos of the pocket world's subjects: nothing here is a result. Opening is
what Chromium takes longer to show the page's first screen than that of an empty page, the median of a few times, in
turn. Without Chromium only the writing is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ibkit.data.subject import demo_subject, world_photos
from ibkit.evaluate.arms import BASE
from ibkit.methods.records import METHODS
from ibkit.pocket.world import CLASSES
from ibkit.report import build_report
from ibkit.runs import GRID, Run

N_PROMPTS, N_IMAGES, OPENINGS = 5, 10, 5
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def arms(n: int) -> list[str]:
    """The base model, every personalization, and every tuning on the first of them: the first n."""
    first = [name for name, method in METHODS.items() if method.stage == "personalize"]
    tuned = [f"{one}+{name}" for one in first for name, method in METHODS.items() if method.stage == "tune"]
    return [BASE, *first, *tuned][:n]


def make_grid(folder: Path, n_subjects: int, n_arms: int, side: int) -> int:
    """Write the folder of a grid with random scores and pictures of `side` px; returns their number."""
    nouns, rng, rows = list(CLASSES), np.random.default_rng(0), 0
    for number in range(n_subjects):
        noun = nouns[number % len(nouns)]
        photos = world_photos(demo_subject(noun), N_IMAGES)
        run = Run.open(folder / f"subject{number}" / "03_evaluate", "03_evaluate", {"model": "pocket"})
        for i, photo in enumerate(photos):
            photo.resize((side, side)).save(run.path(f"images/{i}.png"))
        table = pd.DataFrame(
            {
                "arm": arm,
                "seed": None if arm == BASE else 0,
                "tune_seed": 0 if "+" in arm else None,
                "subject": f"{noun} {number}",
                "class_noun": noun,
                "prompt_id": f"prompt{prompt}",
                "prompt": f"a sks {noun} doing the {prompt}",
                "text": f"a {noun} doing the {prompt}",
                "activity": f"the {prompt}",
                "identifier": identifier,
                "image": f"images/{seed}.png",
                "image_seed": seed,
                "clip_t": rng.normal(0.25, 0.02),
                "dino": rng.normal(0.6, 0.05),
                "judge_text": int(rng.random() < 0.7),
                "judge_identity": int(rng.random() < 0.8),
            }
            for arm in arms(n_arms)
            for identifier in ((False,) if arm == BASE else (True, False))
            for prompt in range(N_PROMPTS)
            for seed in range(N_IMAGES)
        )
        rows += len(table)
        run.write_table("scores.csv", table)
        run.note_output("images")
        run.finish()
    (folder / GRID).write_text("{}")
    return rows


def shown_s(page: Path, scratch: Path) -> float:
    """Seconds of a browser from its start to a picture of the page's first screen."""
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={scratch / 'profile'}",
    ]
    command += ["--window-size=1200,1600", f"--screenshot={scratch / 'shown.png'}", page.as_uri()]
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return time.perf_counter() - started


def opens(page: Path, scratch: Path) -> tuple[float, float]:
    """Seconds that the page takes longer than an empty one, in turn: the median and the most of a few openings."""
    empty = scratch / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    shown_s(empty, scratch)  # makes the browser's profile
    longer = [shown_s(page, scratch) - shown_s(empty, scratch) for _ in range(OPENINGS)]
    return statistics.median(longer), max(longer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=30)
    parser.add_argument("--arms", type=int, default=10)
    parser.add_argument("--side", type=int, default=512, help="of a picture, px")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "grid"
        rows = make_grid(folder, asked.subjects, asked.arms, asked.side)
        started = time.perf_counter()
        page = build_report(folder, folder / "report.html")
        found: dict[str, float] = {
            "pictures": rows,
            "written_s": round(time.perf_counter() - started, 1),
            "mb": round(page.stat().st_size / 1e6, 1),
        }
        if CHROMIUM:
            median, most = opens(page, Path(scratch))
            found |= {"opens_s": round(median, 2), "slowest_s": round(most, 2)}
    print(json.dumps(found) if asked.json else "\n".join(f"{name:<12}{value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
