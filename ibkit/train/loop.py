"""The loop of every training: steps, a history, checkpoints, resuming.

A training gives its step as a function of the step's number. Its randomness comes from streams named by that number,
and its state is in `Kept`s, so a resumed training is bit-identical.
"""

import hashlib
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ibkit.errors import ArtifactError
from ibkit.runs import CHECKPOINTS, Checkpoints, hash_json
from ibkit.runs.files import require_disk
from ibkit.train.kept import Kept, part
from ibkit.train.processes import Processes

Row = dict[str, float]


def loop(
    step: Callable[[int], Row],
    n: int,
    kept: Mapping[str, Kept],
    folder: Path,
    every: int,
    origin: Mapping[str, str],
    *,
    on_row: Callable[[list[Row]], None] = lambda history: None,
    stop: Callable[[list[Row]], bool] = lambda history: False,
    processes: Processes | None = None,
) -> list[Row]:
    """Take steps until there are `n`, or `stop`, and return a row of numbers for each, with its seconds.

    Args:
        step: makes the step of this number, from 0, and returns its row.
        kept: the state that the step changes, by name.
        folder: of the training, which resumes from the newest checkpoint there.
        every: steps between checkpoints; the last step has one too.
        origin: hashes of what decides the training, by a word for each: settings, model, data, seed.
        on_row: sees the history after each step, and may add to its last row; called before the step's checkpoint, so
            at least once for every step, and again for those that an interruption made it repeat.
        stop: asked before each step.
        processes: that train together; rank 0 reads and writes checkpoints.

    Raises:
        ArtifactError: the checkpoints in `folder` are of another training, one cannot be written, or the disk has no
            room for those to come.
    """
    processes = processes or Processes()
    checkpoints, history = Checkpoints(folder / CHECKPOINTS), []
    if (found := processes.share(checkpoints.latest() if processes.first else None)) is not None:
        _, tensors, state = found
        if other := [word for word in origin | state["origin"] if state["origin"].get(word) != origin.get(word)]:
            raise ArtifactError(
                f"the checkpoints in {checkpoints.folder} are of a training with another {', another '.join(other)}: "
                "go on with what it was started with, or train in another folder."
            )
        for name, one in kept.items():
            one.load(part(tensors, name))
            one.recall(state["facts"][name])
        history = state["history"]
    if processes.first and len(history) < n:
        size = sum(one.nbytes for one in kept.values())
        require_disk(checkpoints.folder, size * (checkpoints.keep - len(checkpoints.steps())))
    while len(history) < n and not stop(history):
        started = time.perf_counter()
        row = step(len(history))
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        on_row(history)
        done = len(history)
        if processes.first and (done % every == 0 or done == n or stop(history)):
            tensors = {f"{name}.{key}": t for name, one in kept.items() for key, t in one.tensors().items()}
            facts = {name: one.facts() for name, one in kept.items()}
            checkpoints.save(done, tensors, {"origin": dict(origin), "facts": facts, "history": history})
    return history


def settings_origin(settings: Any, may_change: Container[str]) -> dict[str, str]:
    """The part of an origin that is settings, a dataclass; without those that may differ on resume."""
    return {name: hash_json(value) for name, value in asdict(settings).items() if name not in may_change}


def hash_pictures(pictures: Sequence[Image.Image]) -> str:
    """Hash of pictures' pixels, in order."""
    return hash_json([[p.mode, p.size, hashlib.sha256(p.tobytes()).hexdigest()] for p in pictures])


def kept_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one `Kept` in a training's newest checkpoint; an ArtifactError where there is none."""
    found = Checkpoints(folder / CHECKPOINTS).latest()
    if found is None:
        raise ArtifactError(f"{folder} has no checkpoint of a training: run it first.")
    return part(found[1], name)
