"""Folders that one process at a time writes; the system releases the lock when the process ends, however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ibkit.errors import ArtifactError

LOCK, HOLDER = ".lock", ".lock.pid"
GLANCE_S = 0.5  # `held_by` takes the lock for a moment; opening a folder just then must not fail


class FolderLock:
    """A folder held by this process, made where it is not there.

    Raises:
        ArtifactError: another process holds it, or it cannot be used.
    """

    def __init__(self, folder: Path):
        self._lock, self._holder = _lock_of(folder), folder / HOLDER
        try:
            with _usable(folder, "as a run folder"):
                self._lock.acquire(timeout=GLANCE_S, poll_interval=0.01)
                self._holder.write_text(str(os.getpid()))
        except Timeout:
            raise ArtifactError(
                f"{folder} is in use by process {_holder(folder)}; wait for it, or choose another run folder."
            ) from None

    def release(self) -> None:
        """Let go of the folder."""
        self._holder.unlink(missing_ok=True)
        self._lock.release()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process is in the folder; it waits for one that is.

    Raises:
        ArtifactError: the folder cannot be used.
    """
    with _usable(folder, "for a cache"):
        lock = _lock_of(folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def held_by(folder: Path) -> str:
    """Process id of the live process that holds a folder, or ''."""
    if not (folder / LOCK).is_file():
        return ""
    try:
        with _lock_of(folder).acquire(timeout=0):
            return ""
    except Timeout:
        return _holder(folder)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / HOLDER).read_text() or "(unknown)"
    return "(unknown)"


@contextlib.contextmanager
def _usable(folder: Path, what: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Timeout:  # an OSError too
        raise
    except OSError as error:
        raise ArtifactError(f"Cannot use {folder} {what}: {error.strerror or error}; choose another.") from error
