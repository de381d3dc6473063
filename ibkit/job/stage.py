"""`ibkit stage`: one notebook into one folder, what a grid of runs or a workflow manager calls.

Called again it does nothing where the run is complete and of the same parameters, goes on with one that was
interrupted, and refuses other parameters.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ibkit.errors import ArtifactError, ParameterError
from ibkit.job.notebook import EXIT_INTERRUPTED, StageFailed, complete, sigterm_is_ctrl_c, wait_for
from ibkit.job.stages import TABLES, assignment, make_stage
from ibkit.params import SCHEMAS, literal, schema
from ibkit.progress import duration
from ibkit.runs import MANIFEST, resolve, write_atomically
from ibkit.runs.locks import FolderLock, held_by

SET_BY_OPTIONS = {"run_out": "--out", "resume": "", "settings": "--set"}
SET_BY_OPTIONS |= {table: f"--set {name}.NAME=VALUE" for name, table in TABLES.items()}
LOOK_S = 0.5  # between looks at whether a parent is alive, or a GPU free


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit stage`."""
    parser.add_argument("notebook", metavar="NOTEBOOK", help=", ".join(SCHEMAS))
    parser.add_argument("--out", required=True, metavar="FOLDER", help="of the run; the notebook is kept beside it")
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="PARAMETER=VALUE",
        help="a parameter of the notebook, such as class_noun=dog; can be given many times",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of its method, such as n_steps=400, guard.patience=5, or reward.NAME=VALUE; repeatable",
    )  # fmt: skip
    grid = parser.add_argument_group("of a grid's workflow")
    grid.add_argument("--manifest", default="", metavar="FILE", help="put the finished run's manifest there, too")
    grid.add_argument("--gpus", default="", metavar="I,J", help="run on one of these, the first that no stage is on")
    grid.add_argument("--with-parent", action="store_true", help="end when the process that started this one has ended")


def main(arguments: argparse.Namespace) -> int:
    """Run `ibkit stage`; the exit status is that of `ibkit run`."""
    folder = Path(arguments.out).expanduser().resolve()
    values = {**given(arguments), "run_out": str(folder), "resume": True}
    stage = make_stage(folder.name, arguments.notebook, values)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if arguments.with_parent:
        end_with_parent()
    try:
        with sigterm_is_ctrl_c(), one_of(arguments.gpus.split(",") if arguments.gpus else []):
            wait_for(folder)
            seconds = complete(stage, folder.parent)
    except StageFailed as error:
        print(f"error: {error}\ngo on with the same command", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("interrupted; go on with the same command", file=sys.stderr)
        return EXIT_INTERRUPTED
    if arguments.manifest:
        publish(folder, Path(arguments.manifest))
    print(f"{folder}: {f'done in {duration(seconds)}' if seconds else 'already done'}")
    return 0


def publish(folder: Path, target: Path) -> None:
    """Copy a finished run's manifest to where a workflow looks for it."""
    data = (folder / MANIFEST).read_bytes()
    write_atomically(target.absolute(), len(data), lambda temporary: temporary.write_bytes(data))


def end_with_parent(group: bool = False) -> None:
    """From now on, take the end of the process that started this one for Ctrl-C: no orphan works on.

    Args:
        group: whether all processes of this one's group are told.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script starts in the background ignores it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        if group:
            os.killpg(os.getpgrp(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def one_of(gpus: Sequence[str]) -> Iterator[None]:
    """Inside, this process and those that it starts see one GPU that no other stage is on; it waits for one.

    Args:
        gpus: their numbers or names, as CUDA_VISIBLE_DEVICES takes them; none = whatever there is.

    The lock of a GPU is a file below outputs/, held by the process: one that dies gives it back.
    """
    if not gpus:
        yield
        return
    while True:
        for gpu in gpus:
            place = resolve("outputs/.gpus") / gpu
            if held_by(place):
                continue
            with contextlib.suppress(ArtifactError):  # another stage was faster
                lock = FolderLock(place)
                break
        else:
            time.sleep(LOOK_S)
            continue
        break
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        lock.release()


def given(arguments: argparse.Namespace) -> dict:
    """The parameters that the command line names.

    Raises:
        ParameterError: an assignment of another form, or a parameter that has an option of its own.
    """
    types = {row.name: row.type for row in schema(arguments.notebook)}
    values: dict = {}
    for text in arguments.parameters:
        (name,), value = assignment(text, "-p", "PARAMETER=VALUE")
        if name in SET_BY_OPTIONS:
            advice = f": use {SET_BY_OPTIONS[name]}" if SET_BY_OPTIONS[name] else ", always on"
            raise ParameterError(f"-p {text!r}: {name} is set by the command{advice}.")
        values[name] = value if types.get(name, str) is str else literal(value)
    for text in arguments.set:
        (name,), value = assignment(text, "--set", "NAME=VALUE")
        whose, dot, rest = name.partition(".")
        table, name = (TABLES[whose], rest) if dot and whose in TABLES else ("settings", name)
        values.setdefault(table, {})[name] = literal(value)
    return values
