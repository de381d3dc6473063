"""Files that several runs share: a folder named by the hash of all that makes them, filled once, verified when read."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ibkit.runs.files import TEMPORARY_SUFFIX, read_json, write_atomically
from ibkit.runs.locks import alone_in

INDEX = "index.json"  # file name -> SHA-256 of its bytes


def cached(
    folder: Path,
    batches: Sequence[Sequence[str]],
    make: Callable[[int], Sequence[bytes]],
    on_file: Callable[[int], None] | None = None,
) -> list[bytes]:
    """The bytes of all files of a cache, in order; a second process waits for the first.

    A batch of which a file is missing, damaged or not the one written is made again as a whole, so a repaired cache
    equals a new one even where arithmetic depends on the size of a batch.

    Args:
        folder: named by whoever calls, by the hash of all that makes the files.
        batches: names of the files that are made together.
        make: number of the batch -> the bytes of its files.
        on_file: called after each batch that was made, with the number of files there are up to it.

    Raises:
        ArtifactError: the folder cannot be used, or a file not written.
    """
    files: list[bytes] = []
    with alone_in(folder):
        for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        index = _read_index(folder)
        for number, names in enumerate(batches):
            kept = [_read_unaltered(folder / name, index) for name in names]
            found = [data for data in kept if data is not None]
            if len(found) < len(kept):
                found = list(make(number))
                for name, data in zip(names, found, strict=True):
                    _write(folder / name, data)
                    index[name] = hashlib.sha256(data).hexdigest()
                _write(folder / INDEX, json.dumps(index, indent=1).encode())
                if on_file:
                    on_file(len(files) + len(names))
            files += found
    return files


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))


def _read_index(folder: Path) -> dict[str, str]:
    """The hashes noted; none where the index is missing or unreadable, so that everything is made again."""
    try:
        index = read_json(folder / INDEX)
    except (FileNotFoundError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _read_unaltered(path: Path, index: dict[str, str]) -> bytes | None:
    """A file's bytes, or None unless they are those noted."""
    data = path.read_bytes() if path.is_file() else b""
    return data if hashlib.sha256(data).hexdigest() == index.get(path.name) else None
