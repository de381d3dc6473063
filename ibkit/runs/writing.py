"""Writing a run; see `manifest` for what one is."""

import datetime
import hashlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibkit.errors import ArtifactError
from ibkit.runs.checkpoints import CHECKPOINTS
from ibkit.runs.files import (
    TEMPORARY_SUFFIX,
    files_of,
    hash_file,
    hash_json,
    link_or_copy,
    parse_json,
    plain,
    savable,
    save_tensors,
    sync,
    write_atomically,
)
from ibkit.runs.locks import HOLDER, LOCK, FolderLock
from ibkit.runs.manifest import (
    JOURNAL,
    MANIFEST,
    NO_DEVICE,
    SCHEMA,
    checked_name,
    device_of,
    differing,
    differing_runs,
    fault_of,
    git_state,
    identify,
    read_manifest,
    versions,
)

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from PIL import Image

CLOCK = "seconds"  # the column of tables that differs between equal runs
_OPEN: dict[Path, "Run"] = {}  # runs this process holds, so that re-running a notebook's cell takes the folder over


def let_go(folder: Path) -> None:
    """Close a run that this process has open, so that a notebook's cell can run again."""
    if folder in _OPEN:
        _OPEN[folder]._close()


def _require_run_or_empty(folder: Path) -> None:
    """Refuse a folder of somebody's files before anything, a lock included, is put into it."""
    if folder.is_dir() and not (folder / MANIFEST).exists():
        leftovers = {LOCK, HOLDER, *(path.name for path in folder.glob(f".*{TEMPORARY_SUFFIX}"))}
        if any(path.name not in leftovers for path in folder.iterdir()):
            raise ArtifactError(f"{folder} has files in it but is not a run; choose a new or an empty folder.")


def _taken(folder: Path) -> str:
    return f"{folder} already has a run in it; go on with it (resume=True, or --resume), remove it, or choose another."


class Run:
    """A run folder being written. Make one with `Run.open`; it ends with `finish` or `fail`.

    Attributes:
        folder: where it is.
        manifest: what `manifest.json` says or will say.
    """

    def __init__(self, folder: Path, lock: FolderLock, manifest: dict[str, Any], by_hand: bool = False):
        self.folder = folder
        self.manifest = manifest
        self.by_hand = by_hand
        self._lock: FolderLock | None = lock
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
        by_hand: bool = False,
        other_values: bool = False,
    ) -> "Run":
        """Start a run in an empty or new folder, or resume the one that is there.

        Args:
            folder: the run folder; `open_run` takes it from a notebook's parameters.
            kind: what wrote it, such as "01_personalize".
            parameters: plain values; on resuming, those of the run that is there must be equal.
            inputs: name -> file, folder, finished run's folder, or `CompletedRun`; recorded with their hashes.
            resume: whether to resume a run in that folder. A folder without one starts a new run either way.
            other_values: whether a run that is resumed may get other parameters and inputs; its caller compares them.
            by_hand: whether the run may be written to after its end, which marks it as edited.

        Raises:
            ArtifactError: another live process holds the folder; it has files but is not a run; it has a run and
                `resume` is False; the run there is of another kind, parameters or inputs; an input is not usable.
        """
        folder = Path(folder).resolve()
        plainly = json.loads(_to_json(dict(parameters), f"open the run {folder} with its parameters"))
        identified = {name: identify(value) for name, value in (inputs or {}).items()}
        if folder in _OPEN and not resume:
            raise ArtifactError(_taken(folder))
        let_go(folder)
        _require_run_or_empty(folder)
        lock = FolderLock(folder)
        try:
            manifest = cls._prepare(folder, kind, plainly, identified, resume, other_values)
            run = cls(folder, lock, manifest, by_hand)
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
    def _prepare(
        folder: Path, kind: str, parameters: dict, inputs: dict, resume: bool, other_values: bool
    ) -> dict[str, Any]:
        """The manifest to go on with: a new one, or that of the run in the folder when it may be resumed."""
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "status": "running",
            "parameters": parameters,
            "inputs": inputs,
            "outputs": {},
            "metrics": {},
            "versions": versions(),
            "device": device_of(parameters.get("device", "auto")),
            "git": git_state(),
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
        if differ := [] if other_values else differing_runs(old, kind, parameters, inputs):
            raise ArtifactError(
                f"The run in {folder} cannot be resumed, because it was started with other values: "
                f"{'; '.join(differ)}; use the old ones, or choose another folder."
            )
        outputs = {**old["outputs"], **_read_journal(folder)}
        for name, entry in list(outputs.items()):
            if fault := fault_of(folder, name, entry):
                warnings.warn(f"{folder / name} is {fault} and will have to be made again.", stacklevel=4)
                del outputs[name]
                old["status"] = "running"
        changed = differing(old["versions"], manifest["versions"])
        if len({one["device"].partition(",")[0] for one in (old, manifest)} - {NO_DEVICE}) > 1:
            changed.append(f"the device was {old['device']!r} and is {manifest['device']!r}")
        if changed:
            warnings.warn(f"The run in {folder} goes on with other versions: {'; '.join(changed)}.", stacklevel=4)
        kept = {k: old[k] for k in ("status", "metrics", "started", "seconds", "edited_by_hand") if k in old}
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
        return checked_name(rel) in self.manifest["outputs"]

    def path(self, rel: str | os.PathLike) -> Path:
        """Where an output is or will be; its folder is made. What is written there by others needs `note_output`."""
        path = self.folder / checked_name(rel)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, rel: str | os.PathLike, data: bytes) -> Path:
        """Write an output from bytes; returns its path."""
        return self._write(rel, len(data), lambda temporary: temporary.write_bytes(data))

    def link(self, rel: str | os.PathLike, source: Path) -> Path:
        """Make an output of a file elsewhere that nobody changes, without its room (a hard link); returns its path."""
        return self._write(rel, source.stat().st_size, lambda temporary: link_or_copy(source, temporary))

    def write_text(self, rel: str | os.PathLike, text: str) -> Path:
        """Write an output from text (UTF-8, newlines as they are); returns its path."""
        return self.write_bytes(rel, text.encode())

    def write_json(self, rel: str | os.PathLike, value: Any) -> Path:
        """Write an output as JSON; returns its path. A number that is not finite is refused."""
        return self.write_text(rel, _to_json(value, f"write {self.folder / rel}", indent=1, ensure_ascii=False) + "\n")

    def write_table(self, rel: str | os.PathLike, table: "pd.DataFrame") -> None:
        """Write a table as CSV without its index, floats in full.

        It returns nothing, so that a notebook's cell can end with it. A column "seconds" is written like any other, and
        left out where runs are compared.
        """
        data, timeless = (
            one.to_csv(index=False, lineterminator="\n").encode()
            for one in (table, table.drop(columns=CLOCK, errors="ignore"))
        )
        content = hashlib.sha256(timeless).hexdigest() if timeless != data else ""
        self._write(rel, len(data), lambda temporary: temporary.write_bytes(data), content)

    def write_picture(self, rel: str | os.PathLike, picture: "Image.Image") -> Path:
        """Write a picture as PNG; returns its path."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return self.write_bytes(rel, buffer.getvalue())

    def write_tensors(self, rel: str | os.PathLike, tensors: Mapping[str, "torch.Tensor"]) -> Path:
        """Write tensors as safetensors; returns its path."""
        tensors = savable(tensors)
        need_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return self._write(rel, need_bytes, lambda temporary: save_tensors(tensors, temporary))

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

        stem = checked_name(rel_stem)
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
        name = checked_name(rel)
        path = self.folder / name
        files = list(files_of(path)) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            raise ArtifactError(f"{path} cannot be an output of this run: there is no file.")
        with self._writing():
            for old in [old for old in self.manifest["outputs"] if old.startswith(f"{name}/")]:
                if not (self.folder / old).is_file():
                    del self.manifest["outputs"][old]
            for file in files:
                sync(file)
                self._note(file.relative_to(self.folder).as_posix())

    def record(self, **metrics: Any) -> None:
        """Put numbers (or plain lists and dicts of them) into the manifest; a later value replaces an earlier one."""
        plain_metrics = json.loads(_to_json(metrics, f"record {', '.join(metrics)} in {self.folder}"))
        with self._writing():
            self.metrics.update(plain_metrics)
            self._write_manifest()

    def finish(self) -> None:
        """Mark the run complete, drop its trainings' checkpoints, and release its folder.

        A complete run that was only read stays as it is. One made by hand keeps its checkpoints, so that its cells can
        run again without training again.
        """
        if self._lock is None and self.by_hand and self.complete:
            return  # the last cell, run again
        self._require_open()
        if not self.complete:
            for name, entry in self.manifest["outputs"].items():
                path = self.folder / name
                if not path.is_file() or path.stat().st_size != entry["bytes"]:
                    raise ArtifactError(f"{path} was changed after it was written; run the notebook again.")
            self.manifest["status"] = "complete"
            self._write_manifest()
            (self.folder / JOURNAL).unlink(missing_ok=True)
        if not self.by_hand:
            for checkpoints in list(self.folder.rglob(CHECKPOINTS)):
                if next(f for f in checkpoints.parents if (f / MANIFEST).exists()) == self.folder:  # no other run's
                    shutil.rmtree(checkpoints)
        self._close()

    def fail(self, reason: str) -> None:
        """Mark the run failed, with the reason in a sentence, and release its folder. It can be resumed."""
        with self._writing():
            self.manifest["status"] = "failed"
            self.manifest["reason"] = reason
            self._write_manifest()
        self._close()

    def _require_open(self) -> None:
        if self._lock is None:
            raise ArtifactError(f"The run in {self.folder} is closed; open it again with resume=True to write to it.")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A complete run stops being complete before the first byte in it changes; by hand it may, after its end."""
        edited = self._lock is None and self.by_hand and self.complete
        if self._lock is None and self.by_hand:
            self._lock, _OPEN[self.folder] = FolderLock(self.folder), self
        self._require_open()
        if edited:
            self.manifest["edited_by_hand"] = True
        if self.complete:
            self.manifest["status"] = "running"
            self._write_manifest()
        try:
            yield
        finally:
            if edited:
                self.finish()

    def _write(self, rel: str | os.PathLike, need_bytes: int, write: Callable[[Path], Any], content: str = "") -> Path:
        name = checked_name(rel)
        with self._writing():
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


def _to_json(value: Any, doing: str, **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=plain, **options)
    except (TypeError, ValueError) as error:
        if isinstance(value, Mapping):  # which of them is it?
            for name, part in value.items():
                _to_json(part, f"{doing}: {name}")
        raise ArtifactError(f"Cannot {doing}: {error}.") from error


def _read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """Outputs noted before a run was interrupted; a line that is no note, such as a last one that was cut short, is of
    an output that has to be made again.
    """
    path, entries = folder / JOURNAL, {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            name = checked_name(entry.pop("name"))
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise ValueError("its bytes and sha256 are none")
            entries[name] = entry
        except (ValueError, KeyError, TypeError, AttributeError, ArtifactError) as error:
            if number < len(lines):
                warnings.warn(f"{path}, line {number} is no note of an output ({error}); it is left out.", stacklevel=5)
    return entries
