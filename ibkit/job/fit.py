"""Whether a job at Stable Diffusion's size fits on a GPU and a disk, and what must be set for that.

`ibkit plan` prints it, `ibkit run` sets it; `ibkit plan --ladder` is the table of GPUs in the README.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ibkit.fields import fill
from ibkit.job.costs import costs, count
from ibkit.job.memory import WEIGHTS, Counted, autoencoder, forward, step
from ibkit.job.stages import Stage, plan
from ibkit.methods.records import METHODS
from ibkit.presets import preset_of
from ibkit.train.resources import Resources, has_bitsandbytes

GIB = 2**30
LADDER_GIB = (8, 12, 16, 24, 40, 80)
DRAWN_ROWS = 8  # of a pass that draws 4 pictures, with guidance
KEPT_CHECKPOINTS = 2  # of a training, see `runs.checkpoints`
# Assumed: what the CUDA context, libraries' workspaces and fragmentation take of a card; no tensor, so not counted.
RESERVED_GIB, RESERVED_SHARE = 1.0, 0.08
SCORING_BYTES = 0.7 * GIB  # above the activations of the largest official scorer, by tests/test_fit.py
NETWORK_OF = {"clip_t": "clip", "clip_i": "clip", "subject": "dino", "weak_reward": "image_reward"} | dict.fromkeys(
    ("align_t", "align_i", "harmonic"), "align"
)
SMALLEST = "lora_dreambooth"  # of the methods that personalize, the one that takes least
PARTS = 4 * (WEIGHTS["vae"] + WEIGHTS["text_encoder"])


@dataclass(frozen=True)
class Fit:
    """A stage on a GPU.

    Attributes:
        phases: bytes of each.
        knobs: settings beside those that the user gave, "resources.offload" -> True.
        fits: whether these are enough; where none are, they are those that take least.
    """

    phases: dict[str, float]
    knobs: dict[str, Any]
    fits: bool

    @property
    def gib(self) -> float:
        return max(self.phases.values()) / GIB


def card_gib(device: torch.device) -> float | None:
    """Memory of a GPU; None of another device."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def usable_gib(card: float | None) -> float:
    """What tensors may take of a card."""
    return card - max(RESERVED_GIB, RESERVED_SHARE * card) if card else math.inf


def fit(stage: Stage, card: float | None = None, bits: bool = True) -> Fit:
    """The stage with the settings that cost least time among those that fit on a card of so many GiB.

    Args:
        bits: whether moments of 8 bits can be had.
    """
    given, room = stage.parameters, usable_gib(card) * GIB
    if "method" not in given:
        phases = _evaluation(given)
        return Fit(phases, {}, max(phases.values()) <= room)
    settings = preset_of(given["model"]).settings(given["method"], given["settings"])
    phases_of = _personalization if METHODS[given["method"]].stage == "personalize" else _tuning
    for knobs in _candidates(given["method"], settings, set(given["settings"]), bits):
        phases = phases_of(given, fill(settings, knobs, given["method"]))
        if fits := max(phases.values()) <= room:
            break
    return Fit(phases, knobs, fits)


def chosen(settings: dict[str, Any], folder: Path, card: float) -> tuple[dict[str, Any], list[str]]:
    """What a job needs to fit on a card.

    Args:
        settings: of the job, see `job.stages.plan`.
        folder: its run folder.
        card: the GPU's memory in GiB.

    Returns:
        Settings to add: resources, and where the user chose no method to personalize and the preset's does not fit, the
        one that takes least; and sentences on that, and on what does not fit at all.
    """
    added: dict[str, Any] = {}
    sentences = []
    stages, bits = plan(settings, folder), has_bitsandbytes()
    if not settings["personalize"] and not fit(stages[0], card, bits).fits:
        sentences.append(f"{_too_large(stages[0], card)}: {SMALLEST} takes its place.")
        added["personalize"] = [SMALLEST]
        stages = plan(settings | added, folder)
    for stage in stages:
        found = fit(stage, card, bits)
        added |= {f"set.{stage.parameters['method']}.{name}": value for name, value in found.knobs.items()}
        if not found.fits:
            sentences.append(f"{_too_large(stage, card)}: choose a method that takes less, or a larger GPU.")
    return added, sentences


def _too_large(stage: Stage, card: float) -> str:
    least = fit(stage, card, has_bitsandbytes())
    other = ""
    if not has_bitsandbytes() and fit(stage, card).fits:
        other = " (it would fit with bitsandbytes: pip install 'ibkit[low-memory]')"
    name = stage.parameters.get("method", stage.name)
    return (
        f"{name} takes {least.gib:.1f} GiB at least, and of this GPU's {card:.1f} only {usable_gib(card):.1f} are "
        f"counted on{other}"
    )


def disk_bytes(stages: Sequence[Stage]) -> float:
    """Bytes of a job's trained weights, and of the checkpoints of the training that has the largest."""
    results = checkpoints = 0.0
    for given in (stage.parameters for stage in stages if "method" in stage.parameters):
        settings = preset_of(given["model"]).settings(given["method"], given["settings"])
        counted, state = _training(given["method"], settings)
        weights = 4 * counted.trained
        results += weights
        checkpoints = max(checkpoints, KEPT_CHECKPOINTS * (weights + state))
    return results + checkpoints


def ladder(stages: Sequence[Stage]) -> str:
    """A Markdown table: what each of the stages takes on GPUs of several sizes, what must be set, and its time."""
    cost = costs("sd15", torch.device("cpu"), elsewhere=True)
    lines = ["| stage | " + " | ".join(f"{card} GiB" for card in LADDER_GIB) + " | time |"]
    lines.append("|---" * (2 + len(LADDER_GIB)) + "|")
    for stage in stages:
        cells = [stage.parameters.get("method", "evaluation"), *(_cell(fit(stage, card)) for card in LADDER_GIB)]
        lines.append("| " + " | ".join(cells) + f" | {cost.seconds(count(stage)) / 60:.0f} min |")
    return "\n".join([*lines, "", f"Time: {cost.how}."])


def _cell(found: Fit) -> str:
    if not found.fits:
        return "no"
    words = [name.removeprefix("resources.") + ("" if v is True else f" {v}") for name, v in found.knobs.items()]
    return ", ".join([f"{found.gib:.1f}", *words])


def _candidates(method: str, settings: Any, taken: set[str], bits: bool) -> list[dict[str, Any]]:
    """Settings to try, those that cost least first, without any that the user gave."""
    if not hasattr(settings, "resources"):
        return [{}]
    offload, bf16, checkpointing, adam_8bit = (
        {f"resources.{name}": True} for name in ("offload", "frozen_bf16", "checkpointing", "adam_8bit")
    )
    least: dict[str, Any] = offload | checkpointing
    smaller = [{"micro_batch": n} for n in (4, 2, 1) if n < _micro_batch(settings)]
    if METHODS[method].work(settings).trained:  # no weight is frozen
        tries = [{}, offload, least, *(least | one for one in smaller)]
        if bits:
            tries[3:] = [offload | adam_8bit, *(least | adam_8bit | one for one in ({}, *smaller))]
    else:
        in_parts = [bf16 | offload | one for one in smaller]
        tries = [{}, bf16, bf16 | offload, *in_parts, bf16 | least | {"micro_batch": 1}]
    return [{name: value for name, value in one.items() if name not in taken} for one in tries]


def _micro_batch(settings: Any) -> int:
    return getattr(settings, "micro_batch", 0) or getattr(settings, "batch", 1)


@cache
def _training(method: str, settings: Any) -> tuple[Counted, float]:
    """A training step, and bytes of moments and average."""
    record, resources = METHODS[method], getattr(settings, "resources", Resources())
    rows = record.work(settings).graph_rows
    counted = step(*record.delta(settings), rows, resources.checkpointing, resources.frozen_bf16)
    average = 4 if getattr(settings, "ema_decay", 0) else 0
    return counted, counted.trained * (resources.moment_bytes + average)


def _personalization(given: dict[str, Any], settings: Any) -> dict[str, float]:
    counted, state = _training(given["method"], settings)
    likeness = _scorer(preset_of(given["model"]).monitor)
    offload = getattr(settings, "resources", Resources()).offload
    # the gradients of one part of a batch wait while the next is in work
    waiting = 4 * counted.trained if _micro_batch(settings) < getattr(settings, "batch", 1) else 0
    training = counted.weights + state + counted.nbytes + waiting + likeness + (0 if offload else PARTS)
    return {"drawing class pictures": _drawing() + likeness, "training": training}


def _tuning(given: dict[str, Any], settings: Any) -> dict[str, float]:
    counted, state = _training(given["method"], settings)
    offload = getattr(settings, "resources", Resources()).offload
    rewards = [_scorer(name) for name in (given["reward"], given["subject_reward"]) if name]
    trajectories = 4 * 4 * 64 * 64 * settings.images_per_epoch * (settings.sampler.n_steps + 1)
    idle = PARTS + sum(rewards)
    stay = counted.weights + state + trajectories + (0 if offload else idle)
    step = stay + counted.nbytes
    if METHODS[given["method"]].work(settings).graph_pictures:
        step += autoencoder("decode", gradient=True).nbytes + SCORING_BYTES + (idle if offload else 0)
    return {
        "drawing before training": _drawing(),
        "scoring": 4 * WEIGHTS["unet"] + PARTS + max(rewards) + SCORING_BYTES,
        "drawing an epoch": stay + forward(DRAWN_ROWS).nbytes + autoencoder("decode").nbytes,
        "a gradient step": step,
    }


def _evaluation(given: dict[str, Any]) -> dict[str, float]:
    scorers = given["scorers"] or ["image_reward"]  # the largest of the default ones
    return {"drawing": _drawing(), "scoring": max(map(_scorer, scorers)) + SCORING_BYTES}


def _drawing() -> float:
    """Pictures by a model that is whole on the GPU."""
    passes = (forward(DRAWN_ROWS), autoencoder("decode"), autoencoder("encode"))
    return 4 * WEIGHTS["unet"] + PARTS + max(one.nbytes for one in passes)


def _scorer(name: str) -> float:
    """Bytes of its network; one that is not known counts as the largest."""
    return 4 * WEIGHTS.get(NETWORK_OF.get(name, name), WEIGHTS["pick_score"])
