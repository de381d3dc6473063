"""`ibkit plan`: how long `ibkit run` will take on this machine, and how much memory, before it starts."""

import argparse
import json
import math
from typing import Any

from ibkit.device import describe_device, keep_memory, pick_device, threads
from ibkit.errors import ParameterError
from ibkit.job import run as main_job
from ibkit.job.stages import JOB, Stage, defaults, given, plan
from ibkit.progress import duration

NOT_FOR_A_CPU = "Not for a CPU: the memory is what it takes of a GPU; `--gpu 24` plans for one of 24 GiB."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit plan`: those of `ibkit run` that say what is run."""
    main_job.add_settings(parser)
    parser.add_argument("--gpu", type=float, metavar="GIB", help="plan for a GPU of so much memory that is not here")
    parser.add_argument("--ladder", action="store_true", help="what runs at Stable Diffusion's size on which GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Print the prediction, or the ladder; returns 0.

    Raises:
        ParameterError: --gpu for the pocket model, or of no size.
    """
    from ibkit.job import fit
    from ibkit.job.costs import PocketCosts, costs, count
    from ibkit.job.ready import require_ready

    if arguments.ladder:
        print(fit.ladder(_one_of_each()))
        return 0
    keep_memory()
    threads()
    settings, folder = defaults() | given(arguments), main_job.OUTPUTS / "plan"
    stages = plan(settings, folder)
    require_ready(stages, scorers=False)
    wanted = stages[0].parameters
    _require_counted(wanted["model"])
    device = pick_device(wanted["device"])
    card, where = arguments.gpu or fit.card_gib(device), describe_device(device)
    if arguments.gpu is not None and not 0 < arguments.gpu < math.inf:
        raise ParameterError(f"--gpu {arguments.gpu:g} is no GPU's memory: give it in GiB, such as --gpu 24.")
    if arguments.gpu and wanted["model"] == "pocket":
        raise ParameterError("--gpu plans for Stable Diffusion: add --model sd15; the pocket model needs no GPU.")
    if arguments.gpu:
        where = f"a GPU of {arguments.gpu:g} GiB"
    cost = costs(wanted["model"], device, elsewhere=bool(arguments.gpu))
    notes: list[str] = []
    if isinstance(cost, PocketCosts):
        gibs = [cost.peak_bytes(count(stage)) / fit.GIB for stage in stages]
    else:
        added, sentences = fit.chosen(settings, folder, card) if card else ({}, [NOT_FOR_A_CPU])
        stages = plan(settings | added, folder)
        gibs = [fit.fit(stage).gib for stage in stages]
        words = " ".join(_option(name, value) for name, value in added.items())
        notes.append(
            f"disk: {fit.disk_bytes(stages) / fit.GIB:.1f} GiB for trained weights and a training's checkpoints"
        )
        notes += [f"`ibkit run` adds on this GPU: {words}"] * bool(words) + sentences
    works = [count(stage) for stage in stages]
    rows = [(stage.name, cost.seconds(work), gib) for stage, work, gib in zip(stages, works, gibs, strict=True)]
    total, peak = sum(seconds for _, seconds, _ in rows), max(gib for *_, gib in rows)
    if arguments.json:
        table = [{"stage": name, "seconds": seconds, "peak_gib": gib} for name, seconds, gib in rows]
        result = {"device": where, "how": cost.how, "stages": table, "seconds": total, "peak_gib": peak}
        print(json.dumps(result | {"notes": notes}))
        return 0
    print(f"predicted for {wanted['model']} on {where}; {cost.how}\n")
    print(f"{'stage':<26}{'time':>14}{'peak memory':>14}")
    for name, seconds, gib in [*rows, ("all", total, peak)]:
        print(f"{name:<26}{duration(seconds):>14}{gib:>10.2f} GiB")
    print(
        f"\na row of the U-Net: {cost.flop / 1e9:.3g} GFLOP, {1e3 * cost.forward:.3g} ms forward "
        f"({cost.flop / cost.forward / 1e12:.2g} TFLOP/s), {1e3 * cost.tuned:.3g} ms with the adapter's gradient, "
        f"{1e3 * cost.trained:.3g} ms with that of all weights"
    )
    for note in notes:
        print(note)
    return 0


def _one_of_each() -> list[Stage]:
    """A stage of each method, and the evaluation, at Stable Diffusion's size."""
    from ibkit.methods.records import METHODS

    methods = {stage: [name for name in METHODS if METHODS[name].stage == stage] for stage in ("personalize", "tune")}
    usual, folder = defaults() | {f"{notebook}.model": "sd15" for notebook in JOB}, main_job.OUTPUTS / "plan"
    by_method = {stage.parameters.get("method"): stage for stage in plan(usual | methods, folder)}
    return [*(by_method[name] for stage in methods.values() for name in stage), plan(usual, folder)[-1]]


def _require_counted(model: str) -> None:
    """Refuse a folder whose U-Net has another shape than Stable Diffusion's: its passes are not counted.

    Raises:
        ParameterError: with its shape.
    """
    from ibkit.model.parts import SD_WIDTHS, widths_of

    if model != "pocket" and (widths := widths_of(model)) != SD_WIDTHS:
        raise ParameterError(
            f"plan counts the pocket model and Stable Diffusion's shape, and the U-Net of {model} has the widths "
            f"{widths}: start `ibkit run`, whose table says what each stage took."
        )


def _option(name: str, value: Any) -> str:
    """A setting of a job as the command line spells it."""
    if name.startswith("set."):
        return f"--set {name.removeprefix('set.')}={value}"
    return f"--{name} {' '.join(value)}"
