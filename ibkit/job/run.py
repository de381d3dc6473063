"""The main job: personalize, fine-tune by RL, evaluate, report. One command, and the notebooks do the work.

`ibkit run` executes 01_personalize, 02_rl_finetune and 03_evaluate with papermill (`stages` says how often), hands each
the run folders of those before it, and writes the report. 00_start_here is a tour for people that reads and makes
nothing the others need, so it is no part of the job.

The job's folder `outputs/<name>` is a run like any other (`ibkit.runs.Run`), of kind "run": its parameters are the
settings of all notebooks, its outputs the executed notebooks and the report, and the lock and the refusal of other
settings on resuming are those of `Run`. Below it each notebook has a run folder of its own, whose manifest alone says
whether that stage is done.
"""

import datetime
import os
import re
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from ibkit.data.protocols import names
from ibkit.errors import ArtifactError, IbkitError, ParameterError
from ibkit.job.notebook import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    StageFailed,
    execute,
    own_peak_gib,
    sigterm_is_ctrl_c,
    wait_for,
)
from ibkit.job.reuse import free_name, reuse
from ibkit.job.stages import CHAINS, JOB, SHARED, Stage, defaults, given, plan, spell
from ibkit.model.parts import SD_WIDTHS, widths_of
from ibkit.params import schema
from ibkit.progress import duration
from ibkit.runs import MANIFEST, Run, held_by, project_root, read_manifest
from ibkit.runs.files import require_disk
from ibkit.runs.manifest import compared, differing

KIND = "run"
OUTPUTS = project_root() / "outputs"
METAVARS = {
    "class_noun": "WORD", "identifier": "WORD", "subject": "FOLDER", "description": "TEXT", "seed": "N",
    "scorer_weights": "WEIGHTS", "processes": "N", "reward": "SCORER", "subject_reward": "SCORER",
    "lora": "FILE", "n_inference_steps": "N", "guidance": "SCALE", "eta": "ETA",
}  # fmt: skip
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit run`."""
    parser.add_argument("--name", default="", help="of the run; its folder is outputs/NAME (default: date and time)")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with an interrupted or failed run, by default the newest, with the settings it was started with",
    )  # fmt: skip
    parser.add_argument(
        "--no-reuse", action="store_true",
        help="personalize anew, even where a finished run of the same code, settings and photos did it already",
    )  # fmt: skip
    for name, metavar, text in (
        (
            "class-nouns",
            "WORD",
            "several subjects, a run NAME-WORD each; or the classes of --subjects",
        ),
        ("subjects", "FOLDER", "several folders of photos, a run NAME-FOLDER each; then a report of all"),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar=metavar, help=text)
    add_settings(parser)


def add_settings(parser: ArgumentParser) -> None:
    """Add the arguments that say what is run; `given` reads them."""
    helps = {row.name: row.help.replace("%", "%%") for notebook in reversed(JOB) for row in schema(notebook)}
    for name, kind in SHARED.items():
        options: dict[str, Any] = {"type": kind, "metavar": METAVARS.get(name)}
        if kind is list:
            options = {"nargs": "+", "metavar": "ACTIVITY"}
        elif kind is bool:
            options = {"action": BooleanOptionalAction}
        # SUPPRESS: what was not given must be told from what was, to resume with the settings that are stored.
        parser.add_argument(f"--{name.replace('_', '-')}", default=SUPPRESS, help=helps[name], **options)
    for name, metavar, kind, text in (
        ("personalize", "METHOD", str, "how, one or more methods (default: the preset's; see `ibkit methods`)"),
        ("tune", "METHOD", str, "by which feedback, one or more methods, or none (default: ddpo)"),
        ("seeds", "N", int, "one personalization by each method for each of these seeds (default: --seed)"),
        ("tune-seeds", "N", int, "one tuning of each for each of these seeds (default: the personalization's own)"),
    ):
        parser.add_argument(f"--{name}", type=kind, nargs="+", metavar=metavar, default=SUPPRESS, help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.NAME=VALUE",
        help="a setting of a method, such as ddpo.n_epochs=20, guard.patience=5, or reward.NAME=VALUE; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", default=SUPPRESS, metavar="NAME|FILE",
        help="train and evaluate on the prompts that this protocol has for the subject: " + ", ".join(names())
        + "; or your own: a .toml file made like theirs, or a .txt file of prompts, one a line",
    )  # fmt: skip
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NOTEBOOK.PARAMETER=VALUE",
        help="any other parameter of a notebook, such as 03_evaluate.n_images=4; can be given many times",
    )  # fmt: skip


def main(arguments: Namespace) -> int:
    """Run `ibkit run`, for one subject or for each of several.

    Returns:
        0: all done; 1: a notebook failed; 2: it failed for a reason the user can do something about; 130: interrupted.
    """
    launched = _launched()
    if launched is None:
        return 0
    if arguments.class_nouns or arguments.subjects:
        return _several(arguments, launched)
    return _one(arguments, launched)


def _several(arguments: Namespace, launched: dict[str, Any]) -> int:
    """A run NAME-SUBJECT for each subject, one after the other, and a report of all; the worst of their statuses.

    Raises:
        ParameterError: two subjects would share a name, or the numbers of subjects and of class nouns differ.
    """
    nouns, photos = arguments.class_nouns, arguments.subjects
    if hasattr(arguments, "class_noun") or hasattr(arguments, "subject"):
        raise ParameterError(
            "--class-nouns and --subjects name several subjects: leave out --class-noun and --subject."
        )
    if nouns and photos and len(nouns) not in (1, len(photos)):
        raise ParameterError(f"--subjects names {len(photos)} folders and --class-nouns {len(nouns)} words: one each.")
    nouns = nouns * len(photos) if photos and len(nouns) == 1 else nouns
    count = len(photos) or len(nouns)
    named = [Path(folder).expanduser().resolve().name for folder in photos] or nouns
    labels = [re.sub(r"[^A-Za-z0-9._]+", "-", name) for name in named]
    if len(set(labels)) < count:
        raise ParameterError(f"Two subjects have one name: {', '.join(labels)}; rename a folder, or run them apart.")
    stem = arguments.name or f"run-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    jobs = []
    for k, label in enumerate(labels):
        own = Namespace(**vars(arguments) | {"name": f"{stem}-{label}", "class_nouns": [], "subjects": []})
        own.resume = arguments.resume and (_folder(own.name) / MANIFEST).is_file()
        if nouns:
            own.class_noun = nouns[k]
        if photos:
            own.subject = photos[k]
        # All are checked before the first of them starts.
        plan((_stored(_folder(own.name)) if own.resume else defaults()) | launched | given(own), _folder(own.name))
        jobs.append(own)
    status = 0
    done: list[Path] = []
    for own in jobs:
        try:
            ended = _one(own, launched)
        except IbkitError as error:
            print(f"error: {own.name}: {error}", file=sys.stderr)
            ended = EXIT_ERROR
        if ended == EXIT_INTERRUPTED:
            return ended
        status, done = max(status, ended), done + [_folder(own.name)] * (ended == 0)
    if len(done) > 1:
        from ibkit.report import build_report

        (OUTPUTS / "reports").mkdir(parents=True, exist_ok=True)
        print(f"all subjects: open {build_report(done, OUTPUTS / 'reports' / f'{stem}.html')}")
    return status


def _one(arguments: Namespace, launched: dict[str, Any]) -> int:
    """Run the job of one subject."""
    wanted = launched | given(arguments)
    if arguments.resume:
        folder = _folder(arguments.name) if arguments.name else _newest()
        stored = _stored(folder)
        settings = stored | wanted
        _wait_for_orphans(folder)
    else:
        folder = _folder(arguments.name or f"run-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
        settings = defaults() | wanted
    stages = plan(settings, folder, arguments.resume)
    if arguments.resume:
        _require_equal_where_finished(folder, stored, settings, stages)
    from ibkit.job.ready import require_ready  # torch: what is malformed need not wait for it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stages say them
        require_ready(stages)
    model = stages[0].parameters["model"]
    # What is counted is Stable Diffusion's shape; a folder of another one finds out while it trains.
    if not arguments.resume and model != "pocket" and widths_of(model) == SD_WIDTHS:
        settings |= _fitted(settings, folder)
        stages = plan(settings, folder)
    again = f"go on with:  ibkit run --resume --name {folder.name}"
    with sigterm_is_ctrl_c():
        if not arguments.resume:
            free_name(folder)
        try:
            run = Run.open(folder, KIND, settings, resume=arguments.resume, other_values=True)
        except KeyboardInterrupt:
            print("interrupted before anything was run", file=sys.stderr)
            return EXIT_INTERRUPTED
        try:
            print(f"run {spell(folder)}{_stand_in(stages[0].parameters)}", flush=True)
            if not arguments.no_reuse:
                reuse(stages, OUTPUTS)
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


def _stand_in(given: dict[str, Any]) -> str:
    """Words for a job that has no photos, on a model that others would bring their photos to."""
    own = given["model"] == "pocket" or given["subject"]
    return (
        "" if own else f", on renders of the pocket world's {given['class_noun']} (--subject takes a folder of photos)"
    )


def _fitted(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What must be added so that a large model fits on this machine's GPU; nothing on a CPU.

    Raises:
        ArtifactError: the disk has no room for what the job will write.
    """
    from ibkit.device import pick_device
    from ibkit.job.fit import card_gib, chosen, disk_bytes

    card = card_gib(pick_device(settings["01_personalize.device"]))
    added, sentences = chosen(settings, folder, card) if card else ({}, [])
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    for name, value in added.items():
        print(f"to fit on {card:.1f} GiB: {name.removeprefix('set.')} = {value}")
    require_disk(OUTPUTS, int(disk_bytes(plan(settings | added, folder))))
    return added


def _launched() -> dict[str, Any] | None:
    """The settings that `accelerate launch` (or torchrun) asks for; None in all of its processes but the first.

    The first process does the job; where it trains it starts its helpers itself, as many as were launched.

    Raises:
        ParameterError: it launched processes on several machines.
    """
    place = {name: os.environ.pop(name, "") for name in LAUNCHER_VARIABLES}
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # or the kernels would look for torchrun's own server
    try:
        count = int(place["WORLD_SIZE"] or 1)
    except ValueError:
        count = 0
    if count < 1:
        raise ParameterError(f"WORLD_SIZE is {place['WORLD_SIZE']!r} and not a number of processes: unset it.")
    if count == 1:
        return {}
    if not place["RANK"].isdecimal() or int(place["RANK"]) >= count:
        raise ParameterError(
            f"WORLD_SIZE is {count} and RANK is {place['RANK'] or 'not set'}: start by accelerate launch or torchrun, "
            "or unset WORLD_SIZE."
        )
    if place["LOCAL_WORLD_SIZE"] not in ("", str(count)):
        raise ParameterError(
            f"{count} processes were launched on several machines (LOCAL_WORLD_SIZE is {place['LOCAL_WORLD_SIZE']}); "
            "ibkit trains on one: launch them all there."
        )
    return {"02_rl_finetune.processes": count} if int(place["RANK"]) == 0 else None


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


def _require_equal_where_finished(folder: Path, old: dict, new: dict, stages: list[Stage]) -> None:
    """Let a resume change what no finished stage depended on.

    Raises:
        ArtifactError: a finished stage was made with other values.
    """
    differ = differing(compared(old), compared(new))
    finished = {stage.name: manifest for stage in stages if (manifest := _manifest_if_complete(stage.folder))}
    changed = [
        stage.name
        for stage in stages
        if stage.name in finished and compared(finished[stage.name]["parameters"]) != compared(stage.parameters)
    ]
    chains = {name: old.get(name) for name in CHAINS} != {name: new.get(name) for name in CHAINS}
    others = chains and any(_manifest_if_complete(child) for child in folder.glob("*/") if child.name not in finished)
    if differ and (changed or others):
        what = f"{', '.join(changed)} is finished" if changed else "stages of other names are finished"
        raise ArtifactError(
            f"The run in {folder} cannot be resumed with these values, because {what} with others: "
            f"{'; '.join(differ)}; use the old ones, or start a run with another --name."
        )


def _manifest_if_complete(folder: Path) -> dict[str, Any]:
    """The manifest of a complete run; {} of any other."""
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        manifest = read_manifest(folder)
    except ArtifactError:  # damaged: the stage says so
        return {}
    return manifest if manifest["status"] == "complete" else {}


def _wait_for_orphans(folder: Path) -> None:
    """Wait for the kernel of a job that was killed: it ends when it notices, and holds its run folder until then."""
    if held_by(folder):
        return  # the job itself is alive, and opening its run will say so
    for child in sorted(folder.glob("*/")):
        wait_for(child)


def _report(stages: list[Stage], run: Run) -> None:
    """Write the report, and print the claims, what each stage took, and where the report is."""
    from ibkit.evaluate.claims import evaluate_claims
    from ibkit.evaluate.claims.command import claims_as_text
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
    own = own_peak_gib()
    rows.append(("all", sum(row[1] for row in rows), max([own, *(row[2] for row in rows)])))
    width = max(len(name) for name, _, _ in rows) + 3
    lines = [f"{'stage':{width}}{'time':>13}{'peak memory':>15}"]
    lines += [f"{name:{width}}{duration(seconds):>13}{peak:>11.2f} GiB" for name, seconds, peak in rows]
    return "\n".join(lines)
