"""How a notebook opens its run and finds the runs that it starts from: strict in a batch, lenient by hand.

A notebook without `run_out` is run by hand and can run again: with the same values it resumes the run that is there;
with others it sets that run aside under its start time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibkit.errors import ArtifactError
from ibkit.runs.files import resolve
from ibkit.runs.locks import FolderLock
from ibkit.runs.manifest import (
    MANIFEST,
    CompletedRun,
    differing_runs,
    identify,
    local_model,
    read_manifest,
    read_run,
)
from ibkit.runs.writing import Run, let_go

OUTPUTS = "outputs"
GRID = "grid.json"  # what `ibkit grid` laid out, in the folder of a grid


def open_run(notebook: str, parameters: Any, inputs: Mapping[str, Any] | None = None) -> Run:
    """The run of a notebook, open for writing.

    Args:
        notebook: its name, which is the kind of the run.
        parameters: as `collect` returns them.
        inputs: name -> file, folder, or finished run; recorded with their hashes.

    Raises:
        ArtifactError: see `Run.open`. By hand neither other values nor a finished run are refused.
    """
    values, by_hand = asdict(parameters), not parameters.run_out
    inputs = {**(inputs or {}), **local_model(values)}
    folder = resolve(parameters.run_out or f"{OUTPUTS}/notebook-{notebook}").resolve()
    if by_hand and not parameters.resume:
        _make_room(folder, notebook, values, inputs)
    return Run.open(folder, notebook, values, inputs, resume=parameters.resume or by_hand, by_hand=by_hand)


def _make_room(folder: Path, kind: str, values: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Set a run of other values aside, under the time it was started at."""
    if not (folder / MANIFEST).exists():
        return
    old = read_manifest(folder)
    differ = differing_runs(old, kind, values, {name: identify(value) for name, value in inputs.items()})
    if not differ:
        return
    aside = set_aside(folder, folder.parent)
    print(f"other values ({'; '.join(differ)}): the run that was here is now {aside.name}")


def set_aside(folder: Path, place: Path) -> Path:
    """Move a run into the folder `place`, under the time it was started at; returns where it is.

    Raises:
        ArtifactError: another process is writing it.
    """
    let_go(folder)
    FolderLock(folder).release()  # refuses to move what another process is writing
    stem = f"{folder.name}-{read_manifest(folder)['started'].partition('+')[0].replace(':', '-')}"
    names = (stem if i == 1 else f"{stem}-{i}" for i in itertools.count(1))
    place.mkdir(exist_ok=True)
    aside = next(path for name in names if not (path := place / name).exists())
    folder.rename(aside)
    return aside


def input_run(kind: str | tuple[str, ...], named: str = "") -> CompletedRun:
    """The finished run that was named, or the newest of its kind or kinds, which is then printed.

    A run that was edited by hand says so.

    Raises:
        ArtifactError: it is not there, not finished, altered, or of another kind.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    run = read_run(resolve(named), *kinds) if named else newest_run(*kinds)
    if not named:
        print(f"goes on from {run.folder.relative_to(resolve(OUTPUTS).resolve().parent)}, the newest run of {run.kind}")
    if run.edited_by_hand:
        print(f"{run.folder.name} was edited by hand after its end")
    return run


def notebook_runs(folder: Path, kind: str = "") -> tuple[list[CompletedRun], list[str]]:
    """The notebooks' runs in the folder of a main run or of a grid, by name.

    In a main run each must be finished. Of a grid, some of whose cells may have failed, those that are not are named.

    Args:
        folder: outputs/NAME; a grid's has a folder for each subject below it.
        kind: such as "03_evaluate"; empty = all.

    Returns:
        The finished runs, and the names of a grid's others.

    Raises:
        ArtifactError: a run that must be finished is not, or one is altered.
    """
    if not (folder / GRID).is_file():
        return [read_run(path.parent) for path in sorted(folder.glob(f"{kind}*/{MANIFEST}"))], []
    runs, others = [], []
    for path in sorted(folder.glob(f"*/{kind}*/{MANIFEST}")):
        if read_manifest(path.parent)["status"] == "complete":
            runs.append(read_run(path.parent))
        else:
            others.append(path.parent.relative_to(folder).as_posix())
    return runs, others


def newest_run(*kinds: str) -> CompletedRun:
    """The run of any of these kinds below outputs that was finished last.

    Raises:
        ArtifactError: there is none.
    """
    places = [path for depth in ("*", "*/*") for path in resolve(OUTPUTS).glob(f"{depth}/{MANIFEST}")]
    for path in sorted(places, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            manifest = read_manifest(path.parent)
        except ArtifactError:  # damaged, or of another ibkit: not one to go on from
            continue
        if manifest["kind"] in kinds and manifest["status"] == "complete":
            return read_run(path.parent, *kinds)
    raise ArtifactError(
        f"No run of {' or '.join(kinds)} below {resolve(OUTPUTS)} is finished: run notebooks/{kinds[0]}.ipynb to its "
        "last cell first."
    )
