"""`ibkit stage`: one notebook into one folder, what a grid of runs or a workflow manager calls.

Called again it does nothing where the run is complete and of the same parameters, goes on with one that was
interrupted, and refuses other parameters.
"""

import argparse
import sys
from pathlib import Path

from ibkit.errors import ParameterError
from ibkit.job.notebook import EXIT_INTERRUPTED, StageFailed, complete
from ibkit.job.stages import TABLES, assignment, make_stage
from ibkit.params import SCHEMAS, literal, schema
from ibkit.progress import duration

SET_BY_OPTIONS = {"run_out": "--out", "resume": "", "settings": "--set"}
SET_BY_OPTIONS |= {table: f"--set {name}.NAME=VALUE" for name, table in TABLES.items()}


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


def main(arguments: argparse.Namespace) -> int:
    """Run `ibkit stage`; the exit status is that of `ibkit run`."""
    folder = Path(arguments.out).expanduser().resolve()
    values = {**given(arguments), "run_out": str(folder), "resume": True}
    stage = make_stage(folder.name, arguments.notebook, values)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        seconds = complete(stage, folder.parent)
    except StageFailed as error:
        print(f"error: {error}\ngo on with the same command", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("interrupted; go on with the same command", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{folder}: {f'done in {duration(seconds)}' if seconds else 'already done'}")
    return 0


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
