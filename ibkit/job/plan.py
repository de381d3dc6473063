"""`ibkit plan`: how long `ibkit run` will take on this machine, and how much memory, before it starts."""

import argparse
import json

from ibkit.device import describe_device, keep_memory, pick_device, threads
from ibkit.job import run as main_job
from ibkit.job.stages import defaults, given, plan
from ibkit.progress import duration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit plan`: those of `ibkit run` that say what is run."""
    main_job.add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Print the prediction; returns 0."""
    from ibkit.job.costs import costs, count

    keep_memory()
    threads()
    stages = plan(defaults() | given(arguments), main_job.OUTPUTS / "plan")
    works = [count(stage) for stage in stages]
    wanted = stages[0].parameters
    device = pick_device(wanted["device"])
    cost = costs(wanted["model"], device)
    rows = [
        (stage.name, cost.seconds(work), cost.peak_bytes(work) / 2**30)
        for stage, work in zip(stages, works, strict=True)
    ]
    total, peak = sum(seconds for _, seconds, _ in rows), max(gib for *_, gib in rows)
    if arguments.json:
        table = [{"stage": name, "seconds": seconds, "peak_gib": gib} for name, seconds, gib in rows]
        result = {"device": describe_device(device), "how": cost.how, "stages": table, "seconds": total}
        print(json.dumps(result | {"peak_gib": peak}))
        return 0
    print(f"predicted for {wanted['model']} on {describe_device(device)}; {cost.how}\n")
    print(f"{'stage':<26}{'time':>14}{'peak memory':>14}")
    for name, seconds, gib in [*rows, ("all", total, peak)]:
        print(f"{name:<26}{duration(seconds):>14}{gib:>10.2f} GiB")
    print(
        f"\na row of the U-Net: {cost.flop / 1e9:.3g} GFLOP, {1e3 * cost.forward:.3g} ms forward "
        f"({cost.flop / cost.forward / 1e12:.2g} TFLOP/s), {1e3 * cost.tuned:.3g} ms with the adapter's gradient, "
        f"{1e3 * cost.trained:.3g} ms with that of all weights"
    )
    return 0
