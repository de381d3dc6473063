"""Run folders: what a notebook wrote, proved complete and unaltered before anybody reads it.

A run is a folder with a `manifest.json` (status, parameters, inputs and outputs with their SHA-256, metrics, versions,
device, seconds) beside the files that it lists. Every file is written under another name in the same folder, synced,
and renamed into place, so that a process stopped at any moment leaves the old file or the new one, never half of one.
While a run is going on, each finished file is noted in `outputs.jsonl`, one line a file; `finish` moves the notes into
the manifest.
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ibkit import __version__
from ibkit.errors import ArtifactError

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from PIL import Image

SCHEMA = 1
MANIFEST, JOURNAL, LOCK = "manifest.json", "outputs.jsonl", ".lock"
TEMPORARY_SUFFIX = ".tmp"
DISK_RESERVE_BYTES = 64 * 2**20  # kept free beyond what a write needs: file systems get slow and odd when they are full
INPUT_PATHS = {"subject", "run_in", "run_dreambooth", "run_rl", "run_evaluate", "ratings"}  # compared by content
# Parameters that say where and how to run, not what.
NOT_COMPARED = {"resume", "run_out", "device", "processes", "micro_batch"} | INPUT_PATHS
NO_DEVICE = "nothing computed in this process"
CLOCK = "seconds"  # the column of tables that differs between equal runs
PACKAGES = (
    "torch torchvision transformers diffusers peft accelerate open-clip-torch numpy pandas pillow papermill".split()
)


# ---------------------------------------------------------------------------------------------------- places


def project_root() -> Path:
    """The checkout that holds the package and the notebooks; the current folder when the package stands alone."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def resolve(path: str | os.PathLike) -> Path:
    """Make a path absolute: `~` is the home folder, and a relative path starts at the checkout.

    Papermill runs a notebook in the folder it was launched from and Jupyter in the notebook's own, so the current
    folder means nothing in a notebook.
    """
    return project_root() / Path(path).expanduser()


def run_folder(notebook: str, run_out: str = "") -> Path:
    """The folder of a notebook's run: `run_out`, or outputs/notebook-<its name> when that is empty."""
    return resolve(run_out or f"outputs/notebook-{notebook}")


# ---------------------------------------------------------------------------------------------------- hashes


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same for equal values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tree(folder: str | os.PathLike) -> str:
    """SHA-256 of a folder's files: their relative names and contents. Hidden files are left out."""
    folder = Path(folder)
    return hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in _files(folder)})


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _plain(value: Any) -> Any:
    """What JSON writes for a NumPy or PyTorch number or array, or a path."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# ---------------------------------------------------------------------------------------------------- atomic writes


def require_disk(folder: str | os.PathLike, need_bytes: int) -> None:
    """Raise ArtifactError unless `need_bytes` can be written to `folder` (which need not exist yet)."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need_bytes + DISK_RESERVE_BYTES:
        raise ArtifactError(
            f"The disk of {folder} is full: {need_bytes / 2**20:.0f} MiB are to be written and {free / 2**20:.0f} MiB "
            f"are free ({DISK_RESERVE_BYTES / 2**20:.0f} MiB are kept in reserve); free some space, then resume."
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, need_bytes: int, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then put it in place of `path`."""
    require_disk(path.parent, need_bytes)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise ArtifactError(f"Cannot write {path}: {error.strerror or error}; free space or fix its folder.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _save_tensors(tensors: Mapping[str, "torch.Tensor"], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its name for a full disk too
        raise OSError(str(error)) from error


def _savable(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """Tensors as safetensors takes them: on the CPU, contiguous, none sharing memory with another."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result


# ---------------------------------------------------------------------------------------------------- manifests


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run, finished or not; ArtifactError where it is missing, damaged or altered."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
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


def _checked_name(rel: str | os.PathLike) -> str:
    """A path inside a run folder in its one spelling: relative, with slashes, not the folder's own bookkeeping."""
    name = PurePosixPath(os.fspath(rel))
    if name.is_absolute() or ".." in name.parts or not name.parts or str(name) in (MANIFEST, JOURNAL, LOCK):
        raise ArtifactError(f"{os.fspath(rel)!r} is not a name for an output: it must be a path below the run folder.")
    return str(name)


def _fault(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
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
        digest = hash_tree(path)
    elif path.is_file():
        digest = hash_file(path)
    else:
        raise ArtifactError(f"The input {path} does not exist; check the path.")
    root = project_root()
    return {"path": path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path), "sha256": digest}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "ibkit": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _git() -> dict[str, Any]:
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


def _device(name: str) -> str:
    if "torch" not in sys.modules:
        return NO_DEVICE
    from ibkit.device import describe_device, pick_device

    return describe_device(pick_device(name))


# ---------------------------------------------------------------------------------------------------- locking


def _require_run_or_empty(folder: Path) -> None:
    """Refuse a folder of somebody's files before anything, a lock included, is put into it."""
    if folder.is_dir() and not (folder / MANIFEST).exists():
        leftovers = {LOCK, *(path.name for path in folder.glob(f".*{TEMPORARY_SUFFIX}"))}
        if any(path.name not in leftovers for path in folder.iterdir()):
            raise ArtifactError(f"{folder} has files in it but is not a run; choose a new or an empty folder.")


def _taken(folder: Path) -> str:
    return f"{folder} already has a run in it; go on with it (resume=True, or --resume), remove it, or choose another."


class _Lock:
    """A run folder held by this process; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ArtifactError(f"Cannot use {folder} as a run folder: {error.strerror}; choose another.") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 20, 0).decode(errors="replace")
            os.close(self._descriptor)
            if not isinstance(error, BlockingIOError):
                raise ArtifactError(f"{folder} is on a file system without locks ({error.strerror}).") from error
            raise ArtifactError(
                f"{folder} is in use by process {holder or '(unknown)'}; wait for it, or choose another run folder."
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


def held_by(folder: Path) -> str:
    """Process id of the live process that holds a run folder, or ''."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return os.pread(descriptor, 20, 0).decode(errors="replace") or "(unknown)"
    finally:
        os.close(descriptor)


_OPEN: dict[Path, "Run"] = {}  # runs this process holds, so that re-running a notebook's cell takes the folder over


# ---------------------------------------------------------------------------------------------------- writing a run


class Run:
    """A run folder being written. Make one with `Run.open`; it ends with `finish` or `fail`.

    Attributes:
        folder: where it is.
        manifest: what `manifest.json` says or will say.
    """

    def __init__(self, folder: Path, lock: _Lock, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self._lock: _Lock | None = lock
        self._clock = time.monotonic()
        self._seconds_before = manifest["seconds"]

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        kind: str,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> "Run":
        """Start a run in an empty or new folder, or go on with the one that is there.

        Args:
            folder: the run folder; `run_folder` makes one from a notebook's parameters.
            kind: what wrote it, such as "01_personalize".
            parameters: plain values; on resuming, those of the run that is there must be equal.
            inputs: name -> file, folder, finished run's folder, or `CompletedRun`; recorded with their hashes.
            resume: whether to go on with a run in that folder. A folder without one starts a new run either way.

        Raises:
            ArtifactError: another live process holds the folder; it has files but is not a run; it has a run and
                `resume` is False; the run there is of another kind, parameters or inputs; an input is not usable.
        """
        folder = Path(folder).resolve()
        parameters = json.loads(json.dumps(dict(parameters), default=_plain))
        identified = {name: identify(value) for name, value in (inputs or {}).items()}
        if folder in _OPEN and not resume:
            raise ArtifactError(_taken(folder))
        if folder in _OPEN:
            _OPEN[folder]._close()
        _require_run_or_empty(folder)
        lock = _Lock(folder)
        try:
            manifest = cls._prepare(folder, kind, parameters, identified, resume)
            run = cls(folder, lock, manifest)
            if manifest["status"] != "complete":
                manifest["status"] = "running"
                run._write_manifest()
            (folder / JOURNAL).unlink(missing_ok=True)
        except BaseException:
            lock.release()
            raise
        _OPEN[folder] = run
        return run

    @staticmethod
    def _prepare(folder: Path, kind: str, parameters: dict, inputs: dict, resume: bool) -> dict[str, Any]:
        """The manifest to go on with: a new one, or that of the run in the folder when it may be resumed."""
        manifest = {
            "schema": SCHEMA,
            "kind": kind,
            "status": "running",
            "parameters": parameters,
            "inputs": inputs,
            "outputs": {},
            "metrics": {},
            "versions": _versions(),
            "device": _device(parameters.get("device", "auto")),
            "git": _git(),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
        }
        for leftover in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        if not (folder / MANIFEST).exists():
            return manifest
        if not resume:
            raise ArtifactError(_taken(folder))
        old = read_manifest(folder)
        if old["kind"] != kind:
            raise ArtifactError(f"{folder} has a run of {old['kind']} in it, not of {kind}; choose another folder.")
        differ = differing(compared(old["parameters"]), compared(parameters))
        differ += differing(
            *({name: entry["sha256"][:12] for name, entry in of.items()} for of in (old["inputs"], inputs))
        )
        if differ:
            raise ArtifactError(
                f"The run in {folder} cannot be resumed, because it was started with other values: "
                f"{'; '.join(differ)}; use the old ones, or choose another folder."
            )
        outputs = {**old["outputs"], **_read_journal(folder)}
        for name, entry in list(outputs.items()):
            if fault := _fault(folder, name, entry):
                warnings.warn(f"{folder / name} is {fault} and will have to be made again.", stacklevel=4)
                del outputs[name]
                old["status"] = "running"
        changed = differing(old["versions"], manifest["versions"])
        if len({one["device"].partition(",")[0] for one in (old, manifest)} - {NO_DEVICE}) > 1:
            changed.append(f"the device was {old['device']!r} and is {manifest['device']!r}")
        if changed:
            warnings.warn(f"The run in {folder} goes on with other versions: {'; '.join(changed)}.", stacklevel=4)
        kept = {key: old[key] for key in ("status", "metrics", "started", "seconds")}
        return manifest | kept | {"outputs": outputs}

    @property
    def complete(self) -> bool:
        """Whether everything was written and `finish` was called, now or before this run was resumed."""
        return self.manifest["status"] == "complete"

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers recorded so far."""
        return self.manifest["metrics"]

    def has(self, rel: str | os.PathLike) -> bool:
        """Whether an output was written in full, now or before this run was resumed."""
        return _checked_name(rel) in self.manifest["outputs"]

    def path(self, rel: str | os.PathLike) -> Path:
        """Where an output is or will be; its folder is made. What is written there by others needs `note_output`."""
        path = self.folder / _checked_name(rel)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, rel: str | os.PathLike, data: bytes) -> Path:
        """Write an output from bytes; returns its path."""
        return self._write(rel, len(data), lambda temporary: temporary.write_bytes(data))

    def write_text(self, rel: str | os.PathLike, text: str) -> Path:
        """Write an output from text (UTF-8, newlines as they are); returns its path."""
        return self.write_bytes(rel, text.encode())

    def write_json(self, rel: str | os.PathLike, value: Any) -> Path:
        """Write an output as JSON; returns its path. A number that is not finite is refused."""
        try:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"Cannot write {self.folder / rel}: {error}.") from error
        return self.write_text(rel, text + "\n")

    def write_table(self, rel: str | os.PathLike, table: "pd.DataFrame") -> Path:
        """Write a table as CSV without its index, floats in full; returns its path.

        A column "seconds" is written like any other, and left out where runs are compared.
        """
        data, timeless = (
            one.to_csv(index=False, lineterminator="\n").encode()
            for one in (table, table.drop(columns=CLOCK, errors="ignore"))
        )
        content = hashlib.sha256(timeless).hexdigest() if timeless != data else ""
        return self._write(rel, len(data), lambda temporary: temporary.write_bytes(data), content)

    def write_picture(self, rel: str | os.PathLike, picture: "Image.Image") -> Path:
        """Write a picture as PNG; returns its path."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return self.write_bytes(rel, buffer.getvalue())

    def write_tensors(self, rel: str | os.PathLike, tensors: Mapping[str, "torch.Tensor"]) -> Path:
        """Write tensors as safetensors; returns its path."""
        tensors = _savable(tensors)
        need_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return self._write(rel, need_bytes, lambda temporary: _save_tensors(tensors, temporary))

    def save_figure(self, figure: "Figure", rel_stem: str | os.PathLike, data: "pd.DataFrame") -> Path:
        """Write a figure as PNG and SVG, and what it draws as CSV.

        Args:
            figure: a matplotlib figure.
            rel_stem: its name without the suffix, such as "figures/reward".
            data: the numbers in it, one row for each mark.

        Returns:
            Path of the PNG.
        """
        import matplotlib

        stem = _checked_name(rel_stem)
        self.write_table(f"{stem}.csv", data)
        # A fixed salt and no date: the same figure gives the same file.
        with matplotlib.rc_context({"svg.hashsalt": "ibkit"}):
            for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
                path = self.write_bytes(f"{stem}.{suffix}", buffer.getvalue())
        return path

    def note_output(self, rel: str | os.PathLike) -> None:
        """Take a file, or every file of a folder, that other code wrote at `path(rel)` for an output.

        Raises:
            ArtifactError: there is nothing.
        """
        name = _checked_name(rel)
        path = self.folder / name
        files = list(_files(path)) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            raise ArtifactError(f"{path} cannot be an output of this run: there is no file.")
        self._begin_writing()
        for old in [old for old in self.manifest["outputs"] if old.startswith(f"{name}/")]:
            if not (self.folder / old).is_file():
                del self.manifest["outputs"][old]
        for file in files:
            _sync(file)
            self._note(file.relative_to(self.folder).as_posix())

    def record(self, **metrics: Any) -> None:
        """Put numbers (or plain lists and dicts of them) into the manifest; a later value replaces an earlier one."""
        try:
            plain = json.loads(json.dumps(metrics, allow_nan=False, default=_plain))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"Cannot record {', '.join(metrics)} in {self.folder}: {error}.") from error
        self._begin_writing()
        self.metrics.update(plain)
        self._write_manifest()

    def finish(self) -> None:
        """Mark the run complete and let go of its folder. A complete run that was only looked at stays as it is."""
        self._require_open()
        if not self.complete:
            for name, entry in self.manifest["outputs"].items():
                path = self.folder / name
                if not path.is_file() or path.stat().st_size != entry["bytes"]:
                    raise ArtifactError(f"{path} was changed after it was written; run the notebook again.")
            self.manifest["status"] = "complete"
            self._write_manifest()
            (self.folder / JOURNAL).unlink(missing_ok=True)
        self._close()

    def fail(self, reason: str) -> None:
        """Mark the run failed, with the reason in a sentence, and let go of its folder. It can be resumed."""
        self._begin_writing()
        self.manifest["status"] = "failed"
        self.manifest["reason"] = reason
        self._write_manifest()
        self._close()

    def _require_open(self) -> None:
        if self._lock is None:
            raise ArtifactError(f"The run in {self.folder} is closed; open it again with resume=True to write to it.")

    def _begin_writing(self) -> None:
        """A complete run stops being complete before the first byte in it changes."""
        self._require_open()
        if self.complete:
            self.manifest["status"] = "running"
            self._write_manifest()

    def _write(self, rel: str | os.PathLike, need_bytes: int, write: Callable[[Path], Any], content: str = "") -> Path:
        name = _checked_name(rel)
        self._begin_writing()
        write_atomically(self.folder / name, need_bytes, write)
        self._note(name, content)
        return self.folder / name

    def _note(self, name: str, content: str = "") -> None:
        path = self.folder / name
        entry = {"sha256": hash_file(path), "bytes": path.stat().st_size} | ({"content": content} if content else {})
        try:
            with open(self.folder / JOURNAL, "a") as journal:
                journal.write("\n" + json.dumps({"name": name, **entry}))  # a line cut short ends at the next "\n"
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise ArtifactError(f"Cannot write {self.folder / JOURNAL}: {error.strerror}; free some space.") from error
        self.manifest["outputs"][name] = entry

    def _write_manifest(self) -> None:
        self.manifest["seconds"] = round(self._seconds_before + time.monotonic() - self._clock, 3)
        signed = self.manifest | {"digest": hash_json(self.manifest)}
        data = (json.dumps(signed, indent=1, ensure_ascii=False) + "\n").encode()
        write_atomically(self.folder / MANIFEST, len(data), lambda temporary: temporary.write_bytes(data))

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            _OPEN.pop(self.folder, None)


def compared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that say what a run is, without those that say where and how it ran."""
    return {name: value for name, value in parameters.items() if name not in NOT_COMPARED}


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say, name by name, what differs between two runs' parameters, inputs or versions."""
    pairs = [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
    return [f"{name} was {before!r} and is {now!r}" for name, before, now in pairs if before != now]


def _read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """Outputs noted before a run was interrupted; a last line cut short is an output whose note was not finished."""
    path = folder / JOURNAL
    entries = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries[_checked_name(entry.pop("name"))] = entry
    return entries


# ---------------------------------------------------------------------------------------------------- reading a run


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
    def outputs(self) -> list[str]:
        """Names of its files."""
        return list(self.manifest["outputs"])

    def path(self, rel: str | os.PathLike) -> Path:
        """Path of an output, or of a folder of outputs; raises ArtifactError when there is none of that name."""
        name = _checked_name(rel)
        if name not in self.manifest["outputs"] and not any(out.startswith(f"{name}/") for out in self.outputs):
            raise ArtifactError(f"The run in {self.folder} has no output {name!r}; it has {', '.join(self.outputs)}.")
        return self.folder / name

    def table(self, rel: str | os.PathLike) -> "pd.DataFrame":
        """An output as a table, as it was written: only an empty field is a missing value."""
        import pandas as pd

        return pd.read_csv(self.path(rel), keep_default_na=False, na_values=[""])

    def json(self, rel: str | os.PathLike) -> Any:
        """An output as a JSON value."""
        return json.loads(self.path(rel).read_text(encoding="utf-8"))

    def tensors(self, rel: str | os.PathLike) -> dict[str, "torch.Tensor"]:
        """An output as tensors on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path(rel))


def read_run(folder: str | os.PathLike, kind: str = "") -> CompletedRun:
    """Read a finished run, after comparing every output with its hash.

    Args:
        folder: the run folder.
        kind: what must have written it, such as "01_personalize"; empty = anything.

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
    if kind and manifest["kind"] != kind:
        raise ArtifactError(f"The run in {folder} is one of {manifest['kind']}, and one of {kind} is needed here.")
    for name, entry in manifest["outputs"].items():
        if fault := _fault(folder, _checked_name(name), entry):
            raise ArtifactError(f"{folder / name} is {fault} since the run ended; run the notebook again.")
    return CompletedRun(folder, manifest)


# ---------------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The newest few states of a loop, each a folder `step-000123` with tensors and a JSON state.

    Args:
        folder: where they are kept; made when it is not there.
        keep: how many are kept; at least two, so that a damaged one has one before it.
    """

    TENSORS, STATE = "tensors.safetensors", "state.json"

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, not {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, "torch.Tensor"], state: Mapping[str, Any]) -> None:
        """Save a state in full or not at all; then drop the oldest, and any from a later step than this one.

        Args:
            step: how many steps are done.
            tensors: weights, optimizer moments, random generators' states.
            state: what JSON can hold; its keys are texts.

        Raises:
            ArtifactError: the disk is full, or the folder cannot be written.
        """
        tensors = _savable(tensors)
        text = json.dumps(dict(state), default=_plain)
        require_disk(self.folder, sum(tensor.nbytes for tensor in tensors.values()) + len(text))
        target = self.folder / f"step-{step:06d}"
        building, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            building.mkdir()
            _save_tensors(tensors, building / self.TENSORS)
            head = {"schema": SCHEMA, "step": step, "tensors_sha256": hash_file(building / self.TENSORS)}
            head["state_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            # The state is kept as text inside the JSON, so that its hash is that of the very characters.
            (building / self.STATE).write_text(json.dumps(head | {"state": text}))
            for path in (building / self.TENSORS, building / self.STATE, building):
                _sync(path)
            if target.exists():
                os.rename(target, replaced)
            os.rename(building, target)
            _sync(self.folder)
            steps = self.steps()
            for other in [s for s in steps if s > step] + [s for s in steps if s <= step][: -self.keep]:
                os.rename(self.folder / f"step-{other:06d}", self.folder / f".step-{other:06d}.drop")
            self._clear_leftovers()
        except OSError as error:
            raise ArtifactError(f"Cannot save a checkpoint in {self.folder}: {error.strerror or error}.") from error

    def steps(self) -> list[int]:
        """Steps there are checkpoints of, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdecimal())

    def latest(self) -> tuple[int, dict[str, "torch.Tensor"], dict[str, Any]] | None:
        """The newest undamaged state as (step, tensors, state), or None when there is none.

        A damaged one is passed over with a warning.
        """
        self._clear_leftovers()
        steps = self.steps()
        while steps:
            step = steps.pop()
            try:
                return step, *self._load(step)
            except (OSError, ValueError, KeyError, TypeError) as error:
                instead = "the one before it is used" if steps else "none is left, so training starts anew"
                warnings.warn(
                    f"The checkpoint of step {step} in {self.folder} is damaged ({error}); {instead}.", stacklevel=2
                )
        return None

    def _load(self, step: int) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
        from safetensors.torch import load_file

        folder = self.folder / f"step-{step:06d}"
        head = json.loads((folder / self.STATE).read_text())
        if hashlib.sha256(head["state"].encode()).hexdigest() != head["state_sha256"]:
            raise ValueError("its state was altered")
        if hash_file(folder / self.TENSORS) != head["tensors_sha256"]:
            raise ValueError("its tensors were altered")
        return load_file(folder / self.TENSORS), json.loads(head["state"])

    def _clear_leftovers(self) -> None:
        """Remove what a killed `save` left behind, after putting back a state it had moved aside but not replaced."""
        for replaced in self.folder.glob(".step-*.old"):
            target = self.folder / replaced.name[1 : -len(".old")]
            if not target.exists():
                os.rename(replaced, target)
        for suffix in ("new", "old", "drop"):
            for leftover in self.folder.glob(f".step-*.{suffix}"):
                shutil.rmtree(leftover)
