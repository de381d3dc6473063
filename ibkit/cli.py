"""The `ibkit` command: its subcommands, their errors, and the kernel that notebooks run on.

A subcommand is a module with `add_arguments(parser)` and `main(arguments) -> int`, and one line in `COMMANDS`. Only the
module of the subcommand that was asked for is imported, so that `ibkit --help` answers at once.
"""

import argparse
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ibkit import __version__
from ibkit.errors import IbkitError

COMMANDS = {  # name: (module, what it does)
    "run": ("ibkit.job.run", "personalize, fine-tune by RL, evaluate, and write the report"),
    "stage": ("ibkit.job.stage", "execute one notebook into one folder, or go on with it"),
    "grid": ("ibkit.job.grid", "run subjects × methods × seeds from one file, here or on a cluster, and report"),
    "plan": ("ibkit.job.plan", "predict the time and memory that `ibkit run` will take on this machine"),
    "methods": ("ibkit.job.methods", "the methods there are, and the settings of one with their sources"),
    "list": ("ibkit.job.listing", "the runs there are: status, methods, when, how long"),
    "report": ("ibkit.report.command", "one page for one finished run or for many: subjects, seeds, methods"),
    "export": ("ibkit.job.export", "a model as a folder that diffusers loads, or figures and LaTeX tables for a paper"),
    "claims": ("ibkit.evaluate.claims.command", "read the papers' claims against a finished run"),
    "tables": ("ibkit.evaluate.tables", "the results of one or more runs as tables, in CSV, Markdown and LaTeX"),
    "study": ("ibkit.evaluate.study.command", "a rating page for people without Jupyter, as one file"),
    "data": ("ibkit.data.dreambench", "how to get a published set of subjects and prompts, and whether it is whole"),
    "check": ("ibkit.job.check", "look at this machine: what can run here, and what to do about what cannot"),
}
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141
REFUSED_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EROFS)  # by the system, as they were typed
PATHLIB_REFUSES = ("Symlink loop from", "Could not determine home directory")  # as a RuntimeError
SHOWN_PATH = 80  # characters of one in a sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ibkit` with the arguments of the command line (or `argv`).

    Returns:
        The exit status: the subcommand's own, 2 for an error the user can do something about, 130 after Ctrl-C, 141
        when the reader of its output went away.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _prepare_output()
    try:
        arguments = _parse(argv)
        use_own_kernel()
        status = arguments.main(arguments)
        sys.stdout.flush()  # a closed pipe shows here, and not while Python shuts down
        return status
    except OSError as error:
        if error.errno in REFUSED_PATHS and error.filename:
            name = str(error.filename)
            shown = name if len(name) <= SHOWN_PATH else f"{name[:SHOWN_PATH]}..."
            print(f"error: {shown!r} cannot be used ({error.strerror}): name another path.", file=sys.stderr)
            return EXIT_ERROR
        if not isinstance(error, BrokenPipeError) and error.errno in (errno.ENOSPC, errno.EIO) and not error.filename:
            _silence_stdout()
            print(f"error: the output cannot be written ({error.strerror}): write it elsewhere.", file=sys.stderr)
            return EXIT_ERROR
        if not isinstance(error, BrokenPipeError):
            raise
        # the reader, such as `head`, has seen enough
        _silence_stdout()
        return EXIT_PIPE
    except IbkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:
        if not str(error).startswith(PATHLIB_REFUSES):
            raise
        home = "a path begins with ~ and the name of no user here: write it in full"
        print(f"error: {home if 'home' in str(error) else f'{error}: name another path'}.", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _prepare_output() -> None:
    """Print everywhere: what an encoding such as ASCII lacks as an escape, and nothing where an output is closed."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of our code
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """Let what is still to be flushed go nowhere, or Python would fail once more while it shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def use_own_kernel() -> None:
    """Make every kernel this process starts under the name `python3` run on this very Python.

    The kit registers no kernel. ipykernel, which is installed beside it, put a kernel `python3` into the environment's
    share/jupyter, whose command is a bare `python`; Jupyter replaces that by `sys.executable`. But Jupyter may look in
    the user's home first (it does in a .venv owned by somebody else, and outside of one), where another `python3` may
    name another Python. `JUPYTER_PATH` stands before all other places, and this environment is put first in it.
    """
    own = str(Path(sys.prefix) / "share" / "jupyter")
    others = [path for path in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if path and path != own]
    os.environ["JUPYTER_PATH"] = os.pathsep.join([own, *others])


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ibkit", description="Personalized text-to-image models that follow instructions.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ibkit {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, help) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name == wanted:
            command = importlib.import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(main=command.main)
    return parser.parse_args(argv)
