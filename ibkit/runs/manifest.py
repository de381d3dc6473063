"""Run folders: what a notebook wrote, proved complete and unaltered before anybody reads it.

A run is a folder with a `manifest.json` (status, parameters, inputs and outputs with their SHA-256, metrics, versions,
device, seconds) beside the files that it lists. While a run is going on, each finished file is noted in
`outputs.jsonl`, one line a file; `finish` moves the notes into the manifest.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ibkit import __version__
from ibkit.errors import ArtifactError
from ibkit.runs.files import (
    IMAGE_SUFFIXES,
    files_of,
    hash_file,
    hash_json,
    hash_tree,
    plain,
    project_root,
    read_json,
    resolve,
)
from ibkit.runs.locks import HOLDER, LOCK, held_by

if TYPE_CHECKING:
    import pandas as pd
    import torch

SCHEMA = 1
MANIFEST, JOURNAL = "manifest.json", "outputs.jsonl"
INPUT_PATHS = {"subject", "lora", "run_in", "runs", "run_evaluate", "ratings"}  # compared by content
NEWEST = ("run_in", "runs", "run_evaluate")  # of these, where they are empty, the newest run is taken
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
HOW = {"device", "processes", "micro_batch", "picture_cache"}  # parameters, and settings, that say how to run, not what
TEXT_COLUMNS = {"rater": str, "item": str}  # of tables: names that may look like numbers, "01"
NO_DEVICE = "nothing computed in this process"
PACKAGES = (
    "torch torchvision transformers diffusers peft accelerate open-clip-torch numpy pandas pillow papermill".split()
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run, finished or not; ArtifactError where it is missing, damaged or altered."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if manifest["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {manifest['schema']!r}, and this ibkit reads {SCHEMA}; run the notebook again."
            )
        if manifest.pop("digest", "") != hash_json(manifest):
            raise ValueError("it was altered after it was written")
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not a run: it has no {MANIFEST}; name a finished run's folder.") from None
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); remove the folder and run the notebook again.") from error
    return manifest


def checked_name(rel: str | os.PathLike) -> str:
    """A path inside a run folder in its one spelling: relative, with slashes, not the folder's own bookkeeping."""
    name = PurePosixPath(os.fspath(rel))
    if name.is_absolute() or ".." in name.parts or not name.parts or str(name) in (MANIFEST, JOURNAL, LOCK, HOLDER):
        raise ArtifactError(f"{os.fspath(rel)!r} is not a name for an output: it must be a path below the run folder.")
    return str(name)


def fault_of(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with an output: '' when it is there and its bytes are the ones noted."""
    path = folder / name
    if not path.is_file():
        return "missing"
    return "" if path.stat().st_size == entry["bytes"] and hash_file(path) == entry["sha256"] else "altered"


def identify(value: Any) -> dict[str, str]:
    """Name and hash of an input: any folder or file by content, a finished run by what it is.

    That is its kind, parameters, inputs and outputs, without folders, device, clock, or whether it was resumed: the
    same run made again is the same input.
    """
    path = Path(getattr(value, "folder", value)).resolve()
    if (path / MANIFEST).is_file():
        manifest = read_run(path).manifest
        inputs = {name: entry["sha256"] for name, entry in manifest["inputs"].items()}
        outputs = {name: entry.get("content", entry["sha256"]) for name, entry in manifest["outputs"].items()}
        digest = hash_json([manifest["kind"], compared(manifest["parameters"]), inputs, outputs])
    elif path.is_dir():
        digest = hash_tree(path, read_of(path))
    elif path.is_file():
        digest = hash_file(path)
    else:
        raise ArtifactError(f"The input {path} does not exist; check the path.")
    root = project_root()
    return {"path": path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path), "sha256": digest}


def read_of(folder: Path) -> Iterable[Path]:
    """The files of an input folder that are read: a model's parts, or the photos; of another kind of folder all.

    So captions, thumbnails or a second checkpoint that appear beside them do not make another input of it.
    """
    if (folder / "unet" / "config.json").is_file():
        return [path for part in MODEL_PARTS if (folder / part).is_dir() for path in files_of(folder / part)]
    photos = [path for path in files_of(folder) if path.parent == folder and path.suffix.lower() in IMAGE_SUFFIXES]
    return photos or files_of(folder)


def local_model(parameters: Mapping[str, Any]) -> dict[str, Path]:
    """The base model as an input, by its content, where it is a folder or file of the user's."""
    model = parameters.get("model", "")
    path = Path(model).expanduser()
    return {"model": path.resolve()} if model not in ("", "pocket", "sd15") and path.exists() else {}


def versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "ibkit": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_state() -> dict[str, Any]:
    """Commit of the checkout and whether files differ from it; {} outside of a checkout."""
    root = project_root()
    if not (root / ".git").exists():
        return {}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git program, no commit yet
        return {}


def device_of(name: str) -> str:
    if "torch" not in sys.modules:
        return NO_DEVICE
    from ibkit.device import describe_device, pick_device

    return describe_device(pick_device(name))


def compared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that say what a run is, and not where and how it ran; inputs are compared by their hashes."""
    left_out = HOW | INPUT_PATHS | {"resume", "run_out"}
    return {
        name: {n: v for n, v in value.items() if n not in HOW} if isinstance(value, dict) else value
        for name, value in parameters.items()
        if name not in left_out and name.rpartition(".")[2] not in HOW
    }


def differing_runs(old: Mapping[str, Any], kind: str, parameters: Mapping[str, Any], inputs: Mapping) -> list[str]:
    """Say what keeps a run, by its manifest, from being resumed: kind, parameters, inputs (identified)."""
    differ = [f"it was of {old['kind']} and is of {kind}"] if old["kind"] != kind else []
    plainly = json.loads(json.dumps(dict(parameters), default=plain))
    differ += differing(compared(old["parameters"]), compared(plainly))
    hashes = ({name: entry["sha256"][:12] for name, entry in of.items()} for of in (old["inputs"], inputs))
    return differ + differing(*hashes)


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say, name by name, what differs between two runs' parameters, inputs or versions."""
    pairs = [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
    return [f"{name} was {before!r} and is {now!r}" for name, before, now in pairs if before != now]


class CompletedRun:
    """A finished run whose outputs were all found unaltered. Get one with `read_run`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest

    @property
    def kind(self) -> str:
        """What wrote it, such as "01_personalize"."""
        return self.manifest["kind"]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters it was run with."""
        return self.manifest["parameters"]

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers it recorded."""
        return self.manifest["metrics"]

    @property
    def edited_by_hand(self) -> bool:
        """Whether something was saved into it after its end, such as by running one cell again."""
        return self.manifest.get("edited_by_hand", False)

    @property
    def outputs(self) -> list[str]:
        """Names of its files."""
        return list(self.manifest["outputs"])

    def path(self, rel: str | os.PathLike) -> Path:
        """Path of an output, or of a folder of outputs; raises ArtifactError when there is none of that name."""
        name = checked_name(rel)
        if name not in self.manifest["outputs"] and not any(out.startswith(f"{name}/") for out in self.outputs):
            raise ArtifactError(f"The run in {self.folder} has no output {name!r}; it has {', '.join(self.outputs)}.")
        return self.folder / name

    def table(self, rel: str | os.PathLike) -> "pd.DataFrame":
        """An output as a table, as it was written: only an empty field is a missing value."""
        import pandas as pd

        return pd.read_csv(self.path(rel), keep_default_na=False, na_values=[""], dtype=TEXT_COLUMNS)

    def json(self, rel: str | os.PathLike) -> Any:
        """An output as a JSON value."""
        return read_json(self.path(rel))

    def tensors(self, rel: str | os.PathLike) -> dict[str, "torch.Tensor"]:
        """An output as tensors on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path(rel))


def read_run(folder: str | os.PathLike, *kinds: str) -> CompletedRun:
    """Read a finished run, after comparing every output with its hash.

    Args:
        folder: the run folder.
        kinds: what may have written it, such as "01_personalize"; none = anything.

    Raises:
        ArtifactError: no manifest, an unknown schema, not complete, another kind, or an output missing or altered.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    status = manifest["status"]
    if status == "failed":
        raise ArtifactError(f"The run in {folder} failed: {manifest.get('reason', 'no reason noted')}")
    if status != "complete":
        holder = held_by(folder)
        what = f"is still being written by process {holder}; wait for it" if holder else "was interrupted; resume it"
        raise ArtifactError(f"The run in {folder} {what}.")
    if kinds and manifest["kind"] not in kinds:
        needed = " or ".join(kinds)
        raise ArtifactError(f"The run in {folder} is one of {manifest['kind']}, and one of {needed} is needed here.")
    for name, entry in manifest["outputs"].items():
        if fault := fault_of(folder, checked_name(name), entry):
            raise ArtifactError(f"{folder / name} is {fault} since the run ended; run the notebook again.")
    return CompletedRun(folder, manifest)


def input_of(run: CompletedRun, name: str, *kinds: str) -> CompletedRun:
    """The finished run that another one took as an input.

    It is looked for at its noted path and, for runs that were moved together, beside the other one; whichever is found
    must have the hash that the manifest gives.

    Raises:
        ArtifactError: it is in neither place, or is not finished.
    """
    source = run.manifest["inputs"][name]
    places = [resolve(source["path"]), run.folder.parent / Path(source["path"]).name]
    for place in places:
        if (place / MANIFEST).is_file() and identify(place)["sha256"] == source["sha256"]:
            return read_run(place, *kinds)
    raise ArtifactError(
        f"The run of {' or '.join(kinds)} that {run.folder} started from is neither in {places[0]} nor in {places[1]}: "
        "put it back beside that run."
    )
