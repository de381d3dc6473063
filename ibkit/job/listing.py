"""`ibkit list`: the runs there are."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ibkit.errors import ArtifactError
from ibkit.evaluate.arms import label_of
from ibkit.progress import duration
from ibkit.runs import MANIFEST, held_by, read_manifest, resolve

HEADS = ("run", "status", "methods", "started (UTC)", "time")
METHOD_WIDTH = 60


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit list`."""
    parser.add_argument("folder", nargs="?", default="outputs", help="where they are (default: outputs)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")


def main(arguments: Namespace) -> int:
    """Print the runs, the newest first; returns 0."""
    rows = runs_in(resolve(arguments.folder))
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    if not rows:
        print(f"no run in {resolve(arguments.folder)}; `ibkit run` makes one")
        return 0
    lines = [HEADS]
    for row in rows:
        methods = ", ".join(map(label_of, row["arms"]))
        methods = methods if len(methods) <= METHOD_WIDTH else f"{methods[: METHOD_WIDTH - 1]}…"
        started = str(row["started"])[:16].replace("T", " ")
        lines.append((row["name"], row["status"], methods, started, duration(row["seconds"])))
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADS))]
    for line in lines:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """The runs directly in a folder, the newest first: name, kind, status, arms, started, seconds, subject.

    The status is complete, running, failed or interrupted; a folder whose manifest cannot be read is "damaged".
    """
    found = [_row(path.parent) for path in folder.glob(f"*/{MANIFEST}")]
    return sorted(found, key=lambda row: (row["started"], row["name"]), reverse=True)


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": folder.name, "kind": "", "status": "damaged", "arms": [], "subject": ""}
    row |= {"started": "", "seconds": 0.0}
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return row
    status = manifest["status"]
    if status == "running":
        status = "running" if held_by(folder) else "interrupted"
    settings = manifest["parameters"]
    named = settings.get("01_personalize.subject") or settings.get("01_personalize.class_noun") or ""
    return row | {
        "kind": manifest["kind"], "status": status, "arms": _arms(folder, manifest), "subject": Path(str(named)).name,
        "started": manifest["started"], "seconds": manifest["seconds"],
    }  # fmt: skip


def _arms(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The chains of a main run, or the method of a notebook's."""
    settings = manifest["parameters"]
    if manifest["kind"] != "run":
        return [settings["method"]] if settings.get("method") else []
    first = settings.get("personalize") or sorted(
        {read_manifest(path.parent)["parameters"]["method"] for path in folder.glob(f"01_personalize*/{MANIFEST}")}
    )
    tuned = [name for name in settings.get("tune", []) if name != "none"]
    return [*first, *(f"{one}+{other}" for one in first for other in tuned)]
