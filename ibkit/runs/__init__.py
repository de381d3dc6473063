"""Run folders: what a notebook wrote, proved complete and unaltered before anybody reads it."""

from ibkit.runs.cache import cached
from ibkit.runs.checkpoints import CHECKPOINTS, Checkpoints
from ibkit.runs.files import (
    hash_file,
    hash_json,
    hash_tree,
    parse_json,
    project_root,
    read_json,
    resolve,
    write_atomically,
)
from ibkit.runs.locks import alone_in, held_by
from ibkit.runs.manifest import (
    MANIFEST,
    TEXT_COLUMNS,
    CompletedRun,
    compared,
    identify,
    input_of,
    read_manifest,
    read_run,
)
from ibkit.runs.notebooks import GRID, input_run, newest_run, notebook_runs, open_run
from ibkit.runs.writing import Run

__all__ = [
    "CHECKPOINTS", "GRID", "MANIFEST", "TEXT_COLUMNS", "Checkpoints", "CompletedRun", "Run", "alone_in", "cached",
    "compared", "hash_file", "hash_json", "hash_tree", "held_by", "identify", "input_of", "input_run", "newest_run",
    "notebook_runs", "open_run", "parse_json", "project_root", "read_json", "read_manifest", "read_run", "resolve",
    "write_atomically",
]  # fmt: skip
