"""The main job: personalize, fine-tune by RL, evaluate, report. One command, and the notebooks do the work.

`ibkit run` executes 01_personalize, 02_rl_finetune (once for each RL seed) and 03_evaluate with papermill, hands each
the run folders of those before it, and writes the report. 00_start_here is a tour for people that reads and makes
nothing the others need, so it is no part of the job.

The job's folder `outputs/<name>` is a run like any other (`ibkit.runs.Run`), of kind "run": its parameters are the
settings of all notebooks, its outputs the executed notebooks and the report, and the lock and the refusal of other
settings on resuming are those of `Run`. Below it each notebook has a run folder of its own, whose manifest alone says
whether that stage is done.
"""

import contextlib
import datetime
import json
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import time
import uuid
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ibkit import errors
from ibkit.data.protocols import names, read_protocol
from ibkit.errors import ArtifactError, IbkitError, ParameterError
from ibkit.params import SCHEMAS, make, schema
from ibkit.progress import duration
from ibkit.runs import (
    INPUT_PATHS,
    MANIFEST,
    Run,
    compared,
    held_by,
    identify,
    project_root,
    read_manifest,
    read_run,
    resolve,
)

KIND = "run"
NOTEBOOKS = project_root() / "notebooks"
OUTPUTS = project_root() / "outputs"
JOB = ("01_personalize", "02_rl_finetune", "03_evaluate")

# Options of the command line, each for every notebook that has a parameter of that name.
SHARED = {
    "model": str, "revision": str, "subject": str, "class_noun": str, "identifier": str, "description": str,
    "prompts": list, "seed": int, "device": str, "scorer_weights": str, "processes": int,
    "reward": str, "clip_at_level": bool, "subject_reward": str, "clip_subject_at_level": bool, "combine": str,
}  # fmt: skip
METAVARS = {
    "class_noun": "WORD", "identifier": "WORD", "subject": "FOLDER", "description": "TEXT", "seed": "N",
    "scorer_weights": "WEIGHTS", "processes": "N", "reward": "SCORER", "subject_reward": "SCORER",
}  # fmt: skip
# Parameters the job sets itself: where the runs are, and the seed of each RL run.
WIRED = {*(f"{notebook}.{name}" for notebook in JOB for name in ("run_out", "resume"))} | {
    "02_rl_finetune.run_in", "02_rl_finetune.seed", "03_evaluate.run_dreambooth", "03_evaluate.run_rl",
}  # fmt: skip

EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KERNEL_START_S = 300  # importing torch on a busy machine takes its time
ORPHAN_S = 20  # the kernel of a killed job notices within a second, or when its longest C call ends
INDENT = "      "


class StageFailed(Exception):
    """A notebook did not finish.

    Attributes:
        status: exit status, 2 where the user can do something about it (an IbkitError), otherwise 1.
    """

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Stage:
    """One notebook to execute.

    Attributes:
        name: of its run folder, and of the executed notebook beside that.
        notebook: its path; the name without the suffix is the kind of run that it makes.
        title: what it does, in a few words.
        parameters: its parameters, checked; `run_out` says where its run folder is.
    """

    name: str
    notebook: Path
    title: str
    parameters: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return resolve(self.parameters["run_out"])


# ---------------------------------------------------------------------------------------------------- settings


def defaults() -> dict[str, Any]:
    """The settings of a job as "notebook.parameter" -> value, as the notebooks are shipped."""
    rows = {f"{notebook}.{row.name}": row.default for notebook in JOB for row in schema(notebook)}
    return {key: value for key, value in rows.items() if key not in WIRED}


def given(arguments: Namespace) -> dict[str, Any]:
    """The settings that the command line names; `-p` is more specific than an option and wins.

    Raises:
        ParameterError: `-p` is malformed, or names a notebook or a parameter that is not the user's to set; the
            protocol does not exist or has no prompts for the subject.
    """
    known = defaults()
    settings = {}
    for name in SHARED:
        if hasattr(arguments, name):
            value = getattr(arguments, name)
            # A notebook may run in another folder than the one in which the path was typed.
            if (name == "subject" and value) or (
                name in ("model", "scorer_weights") and Path(value).expanduser().is_dir()
            ):
                value = str(Path(value).expanduser().resolve())
            settings |= {key: value for notebook in JOB if (key := f"{notebook}.{name}") in known}
    for text in arguments.parameters:
        key, equals, value = text.partition("=")
        notebook, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ParameterError(f"-p {text!r} is not of the form NOTEBOOK.PARAMETER=VALUE.")
        types = {row.name: row.type for row in schema(notebook)}
        if notebook not in JOB:
            raise ParameterError(f"-p {text!r}: {notebook} is not part of the main job, which is {', '.join(JOB)}.")
        if f"{notebook}.{name}" in WIRED:
            instead = "; use --rl-seeds" if name == "seed" else ""
            raise ParameterError(f"-p {text!r}: the main job sets {name} of {notebook} itself{instead}.")
        settings[f"{notebook}.{name}"] = value if types.get(name, str) is str else _literal(value)
    if hasattr(arguments, "rl_seeds"):
        settings["rl_seeds"] = arguments.rl_seeds
    if hasattr(arguments, "protocol"):
        about = known | settings
        chosen = read_protocol(arguments.protocol, about["01_personalize.class_noun"], about["01_personalize.subject"])
        settings = {
            "02_rl_finetune.prompts": list(chosen.train),
            "03_evaluate.prompts": list(chosen.evaluate),
            "03_evaluate.n_images": chosen.images_per_prompt,
        } | settings
    return settings


def complete(wanted: dict[str, Any]) -> dict[str, Any]:
    """The settings of a new job: those that are wanted, and for the others the notebooks' defaults."""
    settings = defaults() | wanted
    settings.setdefault("rl_seeds", [settings["01_personalize.seed"]])
    return settings


def _literal(text: str) -> Any:
    """A value of the command line as Python or JSON would read it; text that neither reads stays text."""
    for read in (literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError):  # the schema refuses what is not of the right type
            return read(text)
    return text


def plan(settings: dict[str, Any], folder: Path, resume: bool = False) -> list[Stage]:
    """Lay the job out: the notebooks in order, with parameters that are checked before anything runs.

    Args:
        settings: "notebook.parameter" -> value, and "rl_seeds".
        folder: the job's run folder.
        resume: whether the notebooks may go on with runs that are there.

    Raises:
        ParameterError: an unknown parameter (the nearest is named), a value that is not allowed, or a seed twice.
        ArtifactError: a notebook or the subject's folder is not there.
    """
    seeds = settings["rl_seeds"]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ParameterError(f"--rl-seeds must be different numbers, at least one, not {seeds}.")
    values: dict[str, dict[str, Any]] = {notebook: {} for notebook in JOB}
    for key, value in settings.items():
        notebook, dot, name = key.partition(".")
        if dot:
            values[notebook][name] = value
    personalized = folder / "01_personalize"
    tuned = {f"02_rl_finetune-seed{seed}" if len(seeds) > 1 else "02_rl_finetune": seed for seed in seeds}
    wiring = [("01_personalize", "01_personalize", {})]
    wiring += [(name, "02_rl_finetune", {"run_in": _spell(personalized), "seed": seed}) for name, seed in tuned.items()]
    of_runs = {"run_dreambooth": _spell(personalized), "run_rl": [_spell(folder / name) for name in tuned]}
    wiring.append(("03_evaluate", "03_evaluate", of_runs))

    stages = []
    for name, notebook, wired in wiring:
        wired = wired | {"run_out": _spell(folder / name), "resume": resume}
        parameters = asdict(make(notebook, values[notebook] | wired))
        title = SCHEMAS[notebook].__doc__.partition(": ")[2].rstrip(".")
        stages.append(Stage(name, NOTEBOOKS / f"{notebook}.ipynb", title, parameters))
    for stage in stages:
        if not stage.notebook.is_file():
            raise ArtifactError(f"There is no notebook {stage.notebook}; run from a checkout of the whole project.")
    subject = stages[0].parameters["subject"]
    if subject and not resolve(subject).is_dir():
        raise ArtifactError(f"There is no folder of photos {resolve(subject)}; check --subject.")
    return stages


def _spell(path: Path) -> str:
    """A path as parameters hold it: from the checkout where possible, so that a moved checkout can resume."""
    root = project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


# ---------------------------------------------------------------------------------------------------- stages


def execute(stages: list[Stage], run: Run) -> None:
    """Execute notebooks in order; those whose run is complete, unaltered and of the same parameters are skipped.

    Seconds and peak memory of each stage are recorded in the metrics of `run`, and the executed notebooks are put into
    its folder and noted as its outputs.

    Args:
        stages: what to do.
        run: the job's own run, open.

    Raises:
        StageFailed: a notebook raised an error, died, or ended without finishing its run.
    """
    for number, stage in enumerate(stages, 1):
        start = f"[{number}/{len(stages)}] {stage.name}:"
        if is_done(stage):
            print(f"{start} already done", flush=True)
            continue
        print(f"{start} {stage.title}", flush=True)
        before = run.metrics.get("stages", {})
        clock, peaks = time.monotonic(), []
        try:
            _execute_notebook(stage, run.folder, peaks)
        finally:
            seconds = time.monotonic() - clock
            old = before.get(stage.name, {"seconds": 0.0, "peak_gib": 0.0})
            used = {"seconds": old["seconds"] + seconds, "peak_gib": max([old["peak_gib"], *peaks])}
            run.record(stages=before | {stage.name: used})
            if (run.folder / f"{stage.name}.ipynb").is_file():
                run.note_output(f"{stage.name}.ipynb")
        try:
            read_run(stage.folder, stage.notebook.stem)
        except ArtifactError as error:
            raise StageFailed(f"{stage.name} ended without finishing its run: {error}", EXIT_FAILED) from error
        print(f"{start} done in {duration(seconds)}", flush=True)


def is_done(stage: Stage) -> bool:
    """Whether a stage's run is complete, unaltered, and made with the same parameters from the same inputs.

    Where it is not, its notebook is executed, and goes on with what is there or says why it cannot.
    """
    try:
        done = read_run(stage.folder, stage.notebook.stem)
        named = [stage.parameters[name] for name in INPUT_PATHS & stage.parameters.keys()]
        places = [place for one in named for place in (one if isinstance(one, list) else [one]) if place]
        inputs = sorted(identify(resolve(place))["sha256"] for place in places)
    except ArtifactError:  # not there, interrupted, or altered
        return False
    of_old = sorted(entry["sha256"] for entry in done.manifest["inputs"].values())
    return inputs == of_old and compared(done.parameters) == compared(stage.parameters)


def _execute_notebook(stage: Stage, folder: Path, peaks: list[float]) -> None:
    """Run a notebook in a kernel of its own, show what it prints, and keep it executed, to the end or not.

    Args:
        stage: which.
        folder: where the executed notebook is put.
        peaks: takes the peak memory of the kernel in GiB, where it could be measured.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # Papermill's log goes to the terminal. It says that apostrophes in the parameters' comments confuse papermill; that
    # does not matter here (`params` knows the parameters), and repeats what is raised as an exception anyway.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    kept = folder / f"{stage.name}.ipynb"
    growing = folder / f".{stage.name}.running.ipynb"  # papermill writes it over and over while the notebook runs
    lines = _Lines()
    try:
        papermill.execute_notebook(
            stage.notebook,
            growing,
            stage.parameters,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_kernel_manager(peaks),
            extra_arguments=["--log-level=ERROR"],  # it warns on the terminal that a local socket is not encrypted
            progress_bar=False,
            stdout_file=lines,
            start_timeout=KERNEL_START_S,
            iopub_timeout=60,  # the default of 4 s is too short for a machine that swaps or is shared
            cwd=project_root(),
        )
    except PapermillExecutionError as error:
        if _is_ours(error.ename):
            raise StageFailed(f"{stage.name}: {error.evalue}", EXIT_ERROR) from error
        last = next(iter(error.evalue.strip().splitlines()), "")
        raise StageFailed(f"{stage.name}: {error.ename}: {last} (see {kept})", EXIT_FAILED) from error
    except DeadKernelError as error:
        raise StageFailed(
            f"{stage.name}: its process was killed or crashed, most likely for lack of memory (see {kept})", EXIT_FAILED
        ) from error
    finally:
        lines.close()
        if growing.is_file():
            os.replace(growing, kept)


def _is_ours(name: str) -> bool:
    """Whether an exception's name, all that a kernel tells of its class, is that of an error with a sentence for users.

    The module is asked, and not the class for its subclasses: those of others would depend on what was imported.
    """
    kind = getattr(errors, name, None)
    return isinstance(kind, type) and issubclass(kind, IbkitError)


def _kernel_manager(peaks: list[float]) -> type:
    """Kernels that end at once, and whose peak memory goes to `peaks` (GiB).

    A kernel is killed, not asked: what counts is on disk by then, a busy one would not listen, and one that is waited
    for here, and not by Jupyter, tells its own peak. (RUSAGE_CHILDREN would tell that of the greatest so far.)
    It is spoken to through Unix sockets where there are any: Jupyter draws TCP ports before the kernel binds them, and
    one that another program took in between left a kernel that neither started nor ended.
    """
    from jupyter_client import AsyncKernelManager

    class Measured(AsyncKernelManager):
        def __init__(self, **options):
            if os.name == "posix":
                # A socket's path is limited to some 100 characters, and Jupyter's own place is in the home folder.
                place = Path(tempfile.gettempdir(), f"ibkit-{uuid.uuid4().hex[:16]}.json")
                options |= {"transport": "ipc", "connection_file": str(place)}
            super().__init__(**options)

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
            pid = self.provisioner.process.pid
            await self.provisioner.kill()
            with contextlib.suppress(ChildProcessError):  # it died by itself, and Jupyter has waited for it
                _, _, usage = os.wait4(pid, 0)
                peaks.append(_gib(usage.ru_maxrss))
            await super().shutdown_kernel(now=True, restart=restart)

    return Measured


def _gib(maxrss: int) -> float:
    """Peak memory as the system tells it, in KiB (macOS: bytes), in GiB."""
    return maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


class _Lines:
    """What papermill takes for a file: prints what a notebook prints, in whole lines, indented."""

    def __init__(self):
        self._rest = ""

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            # Of a line that overwrites itself only the last state counts.
            print(f"{INDENT}{line.rstrip(chr(13)).rpartition(chr(13))[2]}".rstrip(), flush=True)

    def flush(self) -> None:
        """Nothing: a line is shown when it is whole."""

    def close(self) -> None:
        """Show a last line without an end."""
        if self._rest:
            self.write("\n")


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit run`."""
    parser.add_argument("--name", default="", help="of the run; its folder is outputs/NAME (default: date and time)")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with an interrupted or failed run, by default the newest, with the settings it was started with",
    )  # fmt: skip
    add_settings(parser)


def add_settings(parser: ArgumentParser) -> None:
    """Add the arguments that say what is run; `given` reads them."""
    helps = {row.name: row.help.replace("%", "%%") for notebook in reversed(JOB) for row in schema(notebook)}
    for name, kind in SHARED.items():
        options = {"type": kind, "metavar": METAVARS.get(name)}
        if kind is list:
            options = {"nargs": "+", "metavar": "ACTIVITY"}
        elif kind is bool:
            options = {"action": BooleanOptionalAction}
        # SUPPRESS: what was not given must be told from what was, to resume with the settings that are stored.
        parser.add_argument(f"--{name.replace('_', '-')}", default=SUPPRESS, help=helps[name], **options)
    parser.add_argument(
        "--rl-seeds", type=int, nargs="+", metavar="N", default=SUPPRESS,
        help="one RL run for each of these seeds (default: --seed)",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", default=SUPPRESS, metavar="NAME",
        help="train and evaluate on the prompts that this protocol has for the subject: " + ", ".join(names()),
    )  # fmt: skip
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NOTEBOOK.PARAMETER=VALUE",
        help="any other parameter of a notebook, such as 02_rl_finetune.n_epochs=3; can be given many times",
    )  # fmt: skip


def main(arguments: Namespace) -> int:
    """Run `ibkit run`.

    Returns:
        0: all done; 1: a notebook failed; 2: it failed for a reason the user can do something about; 130: interrupted.
    """
    launched = _launched()
    if launched is None:
        return 0
    wanted = launched | given(arguments)
    if arguments.resume:
        folder = _folder(arguments.name) if arguments.name else _newest()
        settings = _stored(folder) | wanted
        _wait_for_orphans(folder)
    else:
        folder = _folder(arguments.name or f"run-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
        settings = complete(wanted)
    stages = plan(settings, folder, arguments.resume)
    again = f"go on with:  ibkit run --resume --name {folder.name}"
    with _sigterm_is_ctrl_c():
        try:
            run = Run.open(folder, KIND, settings, resume=arguments.resume)
        except KeyboardInterrupt:
            print("interrupted before anything was run", file=sys.stderr)
            return EXIT_INTERRUPTED
        try:
            print(f"run {_spell(folder)}", flush=True)
            execute(stages, run)
            _report(stages, run)
            run.finish()
            return 0
        except (StageFailed, IbkitError) as error:
            run.fail(str(error))
            print(f"error: {error}\n{again}", file=sys.stderr)
            return error.status if isinstance(error, StageFailed) else EXIT_ERROR
        except KeyboardInterrupt:
            run.fail("It was interrupted.")
            print(f"interrupted; {again}", file=sys.stderr)
            return EXIT_INTERRUPTED


def _launched() -> dict[str, Any] | None:
    """The settings that `accelerate launch` (or torchrun) asks for; None in all of its processes but the first.

    The first process does the job; where it trains it starts its helpers itself, as many as were launched.

    Raises:
        ParameterError: it launched processes on several machines.
    """
    place = {name: os.environ.pop(name, "") for name in LAUNCHER_VARIABLES}
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # or the kernels would look for torchrun's own server
    count = int(place["WORLD_SIZE"] or 1)
    if count == 1:
        return {}
    if place["LOCAL_WORLD_SIZE"] and int(place["LOCAL_WORLD_SIZE"]) < count:
        raise ParameterError(f"{count} processes were launched on several machines; ibkit trains on one.")
    return {"02_rl_finetune.processes": count} if place["RANK"] == "0" else None


def _folder(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ParameterError(f"--name {name!r} must be made of letters, digits, '.', '_' and '-'.")
    return OUTPUTS / name


def _newest() -> Path:
    """The folder of the main run that was written to last."""
    manifests = sorted(OUTPUTS.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for manifest in manifests:
        if read_manifest(manifest.parent)["kind"] == KIND:
            return manifest.parent
    raise ArtifactError(f"There is no run in {OUTPUTS} to go on with; start one without --resume.")


def _stored(folder: Path) -> dict[str, Any]:
    """The settings that a run was started with."""
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"There is no run {folder} to go on with; start it without --resume.")
    manifest = read_manifest(folder)
    if manifest["kind"] != KIND:
        raise ArtifactError(f"{folder} is a run of notebook {manifest['kind']}, not of `ibkit run`; check --name.")
    return manifest["parameters"]


def _wait_for_orphans(folder: Path) -> None:
    """Wait for the kernel of a job that was killed: it ends when it notices, and holds its run folder until then."""
    if held_by(folder):
        return  # the job itself is alive, and opening its run will say so
    until = time.monotonic() + ORPHAN_S
    for child in sorted(folder.glob("*/")):
        while holder := held_by(child):
            if time.monotonic() > until:
                raise ArtifactError(f"{child} is in use by process {holder}; wait for it, or end it.")
            time.sleep(0.1)


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(stages: list[Stage], run: Run) -> None:
    """Write the report, and print the claims, what each stage took, and where the report is."""
    from ibkit.evaluate.claims import claims_as_text, evaluate_claims
    from ibkit.report import build_report

    report = build_report(run.folder)
    run.note_output(report.relative_to(run.folder))
    print(f"\n{claims_as_text(evaluate_claims(run.folder))}\n")
    print(_table([stage.name for stage in stages], run.metrics["stages"]))
    print(f"\nopen {report}")


def _table(names: list[str], used: dict[str, dict[str, float]]) -> str:
    """Seconds and peak memory of the stages, over all attempts, and of the whole."""
    # A job killed between the end of a notebook and its own next write knows neither of that notebook.
    rows = [(name, used[name]["seconds"], used[name]["peak_gib"]) for name in names if name in used]
    own = _gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    rows.append(("all", sum(row[1] for row in rows), max([own, *(row[2] for row in rows)])))
    width = max(len(name) for name, _, _ in rows) + 3
    lines = [f"{'stage':{width}}{'time':>13}{'peak memory':>15}"]
    lines += [f"{name:{width}}{duration(seconds):>13}{peak:>11.2f} GiB" for name, seconds, peak in rows]
    return "\n".join(lines)
