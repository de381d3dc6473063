"""`ibkit grid`: subjects × methods × seeds from one file, on this machine, its GPUs, or a Slurm cluster.

The file is checked whole and the cost predicted before anything runs. Then Snakemake (extra `workflow`) decides which
cell runs when and where; each is an `ibkit stage`, which goes on with what was interrupted. Called again, a grid does
what is missing and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ibkit.errors import ArtifactError, ParameterError
from ibkit.job.cells import Cell, lay_out, read_config
from ibkit.job.notebook import EXIT_FAILED, EXIT_INTERRUPTED, is_done, sigterm_is_ctrl_c, wait_for
from ibkit.job.stage import publish
from ibkit.job.stages import JOB, TABLES, Stage
from ibkit.params import schema
from ibkit.progress import duration
from ibkit.runs import MANIFEST, compared, project_root, read_manifest, write_atomically
from ibkit.runs.files import require_disk
from ibkit.runs.locks import FolderLock
from ibkit.runs.manifest import differing

OUTPUTS = project_root() / "outputs"
WORKFLOW = Path(__file__).parents[1] / "workflow"
RULES = dict(zip(JOB, ("personalize", "tune", "evaluate"), strict=True))
MOST_NAMED = 10  # cells in a message
LOOK_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit grid`."""
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="subjects, methods, seeds and settings; see docs/grids.md"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and run nothing")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="cells at a time on this machine (default: 1)"
    )
    parser.add_argument("--gpus", default="", metavar="I,J", help="GPUs of this machine, one cell on each at a time")
    parser.add_argument("--gpu", type=float, default=0.0, metavar="GIB", help="memory of GPUs that are not here")
    parser.add_argument(
        "--profile", default="", metavar="slurm|FOLDER",
        help="a Snakemake profile that says where cells run: the one shipped for Slurm, or a folder of your own",
    )  # fmt: skip
    parser.add_argument(
        "--snakemake", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="all that follows goes to Snakemake"
    )


def main(arguments: argparse.Namespace) -> int:
    """Check, plan and run a grid, and report what is finished.

    Returns:
        0: every cell is done; 1: some failed, and the others are done; 130: interrupted.

    Raises:
        ParameterError: the file, a cell, or the options of the command.
        ArtifactError: a finished cell was made with other values, the disk is too small, or Snakemake is not there.
    """
    if arguments.workers < 1:
        raise ParameterError(f"--workers {arguments.workers} must be at least 1.")
    if arguments.gpus and (arguments.workers > 1 or arguments.profile):
        raise ParameterError("--gpus runs one cell on each GPU of this machine: leave out --workers and --profile.")
    config = read_config(Path(arguments.config).expanduser().resolve())
    folder = OUTPUTS / config["name"]
    cells = lay_out(config, folder, arguments.gpu or _card_gib(config))
    require_cells_ready(cells)
    todo = missing(cells, folder)
    workers = len(arguments.gpus.split(",")) if arguments.gpus else arguments.workers
    need_bytes = print_plan(cells, todo, folder, 0 if arguments.profile else workers)
    if arguments.dry_run:
        return 0
    require_disk(OUTPUTS, need_bytes)
    if importlib.util.find_spec("snakemake") is None:
        raise ArtifactError("A grid is run by Snakemake, which is not installed: pip install -e '.[workflow]'.")
    command = _snakemake(folder, workers, arguments.profile, arguments.snakemake)
    wait_for(folder)
    lock = FolderLock(folder)
    try:
        _write_grid(cells, folder, arguments.gpus)
        status = _run(command, todo, folder, 0 if arguments.profile else workers) if todo else 0
        return _conclude(todo, folder, status)
    finally:
        lock.release()


def _card_gib(config: dict[str, Any]) -> float:
    """Memory of this machine's GPU where a large model will use it; 0 = none."""
    from ibkit.device import pick_device
    from ibkit.job.fit import card_gib

    return card_gib(pick_device(config.get("device", "auto"))) or 0.0


def require_cells_ready(cells: Sequence[Cell]) -> None:
    """Look at what every cell needs before the first runs; see `ready.require_ready`."""
    from ibkit.job.ready import require_ready

    by_subject: dict[str, list[Stage]] = {}
    for cell in cells:
        by_subject.setdefault(cell.name.partition("/")[0], []).append(cell.stage)
    for number, stages in enumerate(by_subject.values()):
        require_ready(stages, scorers=number == 0)


def target(cell: Cell, folder: Path) -> Path:
    """Where the workflow looks for a cell's manifest."""
    return folder / "manifests" / f"{cell.name}.json"


def missing(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """The cells that are to be run; targets are made to say what the run folders say.

    Raises:
        ArtifactError: cells are finished with other values than they would have now.
    """
    todo, changed = [], []
    for cell in cells:
        place, made = cell.stage.folder / MANIFEST, target(cell, folder)
        manifest: dict[str, Any] = read_manifest(cell.stage.folder) if place.is_file() else {"status": ""}
        if manifest["status"] != "complete":
            made.unlink(missing_ok=True)
            todo.append(cell)
        elif differ := differing(compared(manifest["parameters"]), compared(cell.stage.parameters)):
            changed.append(f"{cell.name}: {'; '.join(differ)}")
        elif not made.is_file() or made.read_bytes() != place.read_bytes():
            if is_done(cell.stage):
                publish(cell.stage.folder, made)
            else:
                made.unlink(missing_ok=True)
                todo.append(cell)
    if changed:
        more = f" (and {len(changed) - 1} more cells)" if len(changed) > 1 else ""
        raise ArtifactError(
            f"{folder.name} has finished cells with other values, {changed[0]}{more}: take the old values, or give the "
            "grid another name."
        )
    return todo


def print_plan(cells: Sequence[Cell], todo: Sequence[Cell], folder: Path, workers: int) -> int:
    """Print what a grid does and will cost; returns the bytes that it will write.

    Args:
        workers: cells at a time; 0 = a cluster says.
    """
    from ibkit.device import describe_device, give_back_memory, keep_memory, pick_device, threads
    from ibkit.job.costs import PocketCosts, costs
    from ibkit.job.grid_costs import predicted

    subjects = {cell.name.partition("/")[0] for cell in cells}
    kinds = Counter(cell.stage.notebook.stem for cell in cells)
    print(f"grid {folder.name}: {len(subjects)} subjects, {len(cells)} cells, {len(cells) - len(todo)} of them done")
    if not todo:
        return 0
    keep_memory()
    threads()
    given = cells[0].stage.parameters
    device = pick_device(given["device"])
    cost = costs(given["model"], device, kept=OUTPUTS / "cache" / "costs.json")
    work = predicted(cells, todo, cost)
    give_back_memory()
    print(f"\n{'':14}{'cells':>8}{'to do':>8}{'time':>14}")
    for notebook, name in RULES.items():
        left = [cell for cell in todo if cell.stage.notebook.stem == notebook]
        seconds = sum(work.seconds[cell.name] for cell in left)
        print(f"{name:14}{kinds[notebook]:>8}{len(left):>8}{duration(seconds):>14}")
    total = sum(work.seconds.values())
    print(f"{'all':14}{len(cells):>8}{len(todo):>8}{duration(total):>14}")
    print(f"\n{work.shared}\nlongest chain: {duration(work.longest)}; disk: {work.bytes / 2**30:.2f} GiB")
    if workers > 1:
        print(f"with {workers} workers: {duration(max(total / workers, work.longest))} or more")
    how = f"one cell at a time; {cost.how}" if isinstance(cost, PocketCosts) else cost.how
    print(f"predicted for {given['model']} on {describe_device(device)}, {how}")
    return work.bytes


def _write_grid(cells: Sequence[Cell], folder: Path, gpus: str) -> None:
    """Write what the Snakefile reads."""
    options = ["--with-parent", *(["--gpus", gpus] if gpus else [])]
    facts = {
        "rules": RULES,
        "cells": {
            cell.name: {"needs": cell.needs, "command": shlex.join([*stage_command(cell.stage), *options])}
            for cell in cells
        },
    }
    data = json.dumps(facts, indent=1).encode()
    write_atomically(folder / "grid.json", len(data), lambda temporary: temporary.write_bytes(data))


def stage_command(stage: Stage) -> list[str]:
    """The `ibkit stage` that executes a stage: what differs from its notebook's defaults."""
    notebook, words = stage.notebook.stem, []
    usual = {row.name: row.default for row in schema(notebook)}
    for name, value in stage.parameters.items():
        if name in ("run_out", "resume") or value == usual[name]:
            continue
        prefix = {table: f"{word}." for word, table in TABLES.items()} | {"settings": ""}
        if name in prefix:
            words += [word for key, one in value.items() for word in ("--set", f"{prefix[name]}{key}={one!r}")]
        else:
            words += ["-p", f"{name}={value}"]
    return [sys.executable, "-m", "ibkit", "stage", notebook, "--out", str(stage.folder), *words]


def _snakemake(folder: Path, workers: int, profile: str, more: Sequence[str]) -> list[str]:
    """The command that runs the workflow.

    Raises:
        ParameterError: no such profile.
    """
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(WORKFLOW / "Snakefile"),
        "--directory",
        str(folder),
    ]
    command += ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock"]
    if not profile:
        return [*command, "--cores", str(workers), *more]
    place = WORKFLOW / "profiles" / profile if "/" not in profile else Path(profile)
    place = place if place.is_dir() else Path(profile).expanduser().resolve()
    if not place.is_dir():
        known = ", ".join(path.name for path in sorted((WORKFLOW / "profiles").iterdir()))
        raise ParameterError(f"There is no profile {profile!r}: name {known}, or the folder of one of your own.")
    return [*command, "--profile", str(place), *more]


def _run(command: Sequence[str], todo: Sequence[Cell], folder: Path, workers: int) -> int:
    """Run Snakemake to its end and print which cells are done; returns its exit status, or 130 after Ctrl-C.

    Args:
        workers: cells at a time on this machine; 0 = on a cluster.
    """
    from ibkit.device import available_cpus

    environment = dict(os.environ)
    if workers:  # else each machine of a cluster says how many cores a cell has
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // workers)))
    waiting = {cell.name: target(cell, folder) for cell in todo}
    log = folder / "logs" / "snakemake.txt"
    log.parent.mkdir(parents=True, exist_ok=True)

    def look() -> None:
        for name in [name for name, path in waiting.items() if path.is_file()]:
            del waiting[name]
            print(f"[{len(todo) - len(waiting)}/{len(todo)}] {name}", flush=True)

    # A session of its own: Ctrl-C comes here first and goes on to all of it.
    with open(log, "w") as file, sigterm_is_ctrl_c():
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                look()
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            return EXIT_INTERRUPTED
    look()
    return process.returncode


def _conclude(todo: Sequence[Cell], folder: Path, status: int) -> int:
    """Say what failed and why, and report what is finished; returns the command's exit status."""
    left = [cell for cell in todo if not target(cell, folder).is_file()]
    again = "go on with the same command"
    if status == EXIT_INTERRUPTED:
        print(f"interrupted, {len(left)} cells left; {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    names = {cell.name for cell in left}
    failed = [cell for cell in left if not names & set(cell.needs)]
    for cell in failed[:MOST_NAMED]:
        print(f"failed: {cell.name}: {_why(folder / 'logs' / f'{cell.name}.txt')}", file=sys.stderr)
    if left:
        print(f"{len(failed)} cells failed, {len(left) - len(failed)} need them; mend it and {again}", file=sys.stderr)
    elif status:
        said = (folder / "logs" / "snakemake.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ArtifactError(f"Snakemake ended with status {status}: {' '.join(said[-3:])}")
    if any(folder.glob(f"*/03_evaluate*/{MANIFEST}")):
        from ibkit.report import build_report

        print(f"open {build_report(folder, folder / 'report.html')}")
    return EXIT_FAILED if left else 0


def _why(log: Path) -> str:
    """The sentence with which a cell ended."""
    if not log.is_file():
        return f"it was not started (see {log.parents[1] / 'snakemake.txt'})"
    lines: list[Any] = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    return told.removeprefix("error: ") or f"{lines[-1] if lines else 'it said nothing'} (see {log})"
