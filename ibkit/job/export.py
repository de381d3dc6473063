"""`ibkit export`: what a run made, as a folder that diffusers loads."""

import argparse
import shutil
from pathlib import Path

from ibkit.errors import ArtifactError
from ibkit.runs import read_run, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit export`."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run of 01_personalize or 02_rl_finetune")
    parser.add_argument("folder", metavar="FOLDER", help="to write, which must not be there yet")


def main(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to load it; returns 0.

    Raises:
        ArtifactError: no such run, a run without a model, or a folder that is there.
    """
    from ibkit.adapt import Adapted

    adapted, folder = Adapted.read(read_run(resolve(arguments.run))), Path(arguments.folder).expanduser().resolve()
    if folder.exists():
        raise ArtifactError(f"{folder} is there already: name another folder.")
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    adapted.export(building)
    building.rename(folder)
    print(f"pipeline = diffusers.StableDiffusionPipeline.from_pretrained({str(folder)!r})")
    adapters = [delta.name for delta in adapted.stack if delta.kind == "lora"]
    for name in adapters:
        print(f"pipeline.load_lora_weights({str(folder / name)!r}, adapter_name={name!r})")
    if len(adapters) > 1:
        print(f"pipeline.set_adapters({adapters})")
    for delta in adapted.deltas:
        if delta.kind == "mapper":
            print(
                f"# {delta.name}: diffusers has no loader for a word with a mapper; its weights: {folder / delta.name}"
            )
        elif delta.kind in ("tokens", "cross_kv"):
            print(f"# {delta.name} alone, for another copy of the base model: {folder / delta.name}")
    return 0
