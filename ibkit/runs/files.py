"""Files: where they are, their hashes, and writing them whole or not at all.

Every file is written under another name in the same folder, synced, and renamed into place. A process stopped at any
moment leaves the old file or the new one, never half of one.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibkit.errors import ArtifactError

if TYPE_CHECKING:
    import torch

# A file with one of these endings is meant to be a picture: if it does not decode, that is an error.
IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in "jpg jpeg jpe jfif mpo png apng webp gif bmp tif tiff avif heic heif jp2 tga ppm pgm pnm".split()
)
TEMPORARY_SUFFIX = ".tmp"
DISK_RESERVE_BYTES = 64 * 2**20  # kept free beyond what a write needs: full file systems get slow and fail oddly


def project_root() -> Path:
    """The checkout that holds the package and the notebooks; the current folder when the package stands alone."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def resolve(path: str | os.PathLike) -> Path:
    """Make a path absolute: `~` is the home folder, and a relative path starts at the checkout.

    Papermill runs a notebook in the folder it was launched from and Jupyter in the notebook's own, so the current
    folder means nothing in a notebook.
    """
    return project_root() / Path(path).expanduser()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; a ValueError says what is wrong with it, also where it is nested too deeply to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file; an OSError or ValueError says what is wrong with it."""
    return parse_json(Path(path).read_bytes())


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same for equal values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tree(folder: str | os.PathLike, files: Iterable[Path] | None = None) -> str:
    """SHA-256 of a folder's files, or of some of them: their relative names and contents. Hidden ones are left out."""
    folder = Path(folder)
    files = files_of(folder) if files is None else files
    return hash_json({path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def files_of(folder: Path) -> Iterator[Path]:
    """The files below a folder but the hidden ones, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def plain(value: Any) -> Any:
    """Convert NumPy and PyTorch values and paths to JSON types."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


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


def sync(path: Path) -> None:
    """Make the system write a file, or a folder's entries, to the disk."""
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
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise ArtifactError(f"Cannot write {path}: {error.strerror or error}; free space or fix its folder.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A hard link, which takes no room, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def save_tensors(tensors: Mapping[str, "torch.Tensor"], path: Path) -> None:
    """Write savable tensors as safetensors; an error of the disk is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # its name for a full disk too
        raise OSError(str(error)) from error


def savable(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
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
