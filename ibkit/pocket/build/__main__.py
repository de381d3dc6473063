"""Command line of the build: `python -m ibkit.pocket.build [--folder F] [--stages a,b] [--device D] [--threads N]`."""

import argparse
import sys
import time
from pathlib import Path

from ibkit.errors import IbkitError
from ibkit.runs import project_root

STAGES = (
    "autoencoder unet decoder judge raters counter image_reward weak_reward clip dino subject card counting".split()
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ibkit.pocket.build", description=__doc__)
    folder = project_root() / "outputs" / "pocket-build"
    parser.add_argument("--folder", type=Path, default=folder, help="for pictures, checkpoints and the built weights")
    known = f"comma-separated, of: {', '.join(STAGES)}; each needs those before it to be built"
    parser.add_argument("--stages", default=",".join(STAGES), help=known)
    parser.add_argument("--device", default="auto")
    earlier = "weights of an earlier build that decoder, U-Net, judge and reward begin with"
    parser.add_argument("--continue-from", type=Path, help=earlier)
    threads = "CPU threads; 0 = all. Stages can run side by side in two processes"
    parser.add_argument("--threads", type=int, default=0, help=threads)
    arguments = parser.parse_args(argv)
    stages = arguments.stages.split(",")
    if unknown := [s for s in stages if s not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")

    import torch

    from ibkit.device import describe_device, keep_memory, pick_device
    from ibkit.pocket.build.stages import Build

    try:
        keep_memory()
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        device = pick_device(arguments.device)
        build = Build(arguments.folder, device, arguments.continue_from)
        print(f"building {', '.join(stages)} in {arguments.folder} on {describe_device(device)}", flush=True)
        for stage in stages:
            started = time.monotonic()
            build.run(stage)
            print(f"{stage}: {time.monotonic() - started:.0f} s", flush=True)
    except IbkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
