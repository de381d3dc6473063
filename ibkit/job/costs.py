"""What `ibkit run` will cost on this machine, before it starts; `ibkit plan` prints it.

The U-Net's passes of every stage are counted from the same parameters that the run would have; a few of each kind are
timed here. Stable Diffusion's operations are counted (`job.memory`): on a GPU a pass is timed and the others follow by
operations, for a GPU that is not here a speed is assumed, and on a CPU the pocket model's passes are scaled. Shapes: a
row is one latent in a pass; guidance makes two of a picture.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median

import psutil
import torch

from ibkit.adapt import attach
from ibkit.device import describe_device, generator
from ibkit.job.memory import TEXT, WEIGHTS, autoencoder, forward, step
from ibkit.job.stages import Stage, spell
from ibkit.methods.records import METHODS, Work
from ibkit.model.loading import load_model
from ibkit.model.single_file import SD15_UNET, SD15_VAE
from ibkit.presets import POCKET, preset_of
from ibkit.runs.files import write_atomically

REPEATS = 2
PICTURES = 8  # decoded and scored to time one
FIXED_PICTURES = 32  # samples and checks of a notebook beside its work
# Assumed of a GPU that is not here, as operations and bytes a second that are kept up: a third of the bf16 peak that is
# published for an A100 (312 TFLOP/s). A card of half the speed takes twice as long.
BF16_FLOP, FP32_FLOP, MEMORY_BYTES = 100e12, 10e12, 0.5e12
UPDATE_BYTES = 28  # of a weight in an optimizer step: weight, gradient and moments read, all but the gradient written
# On a CPU a backward pass needs about as much again as the graph: temporary gradients and allocator overhead.
GRADIENTS_IN_FLIGHT = 2.0


@dataclass(frozen=True)
class Costs:
    """Seconds a row of each kind, a picture, an update of all weights, and a notebook's start.

    Attributes:
        how: where the numbers come from, in words.
        flop: floating-point operations of a row forward.
    """

    forward: float
    tuned: float
    trained: float
    picture: float
    start: float
    flop: float
    how: str
    update: float = 0.0  # where it is a part of the rows' seconds

    def seconds(self, work: Work) -> float:
        """Predicted duration of a stage."""
        rows = work.forward * self.forward + work.tuned * self.tuned + work.trained * self.trained
        updates = work.trained / max(work.graph_rows, 1)
        return self.start + rows + work.pictures * self.picture + updates * self.update


@dataclass(frozen=True, kw_only=True)
class PocketCosts(Costs):
    """And bytes: those that stay, of all weights, and of a row's graph."""

    resident: float
    weights: float
    tuned_row_bytes: float
    trained_row_bytes: float

    def peak_bytes(self, work: Work) -> float:
        """Predicted peak memory of a stage; training all weights keeps a second model, gradients and two moments."""
        row = self.trained_row_bytes if work.trained else self.tuned_row_bytes
        return self.resident + work.graph_rows * row + (4 * self.weights if work.trained else 0)


def count(stage: Stage, shared_sets: int = 0, shared_classes: bool = False) -> Work:
    """The work of a stage of the main job, from its parameters, its method and the model's preset.

    Args:
        shared_sets: sets of an evaluation's pictures that another one has drawn: one of the base model, two of others.
        shared_classes: whether the class pictures of a personalization are there.
    """
    given = stage.parameters
    preset = preset_of(given["model"])
    if "n_inference_steps" in given:
        preset = preset.drawing(given)
    picture_rows = preset.sampler.rows
    fixed = FIXED_PICTURES * picture_rows
    if "method" not in given:
        # base; each model, and the best of several where that is asked for, with and without the identifier
        arms = 1 + 2 * (1 + given["best_of"]) * len(given["runs"])
        each = (given["n_images"] or preset.n_images) * len(given["prompts"] or preset.activities)
        drawn = (arms - shared_sets) * each
        return Work(forward=drawn * picture_rows + fixed, pictures=drawn + arms * each)
    method, settings = METHODS[given["method"]], preset.settings(given["method"], given["settings"])
    work = method.work(settings)
    if method.stage == "personalize":
        measured = 2 * 2 * 16 if preset.world else 2 * 2 * 4
        classes = 0 if shared_classes else method.class_pictures(settings)
        forward = classes * preset.class_sampler.rows + measured * picture_rows
        pictures = FIXED_PICTURES + measured + classes
    else:
        every = given["sample_every"] or preset.sample_every
        prompts = (2 if given["use_class_prompts"] else 1) * len(given["prompts"] or preset.activities)
        pictures = (1 + math.ceil(settings.n_epochs / every)) * 4 * prompts  # before, every so often, at the end
        forward = pictures * settings.sampler.rows
    return replace(work, forward=work.forward + forward + fixed, pictures=work.pictures + pictures)


# ---------------------------------------------------------------------------------------------------- costs


def costs(model: str, device: torch.device, elsewhere: bool = False, kept: Path | None = None) -> Costs:
    """What a model's passes cost here, or on a GPU that is `elsewhere`; any folder counts as Stable Diffusion v1.5.

    Args:
        kept: file of what this machine was timed at before, which is read in the place of timing it again; or made.
    """
    if model == "pocket":
        return _kept(kept, device) if kept else _pocket(device)
    return _assumed() if elsewhere else _timed_large(device) if device.type == "cuda" else _scaled(_pocket(device))


def _kept(path: Path, device: torch.device) -> PocketCosts:
    of = {"machine": platform.node(), "device": describe_device(device), "torch": torch.__version__}
    # One of another machine, and one that cannot be read, is made anew.
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if found["of"] == of:
            return PocketCosts(**found["costs"])
    timed = _pocket(device)
    timed = replace(timed, how=f"{timed.how} at {datetime.now():%Y-%m-%d %H:%M} ({spell(path)})")
    data = json.dumps({"of": of, "costs": asdict(timed)}, indent=1).encode()
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))
    return timed


def _pocket(device: torch.device) -> PocketCosts:
    import ipykernel.kernelapp  # noqa: F401, with the next two what every notebook's process holds, too
    import ipywidgets  # noqa: F401
    import seaborn  # noqa: F401

    from ibkit.scorers import make_scorer
    from ibkit.scorers.judge import Judge

    model = load_model("pocket", device=device)
    scorers = [make_scorer(name, POCKET.scorers, device) for name in ("image_reward", "dino", "clip_t")]
    judge = Judge.load(device)
    text = model.encode_text(["a cat"])[0]
    passes = Passes(model.copy().unet, model.latent_shape, text, device)
    start = time.time() - psutil.Process().create_time()  # this process did what every notebook does first
    resident = psutil.Process().memory_info().rss

    def pictures() -> None:
        images = model.decode(torch.zeros(PICTURES, *model.latent_shape, device=device))
        for scorer in scorers:
            scorer(images, texts=["a cat"] * PICTURES, references=images[:1])
        judge.agrees(images, "activity", ["dancing"] * PICTURES)

    rows, trained_rows = 2 * POCKET.settings("ddpo").micro_batch, 2 * POCKET.settings("dreambooth").batch
    forward, trained = passes.seconds(rows, "none"), passes.seconds(trained_rows, "all")
    in_flight = GRADIENTS_IN_FLIGHT if device.type == "cpu" else 1.0
    trained_row_bytes = in_flight * passes.graph_bytes("all")
    attach(model, "lora", "plan", {"rank": POCKET.settings("ddpo").lora_rank}, generator(0, "plan"))
    adapted = Passes(model.unet, model.latent_shape, text, device)
    return PocketCosts(
        forward=forward,
        tuned=adapted.seconds(rows, "adapter"),
        trained=trained,
        picture=_timed(pictures, device) / PICTURES,
        start=start,
        resident=resident,
        weights=passes.weight_bytes,
        tuned_row_bytes=in_flight * adapted.graph_bytes("adapter"),
        trained_row_bytes=trained_row_bytes,
        flop=passes.flop(),
        how="passes timed on the pocket model",
    )


def _assumed() -> Costs:
    row, tuned, trained = _operations()
    return Costs(
        forward=row / BF16_FLOP,
        tuned=tuned / BF16_FLOP,
        trained=trained / BF16_FLOP,
        picture=autoencoder("decode").flop / FP32_FLOP,
        start=60.0,
        flop=row,
        how=(
            f"operations are counted and speeds assumed, not measured: {BF16_FLOP / 1e12:.0f} TFLOP/s in bf16, "
            f"{FP32_FLOP / 1e12:.0f} in fp32, {MEMORY_BYTES / 1e12:g} TB/s"
        ),
        update=UPDATE_BYTES * WEIGHTS["unet"] / MEMORY_BYTES,
    )


def _timed_large(device: torch.device) -> Costs:
    """A pass and a decoded picture are timed with random weights; those with gradient follow by operations."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device(device):
        unet, vae = UNet2DConditionModel(**SD15_UNET), AutoencoderKL(**SD15_VAE)
        text, latents = torch.zeros(TEXT), torch.zeros(1, 4, 64, 64)
    for part in (unet, vae):
        part.eval().requires_grad_(False)
    forward = Passes(unet, (4, 64, 64), text, device).seconds(2, "none")
    with torch.no_grad():
        picture = _timed(lambda: vae.decode(latents), device)
    how = "a pass and a decoded picture timed at Stable Diffusion's shape, those with gradient by operations"
    return _by_operations(forward, picture, 60.0, how)


def _scaled(pocket: Costs) -> Costs:
    scale = _operations()[0] / pocket.flop
    how = f"scaled from the pocket model by operations, {scale:.0f} times as many a row"
    forward = pocket.forward * scale
    return _by_operations(forward, forward * autoencoder("decode").flop / _operations()[0], pocket.start, how)


def _by_operations(forward: float, picture: float, start: float, how: str) -> Costs:
    row, tuned, trained = _operations()
    return Costs(forward, forward * tuned / row, forward * trained / row, picture, start, row, how)


def _operations() -> tuple[float, float, float]:
    """Of a row: forward, with the gradient of an adapter, with that of all weights."""
    return forward(2).flop / 2, step("lora", {"rank": 4}, 2).flop / 2, step("unet", {}, 2).flop / 2


class Passes:
    """Passes of a U-Net on latents of a shape (C, H, W), with hidden states of a text (L, D)."""

    def __init__(self, unet: torch.nn.Module, latent_shape: tuple, text: torch.Tensor, device: torch.device):
        self.unet, self.latent_shape, self.text, self.device = unet, latent_shape, text, device
        self.weight_bytes = sum(p.nbytes for p in unet.parameters())

    def once(self, rows: int, gradient: str) -> None:
        """One pass with the gradient of "none", of the "adapter", or of "all" weights; in bf16 on a GPU."""
        x = torch.zeros((rows, *self.latent_shape), device=self.device)
        t = torch.full((rows,), 500, device=self.device)
        text = self.text.to(self.device).expand(rows, -1, -1)
        if gradient == "all":
            self.unet.requires_grad_(True)
        with (
            torch.set_grad_enabled(gradient != "none"),
            torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext(),
        ):
            loss = self.unet(x, t, encoder_hidden_states=text).sample.float().square().mean()
        if gradient != "none":
            loss.backward()
        self.unet.zero_grad(set_to_none=True)

    def seconds(self, rows: int, gradient: str) -> float:
        """Seconds a row of a pass of `rows`."""
        return _timed(lambda: self.once(rows, gradient), self.device) / rows

    def flop(self) -> float:
        """Floating-point operations of a row forward; a multiplication and an addition are two."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.once(1, "none")
        return counter.get_total_flops()

    def graph_bytes(self, gradient: str) -> float:
        """Bytes a row that the graph of a pass keeps for its backward pass.

        From its growth with the rows, so that weights, and the bf16 copies that a GPU makes of them, do not count.
        """
        return (self._kept_bytes(4, gradient) - self._kept_bytes(2, gradient)) / 2

    def _kept_bytes(self, rows: int, gradient: str) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.once(rows, gradient)
        return sum(kept.values())


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Median seconds of a few calls after one that warms up."""
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
