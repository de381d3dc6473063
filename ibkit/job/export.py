"""`ibkit export`: a trained model as a folder that diffusers loads, or evaluated runs as the material of a paper."""

import argparse
import shutil
from pathlib import Path

from ibkit.errors import ArtifactError
from ibkit.runs import GRID, read_manifest, read_run, resolve

MODELS = ("01_personalize", "02_rl_finetune")  # kinds of runs that hold one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit export`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="a finished run of 01_personalize or 02_rl_finetune, whose model is written; or evaluated runs, "
        "whose figures and tables are",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", help="to write, which must not be there yet")
    paper = parser.add_argument_group("of a paper's figures and tables")
    paper.add_argument("--columns", nargs="+", default=[], metavar="METRIC", help="of the LaTeX tables")
    paper.add_argument("--pictures", default="first", metavar="WHICH", help="first, best, worst, or noise seeds")
    paper.add_argument(
        "--against", default="", metavar="ARM", help="the arm of the differences, subtracted from all others"
    )
    paper.add_argument("--titles", action="store_true", help="write each figure's title into it")


def main(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to load it; returns 0.

    Raises:
        ArtifactError: no such run, a run without a model, or a folder that is there.
    """
    folder = Path(arguments.folder).expanduser().resolve()
    if folder.exists():
        raise ArtifactError(f"{folder} is there already: name another folder.")
    runs = [resolve(run) for run in arguments.runs]
    if len(runs) > 1 or (runs[0] / GRID).is_file() or read_manifest(runs[0])["kind"] not in MODELS:
        from ibkit.report.paper import export_paper

        files = export_paper(runs, folder, arguments.columns, arguments.pictures, arguments.titles, arguments.against)
        print(f"written to {folder}: {', '.join(files)}")
        return 0
    from ibkit.adapt import Adapted

    adapted = Adapted.read(read_run(runs[0]))
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
