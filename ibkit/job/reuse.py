"""What a new job takes over: the name of one that came to nothing, and personalizations that are there already."""

import datetime
import shutil
from pathlib import Path

from ibkit.errors import ArtifactError
from ibkit.job.notebook import is_done
from ibkit.job.stages import Stage
from ibkit.runs import CHECKPOINTS, MANIFEST, held_by, read_manifest
from ibkit.runs.files import link_or_copy
from ibkit.runs.manifest import versions

PERSONALIZE = "01_personalize"


def free_name(folder: Path) -> None:
    """Remove a job's folder where the job failed before it made anything, so that its name can be used again.

    Nothing was made where no notebook's run is complete and no training has a checkpoint.
    """
    if not (folder / MANIFEST).is_file() or held_by(folder):
        return
    manifest = read_manifest(folder)
    if manifest["kind"] != "run" or manifest["status"] != "failed":
        return
    notebooks = [path.parent for path in folder.glob(f"*/{MANIFEST}")]
    if any(held_by(one) or read_manifest(one)["status"] == "complete" for one in notebooks):
        return
    if any(folder.rglob(f"{CHECKPOINTS}/step-*")):
        return
    shutil.rmtree(folder)
    print(f"{folder.name} had failed before it made anything ({manifest.get('reason', '')}); it starts anew")


def reuse(stages: list[Stage], outputs: Path) -> None:
    """Give the personalizations of a job that is to start those that other jobs finished, and say so.

    One is taken where notebook, parameters, photos and versions are the same, and no file of the kit or of the notebook
    was changed since it began. Its files are linked, so they take no room; what writes them later writes new ones.
    """
    for stage in stages:
        if stage.notebook.stem != PERSONALIZE or (stage.folder / MANIFEST).exists():
            continue
        for path in sorted(outputs.glob(f"*/{PERSONALIZE}*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns):
            if path.parent != stage.folder and _same(stage, path.parent):
                shutil.copytree(
                    path.parent, stage.folder, copy_function=link_or_copy, ignore=shutil.ignore_patterns(".*")
                )
                whose = path.parent.parent.name
                print(f"{stage.name}: that of {whose}, made with the same settings (--no-reuse makes it anew)")
                break


def _same(stage: Stage, folder: Path) -> bool:
    """Whether a run is what a stage would make."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return False
    if manifest["versions"] != versions() or manifest.get("edited_by_hand"):
        return False
    began = datetime.datetime.fromisoformat(manifest["started"]).timestamp()
    if _changed(stage.notebook) > began:
        return False
    other = Stage(stage.name, stage.notebook, stage.title, stage.parameters | {"run_out": str(folder)})
    return is_done(other)


def _changed(notebook: Path) -> float:
    """When the notebook or a file of the kit was changed last (POSIX time)."""
    return max(path.stat().st_mtime for path in [notebook, *Path(__file__).parents[1].rglob("*.py")])
