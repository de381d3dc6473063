"""The stages of a job: which notebooks with which parameters, all checked before the first of them runs.

A job is every chain of a method that personalizes and one that tunes: for each seed of the first and each of the
second a run of 02_rl_finetune, on top of its run of 01_personalize; and one evaluation of them all.
"""

from argparse import Namespace
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ibkit.data.protocols import read_protocol
from ibkit.errors import ArtifactError, ParameterError
from ibkit.params import SCHEMAS, literal, make, schema
from ibkit.runs import project_root, resolve

NOTEBOOKS = project_root() / "notebooks"
JOB = ("01_personalize", "02_rl_finetune", "03_evaluate")

# Options of the command line, each for every notebook that has a parameter of that name.
SHARED = {
    "model": str, "revision": str, "subject": str, "class_noun": str, "identifier": str, "description": str,
    "prompts": list, "seed": int, "device": str, "scorer_weights": str, "processes": int,
    "lora": str, "n_inference_steps": int, "guidance": float, "eta": float,
    "reward": str, "clip_at_level": bool, "subject_reward": str, "clip_subject_at_level": bool,
}  # fmt: skip
# Parameters that the job sets itself, and the option to use instead.
WIRED = {f"{notebook}.{name}": "" for notebook in JOB for name in ("run_out", "resume")} | {
    "01_personalize.seed": "--seeds", "01_personalize.method": "--personalize", "01_personalize.settings": "--set",
    "02_rl_finetune.seed": "--tune-seeds", "02_rl_finetune.method": "--tune", "02_rl_finetune.settings": "--set",
    "02_rl_finetune.run_in": "", "03_evaluate.runs": "",
}  # fmt: skip
# What --set names beside methods, each a table among the parameters of 02_rl_finetune.
TABLES = {"guard": "guard", "reward": "reward_options", "subject_reward": "subject_reward_options"}
WIRED |= {f"02_rl_finetune.{table}": f"--set {name}.NAME=VALUE" for name, table in TABLES.items()}
CHAINS = ("personalize", "tune", "seeds", "tune_seeds")  # settings that say which runs there are
NONE = "none"  # of --tune


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


def make_stage(name: str, notebook: str, values: dict[str, Any]) -> Stage:
    """A stage of a notebook, with parameters that are checked.

    Raises:
        ParameterError: no such notebook or parameter (the nearest is named), or a value that is not allowed.
        ArtifactError: the notebook is not there.
    """
    parameters = asdict(make(notebook, values))
    path = NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        raise ArtifactError(f"There is no notebook {path}; run from a checkout of the whole project.")
    return Stage(name, path, str(SCHEMAS[notebook].__doc__).partition(": ")[2].rstrip("."), parameters)


def defaults() -> dict[str, Any]:
    """The settings of a job, as the notebooks are shipped: "notebook.parameter" -> value, and the chains."""
    rows = {f"{notebook}.{row.name}": row.default for notebook in JOB for row in schema(notebook)}
    chains = {"personalize": [], "tune": [rows["02_rl_finetune.method"]]}
    chains |= {"seeds": [rows["01_personalize.seed"]], "tune_seeds": []}
    return {key: value for key, value in rows.items() if key not in WIRED} | chains


def given(arguments: Namespace) -> dict[str, Any]:
    """The settings that the command line names; `-p` is more specific than an option and wins.

    Raises:
        ParameterError: `-p` or `--set` is malformed, or names what is not the user's to set; the protocol does not
            exist or has no prompts for the subject.
    """
    known = defaults()
    settings: dict[str, Any] = {}
    for name in SHARED:
        if hasattr(arguments, name):
            value = getattr(arguments, name)
            # A notebook may run in another folder than the one in which the path was typed.
            if (name in ("subject", "lora") and value) or (
                name in ("model", "scorer_weights") and Path(value).expanduser().exists()
            ):
                value = str(Path(value).expanduser().resolve())
            settings |= {key: value for notebook in JOB if (key := f"{notebook}.{name}") in known}
    if hasattr(arguments, "seed"):
        settings["seeds"] = [arguments.seed]
    settings |= {name: getattr(arguments, name) for name in CHAINS if hasattr(arguments, name)}
    for text in arguments.parameters:
        (notebook, name), value = assignment(text, "-p", "NOTEBOOK.PARAMETER=VALUE")
        types = {row.name: row.type for row in schema(notebook)}
        if notebook not in JOB:
            raise ParameterError(f"-p {text!r}: {notebook} is not part of the main job, which is {', '.join(JOB)}.")
        if (instead := WIRED.get(f"{notebook}.{name}")) is not None:
            advice = f"; use {instead}" if instead else ""
            raise ParameterError(f"-p {text!r}: the main job sets {name} of {notebook} itself{advice}.")
        settings[f"{notebook}.{name}"] = value if types.get(name, str) is str else literal(value)
    for text in arguments.set:
        (method, name), value = assignment(text, "--set", "METHOD.NAME=VALUE")
        settings[f"set.{method}.{name}"] = literal(value)
    if hasattr(arguments, "protocol"):
        about = known | settings
        noun = about["01_personalize.class_noun"] or "cat" * (not about["01_personalize.subject"])
        chosen = read_protocol(arguments.protocol, noun, about["01_personalize.subject"])
        settings = {
            "01_personalize.class_noun": chosen.class_noun,
            "02_rl_finetune.prompts": list(chosen.train),
            "03_evaluate.prompts": list(chosen.evaluate),
            "03_evaluate.n_images": chosen.images_per_prompt,
        } | settings
    return settings


def assignment(text: str, option: str, form: str) -> tuple[list[str], str]:
    """The names and the value of "a=value", or of "a.b=value" where `form` has a dot; b may have dots.

    Raises:
        ParameterError: it has another form.
    """
    key, equals, value = text.partition("=")
    names = key.strip().split(".", form.count("."))
    if not equals or not all(names) or len(names) <= form.count("."):
        raise ParameterError(f"{option} {text!r} is not of the form {form}.")
    return names, value


def plan(settings: dict[str, Any], folder: Path, resume: bool = False) -> list[Stage]:
    """Lay the job out: the notebooks in order, with parameters that are checked before anything runs.

    Args:
        settings: those of `defaults` and `given`, complete.
        folder: the job's run folder.
        resume: whether the notebooks may go on with runs that are there.

    Raises:
        ParameterError: an unknown parameter, method or setting (the nearest is named), a value that is not allowed, or
            something twice.
        ArtifactError: a notebook or the subject's folder is not there.
    """
    from ibkit.presets import preset_of  # torch: `--help` need not wait for it

    values: dict[str, dict[str, Any]] = {notebook: {} for notebook in JOB}
    sets: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        whose, dot, name = key.partition(".")
        if whose == "set":
            method, _, name = name.partition(".")
            sets.setdefault(method, {})[name] = value
        elif dot:
            values[whose][name] = value
    personalize, tune, seeds, tune_seeds = (settings[name] for name in CHAINS)
    personalize = personalize or [preset_of(values["01_personalize"]["model"]).personalize]
    tune = [] if tune == [NONE] else tune
    for name in CHAINS:
        if len(set(settings[name])) < len(settings[name]):
            raise ParameterError(f"--{name.replace('_', '-')} names something twice: {settings[name]}.")
    if others := sets.keys() - {*personalize, *tune, *TABLES}:
        raise ParameterError(
            f"--set names {', '.join(sorted(others))}, and this run has {', '.join([*personalize, *tune])}: choose "
            "methods by --personalize and --tune."
        )

    def stage(name: str, notebook: str, wired: dict[str, Any]) -> Stage:
        place = {"run_out": spell(folder / name), "resume": resume}
        return make_stage(name, notebook, values[notebook] | wired | place)

    stages = []
    for method, seed in product(personalize, seeds):
        chain = f"-{method}" * (len(personalize) > 1) + f"-seed{seed}" * (len(seeds) > 1)
        own = {"method": method, "seed": seed, "settings": sets.get(method, {})}
        first = stage(f"01_personalize{chain}", "01_personalize", own)
        stages.append(first)
        for tuning, tune_seed in product(tune, tune_seeds or [seed]):
            name = chain + f"-{tuning}" * (len(tune) > 1) + f"-tune{tune_seed}" * (len(tune_seeds) > 1)
            own = {"method": tuning, "seed": tune_seed, "settings": sets.get(tuning, {})}
            own |= {table: sets.get(name, {}) for name, table in TABLES.items()} | {"run_in": spell(first.folder)}
            stages.append(stage(f"02_rl_finetune{name}", "02_rl_finetune", own))
    stages.append(stage("03_evaluate", "03_evaluate", {"runs": [spell(s.folder) for s in stages]}))
    subject = stages[0].parameters["subject"]
    if subject and not resolve(subject).is_dir():
        raise ArtifactError(f"There is no folder of photos {resolve(subject)}; check --subject.")
    lora = stages[0].parameters["lora"]
    if lora and not resolve(lora).is_file():
        raise ArtifactError(f"There is no file {resolve(lora)}; check --lora.")
    return stages


def spell(path: Path) -> str:
    """A path as parameters hold it: from the checkout where possible, so that a moved checkout can resume."""
    root = project_root()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
