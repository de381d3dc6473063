"""Kill RL training with SIGKILL at random moments, go on, and compare the final adapter with an uninterrupted run's.

    python benchmarks/faults.py --trials 200

Every second trial aims at the writing of a checkpoint; the others strike at any moment. Each child is forked from one
server that has imported everything, so a trial takes seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ibkit.device import available_cpus

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests' tiny model
N_EPOCHS = 6
RESULT = "final.safetensors"


def train(folder: str) -> None:
    """Train the tiny model to the end in `folder`, from its newest checkpoint, and write the adapter."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    from ibkit.adapt import state
    from ibkit.data.prompts import training_prompts
    from ibkit.methods import ddpo
    from ibkit.model.loading import POCKET_PIPELINE
    from ibkit.model.sample import Sampler
    from tests.tiny import tiny_model

    torch.set_num_threads(1)
    model = tiny_model(CLIPTokenizer.from_pretrained(POCKET_PIPELINE / "tokenizer"))
    config = ddpo.DDPOConfig(
        n_epochs=N_EPOCHS, images_per_epoch=8, batch=4, sampler=Sampler(4, 3.0, 1.0), learning_rate=1e-2, micro_batch=8,
        stats_min_count=2, ema_decay=0.5, checkpoint_every=1,
    )  # fmt: skip
    prompts = training_prompts(["playing soccer", "dancing"], "cat", "sks")
    ddpo.train(model, prompts, brightness, config, Path(folder))
    save_file(state(model, "ddpo"), Path(folder) / f".{RESULT}")
    (Path(folder) / f".{RESULT}").rename(Path(folder) / RESULT)


def brightness(images, prompts):
    import torch

    return torch.tensor([sum(i.convert("L").tobytes()) / (i.width * i.height * 255) for i in images])


def server() -> multiprocessing.context.ForkServerContext:
    """A server process that has imported what a child needs; its children start at once and share nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "ibkit.methods.ddpo", "ibkit.model.text_to_image", "tests.tiny", "transformers", "peft"]
    )
    return context


def finish(context, folder: Path) -> float:
    """Train to the end; returns the seconds it took."""
    started = time.monotonic()
    child = context.Process(target=train, args=(str(folder),))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit(f"training in {folder} ended with exit code {child.exitcode}")
    return time.monotonic() - started


def kill_once(context, folder: Path, rng: random.Random, usual_s: float, in_write: bool) -> str:
    """Start training and kill it; returns what was going on: `write`, `training` or `finished`."""
    child = context.Process(target=train, args=(str(folder),))
    child.start()
    if in_write:
        nth, seen = rng.randrange(N_EPOCHS), 0
        was_writing = False
        while child.is_alive() and seen <= nth:
            writing = any(folder.glob("checkpoints/.step-*.new"))
            seen += writing and not was_writing
            was_writing = writing
            time.sleep(0.0005)  # leaves the core to those that train
        time.sleep(rng.uniform(0, 0.004))
    else:
        child.join(rng.uniform(0, usual_s))
    moment = "finished" if not child.is_alive() else "write" if any(folder.glob("checkpoints/.step-*")) else "training"
    child.kill()
    child.join()
    return moment


def trial(context, base: Path, number: int, usual_s: float, expected: bytes) -> dict:
    """One run that is killed one to three times and then finished; whether its adapter is `expected`, bit for bit."""
    rng = random.Random(number)
    folder = base / f"trial-{number}"
    moments = [kill_once(context, folder, rng, usual_s, number % 2 == 0) for _ in range(rng.randint(1, 3))]
    finish(context, folder)
    same = (folder / RESULT).read_bytes() == expected
    leftovers = [p.name for p in (folder / "checkpoints").glob(".*")]
    shutil.rmtree(folder)
    return {"trial": number, "moments": moments, "same": same, "leftovers": leftovers}


def run_trials(n: int, base: Path) -> dict:
    """Counts over `n` trials, and the numbers of those that went wrong."""
    context = server()
    finish(context, base / "warm-up")
    usual_s = statistics.median(finish(context, base / f"whole-{i}") for i in range(2))
    expected = (base / "whole-0" / RESULT).read_bytes()
    with ThreadPoolExecutor(available_cpus()) as pool:  # a training has one thread
        rows = list(pool.map(lambda number: trial(context, base, number, usual_s, expected), range(n)))
    moments = [m for row in rows for m in row["moments"]]
    return {
        "trials": n,
        "kills": len(moments),
        "killed_while_writing": moments.count("write"),
        "killed_while_training": moments.count("training"),
        "came_too_late": moments.count("finished"),
        "uninterrupted_seconds": round(usual_s, 2),
        "repeatable": expected == (base / "whole-1" / RESULT).read_bytes(),
        "different": [row["trial"] for row in rows if not row["same"]],
        "leftovers": [row["trial"] for row in rows if row["leftovers"]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="6 trials")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run_trials(6 if arguments.quick else arguments.trials, Path(folder))
    for key, value in result.items():
        print(f"{key:<24} {value}")
    if arguments.json:
        print(json.dumps(result))
    return 1 if result["different"] or not result["repeatable"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
