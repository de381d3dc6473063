"""Execute notebooks as stages, each in a kernel of its own, and keep them executed."""

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ibkit import errors
from ibkit.errors import ArtifactError, IbkitError
from ibkit.job.stages import Stage
from ibkit.progress import SESSION, duration
from ibkit.runs import MANIFEST, Run, compared, held_by, identify, project_root, read_manifest, read_run, resolve
from ibkit.runs.manifest import INPUT_PATHS, NEWEST, differing, local_model
from ibkit.runs.notebooks import set_aside

EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
KERNEL_START_S = 300  # importing torch on a busy machine takes its time
INDENT = "      "
PACKAGE = Path(errors.__file__).parent
ORPHAN_S = 20  # the kernel of a killed job notices within a second, or when its longest C call ends
SET_ASIDE = "set-aside"  # folder of a job for runs of its stages that it does not go on with


class StageFailed(Exception):
    """A notebook did not finish.

    Attributes:
        status: exit status, 2 where the user can do something about it (an IbkitError), otherwise 1.
    """

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


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
        before = run.metrics.get("stages", {})

        def note(seconds: float, gib: float, stage: Stage = stage, before: dict = before) -> None:
            old = before.get(stage.name, {"seconds": 0.0, "peak_gib": 0.0})
            used = {"seconds": old["seconds"] + seconds, "peak_gib": max(old["peak_gib"], gib)}
            run.record(stages=before | {stage.name: used})
            if (run.folder / f"{stage.name}.ipynb").is_file():
                run.note_output(f"{stage.name}.ipynb")

        seconds = complete(stage, run.folder, start, note)
        print(f"{start} {f'done in {duration(seconds)}' if seconds else 'already done'}", flush=True)


def complete(
    stage: Stage, folder: Path, start: str = "", note: Callable[[float, float], None] = lambda seconds, gib: None
) -> float:
    """Execute a notebook unless its run is complete, unaltered and of the same parameters.

    Args:
        folder: where the executed notebook is put.
        start: of the line that says what is done.
        note: called with the seconds and the peak memory in GiB, to the end or not.

    Returns:
        Seconds; 0 where nothing was to be done.

    Raises:
        StageFailed: the notebook raised an error, died, or ended without finishing its run.
    """
    if is_done(stage):
        return 0.0
    make_room(stage)
    print(f"{start} {stage.title}".strip(), flush=True)
    clock, peaks = time.monotonic(), [0.0]
    try:
        execute_notebook(stage, folder, peaks)
    finally:
        note(time.monotonic() - clock, max(peaks))
    try:
        read_run(stage.folder, stage.notebook.stem)
    except ArtifactError as error:
        raise StageFailed(f"{stage.name} ended without finishing its run: {error}", EXIT_FAILED) from error
    return time.monotonic() - clock


def is_done(stage: Stage) -> bool:
    """Whether a stage's run is complete, unaltered, and made with the same parameters from the same inputs; of those
    that the parameters leave open (`run_in=""`: the newest), whatever it took.

    Where it is not, its notebook is executed, and goes on with what is there or says why it cannot.
    """
    try:
        done = read_run(stage.folder, stage.notebook.stem)
        places = [*_places(stage, INPUT_PATHS), *local_model(stage.parameters).values()]
        inputs = Counter(identify(place)["sha256"] for place in places)
    except ArtifactError:  # not there, interrupted, or altered
        return False
    of_old = Counter(entry["sha256"] for entry in done.manifest["inputs"].values())
    left_open = any(stage.parameters.get(name, "given") in ("", []) for name in NEWEST)
    same = inputs <= of_old if left_open else inputs == of_old
    return same and compared(done.parameters) == compared(stage.parameters)


def make_room(stage: Stage) -> None:
    """Set a run aside that its stage cannot go on with: one that is unfinished and of other values, or that was made
    from runs that were made anew since.

    A finished run of other values stays; its notebook refuses to go on with it.
    """
    if not (stage.folder / MANIFEST).is_file() or not stage.parameters["resume"]:
        return
    old = read_manifest(stage.folder)
    differ = differing(compared(old["parameters"]), compared(stage.parameters))
    used = {entry["sha256"] for entry in old["inputs"].values()}
    runs = [run for name in ("run_in", "runs") for run in _places(stage, {name})]
    why = "; ".join(differ) if old["status"] != "complete" else ""
    if not why and any(identify(run)["sha256"] not in used for run in runs):
        why = "what it was made from was made anew"
    if why:
        aside = set_aside(stage.folder, stage.folder.parent / SET_ASIDE)
        print(f"{stage.name} begins anew ({why}); what was there is now {SET_ASIDE}/{aside.name}", flush=True)


def wait_for(folder: Path) -> None:
    """Wait a while for a process that is still in a run folder, such as the kernel of a job that was killed.

    Raises:
        ArtifactError: it is there to stay.
    """
    until = time.monotonic() + ORPHAN_S
    while holder := held_by(folder):
        if time.monotonic() > until:
            raise ArtifactError(f"{folder} is in use by process {holder}; wait for it, or end it.")
        time.sleep(0.1)


@contextlib.contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM ends this process as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _places(stage: Stage, names: Iterable[str]) -> list[Path]:
    """The inputs of a stage that its parameters of these names give."""
    given = [stage.parameters[name] for name in names if name in stage.parameters]
    return [resolve(place) for one in given for place in (one if isinstance(one, list) else [one]) if place]


def execute_notebook(stage: Stage, folder: Path, peaks: list[float]) -> None:
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
    # asyncio's tells, with a traceback, of the cell whose kernel an interrupted job killed.
    for name in ("papermill", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    kept = folder / f"{stage.name}.ipynb"
    growing = folder / f".{stage.name}.running.ipynb"  # papermill writes it over and over while the notebook runs
    lines = _Lines()
    os.environ.pop(SESSION, None)  # where a notebook's cell started this job: the kernel below is not the one looked at
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
            stderr_file=_Warnings(lines),
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
    from jupyter_client.provisioning import LocalProvisioner

    class Measured(AsyncKernelManager):
        def __init__(self, **options):
            if os.name == "posix":
                # A socket's path is limited to some 100 characters, and Jupyter's own place is in the home folder.
                place = Path(tempfile.gettempdir(), f"ibkit-{uuid.uuid4().hex[:16]}.json")
                options |= {"transport": "ipc", "connection_file": str(place)}
            super().__init__(**options)

        # The parent's type is that of the blocking manager, which wraps these.
        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
            assert isinstance(self.provisioner, LocalProvisioner) and self.provisioner.pid
            pid = self.provisioner.pid
            await self.provisioner.kill()
            with contextlib.suppress(ChildProcessError, AttributeError):  # Jupyter has waited for it; no wait4 here
                _, _, usage = os.wait4(pid, 0)
                peaks.append(gib(usage.ru_maxrss))
            await super().shutdown_kernel(now=True, restart=restart)

    return Measured


def own_peak_gib() -> float:
    """Peak memory of this process in GiB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    return gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def gib(maxrss: int) -> float:
    """Peak memory as the system tells it, in KiB (macOS: bytes), in GiB."""
    return maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


class _Warnings:
    """What papermill takes for a notebook's stderr: of all that libraries write there, the kit's warnings are printed.

    A warning is "path:line: Category: message", and the kit's are raised in a cell or in the package.
    """

    FORM = re.compile(r"(?P<path>.+?):\d+: (?:User|Photo)Warning: (?P<message>.+)")

    def __init__(self, lines: "_Lines"):
        self._lines, self._rest = lines, ""

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for found in filter(None, map(self.FORM.fullmatch, lines)):
            if "ipykernel_" in found["path"] or Path(found["path"]).is_relative_to(PACKAGE):
                self._lines.write(f"warning: {found['message']}\n")

    def flush(self) -> None:
        """Nothing: a warning is shown when its line is whole."""


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
