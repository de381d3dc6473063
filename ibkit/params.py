"""Typed notebook parameters: what each notebook takes, what is allowed, and a refusal of everything else.

A notebook's parameters cell holds flat literals, which papermill replaces. papermill only warns about a name that it
does not know, and reads `1e-4` as text, so the cell after it calls `collect`. Types are plain (`int`, `float`, `str`,
`bool`, `list` of texts or of whole numbers), because that is what papermill's reader of the cell understands. The
values 0, 0.0, "" and [] stand for "the preset's own value" where the help says so, and -1 where 0 is a value of its
own; the presets are looked up later, by the notebook.
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ibkit.errors import ParameterError

LITERALS = (int, float, str, bool, list, dict, type(None))
IPYTHON_NAMES = {"In", "Out", "exit", "quit"}


def param(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """Declare one parameter of a notebook as a dataclass field.

    Args:
        default: its value in the notebook as shipped; its type is the parameter's type.
        help: one line for people.
        low: smallest number allowed, inclusive; a default below it, -1 for the preset's own, is allowed too.
        high: largest number allowed, inclusive.
        choices: the texts allowed; empty when any is.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every notebook takes."""

    model: str = param("pocket", "preset (pocket, sd15), or a local folder in diffusers format")
    revision: str = param("", "revision of a model on the hub; empty = the preset's")
    device: str = param("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = param(0, "every random stream of the notebook is derived from it", low=0, high=2**31 - 1)
    run_out: str = param("", "folder of this notebook's run; empty = outputs/notebook-<its name>")
    resume: bool = param(False, "go on with an interrupted run in that folder")


@dataclass(frozen=True, kw_only=True)
class StartHere(Common):
    """00_start_here: the tour."""


@dataclass(frozen=True, kw_only=True)
class Measured(Common):
    """What every notebook takes that scores pictures."""

    scorer_weights: str = param("", "weights of the scorers: pocket, official, or a local folder; empty = the preset's")


@dataclass(frozen=True, kw_only=True)
class Personalize(Measured):
    """01_personalize: DreamBooth on a few photos."""

    subject: str = param("", "folder of photos; empty = the pocket world's demonstration subject")
    class_noun: str = param("cat", "what the subject is, in a word or two")
    identifier: str = param("sks", "the rare word that will name the subject")
    description: str = param("", "detailed description of the subject, put before the class noun; empty = none")
    n_steps: int = param(0, "training steps; 0 = the preset's", low=0, high=100_000)
    learning_rate: float = param(0.0, "0 = the preset's", low=0.0, high=1.0)
    batch_size: int = param(0, "subject images in a step; 0 = the preset's", low=0, high=1024)
    prior_weight: float = param(
        -1.0, "weight of the prior-preservation loss; 0 = without it, -1 = the preset's", low=0.0, high=100.0
    )
    n_class_images: int = param(0, "class images for prior preservation; 0 = the preset's", low=0, high=100_000)


@dataclass(frozen=True, kw_only=True)
class RLFinetune(Measured):
    """02_rl_finetune: DDPO on the personalized model."""

    run_in: str = param("", "folder of a finished 01 run; empty = outputs/notebook-01_personalize")
    prompts: list[str] = param([], 'activities such as "playing soccer"; empty = the preset\'s')
    n_epochs: int = param(0, "0 = the preset's", low=0, high=100_000)
    images_per_epoch: int = param(0, "0 = the preset's", low=0, high=100_000)
    n_inference_steps: int = param(0, "denoising steps of an image; 0 = the preset's", low=0, high=1000)
    guidance: float = param(0.0, "classifier-free guidance scale; 0 = the preset's", low=0.0, high=50.0)
    clip_range: float = param(0.0, "PPO clip range of the probability ratio; 0 = the preset's", low=0.0, high=1.0)
    learning_rate: float = param(0.0, "0 = the preset's", low=0.0, high=1.0)
    lora_rank: int = param(0, "0 = the preset's", low=0, high=1024)
    kl_weight: float = param(
        -1.0,
        "weight of the KL divergence from the personalized policy; 0 = without it, -1 = the preset's",
        low=0.0,
        high=1e6,
    )
    ema_decay: float = param(
        -1.0, "moving average of the adapter; 0 = the last policy, -1 = the preset's", low=0.0, high=0.9999
    )
    patience: int = param(
        -1,
        "epochs without a better text/subject frontier before RL stops; 0 = never, -1 = the preset's",
        low=0,
        high=100_000,
    )
    use_class_prompts: bool = param(True, "train on prompts without the identifier too")
    reward: str = param("image_reward", "name of the scorer that is the reward")
    clip_at_level: bool = param(False, "count scores above those of true pictures, the reward's level, as the level")
    subject_reward: str = param("", "name of a scorer that is a second objective, such as dino; empty = the text alone")
    clip_subject_at_level: bool = param(False, "the same for it; its level is how alike the photos are")
    combine: str = param(
        "synergy",
        "text and subject into one advantage: synergy, or of one reward, sum or harmonic",
        choices=("synergy", "sum", "harmonic"),
    )
    synergy: float = param(0.4, "weight of the synergy term; 0 = without it", low=0.0, high=100.0)
    time_aware: bool = param(True, "weigh the text by the denoising step; False = by text_weight")
    text_weight: float = param(0.5, "of the text, in the sum and the harmonic mean too", low=0.0, high=1.0)
    sample_every: int = param(0, "epochs between sample grids; 0 = the preset's", low=0, high=100_000)
    micro_batch: int = param(
        0, "pictures in a forward pass, for memory and speed only; 0 = the preset's", low=0, high=100_000
    )
    processes: int = param(
        1, "that train together, each on a GPU of its own; on a CPU they share its cores", low=1, high=64
    )

    def __post_init__(self):
        from ibkit.methods.engine.objectives import RewardSpec  # torch: who asks for no RL need not wait for it

        for name in filter(None, (self.reward, self.subject_reward)):
            RewardSpec(name)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Measured):
    """03_evaluate: base model, DreamBooth and InstructBooth on the same prompts and seeds."""

    run_dreambooth: str = param("", "folder of a finished 01 run; empty = outputs/notebook-01_personalize")
    run_rl: list[str] = param([], "folders of finished 02 runs, one a seed; empty = outputs/notebook-02_rl_finetune")
    prompts: list[str] = param([], "activities to evaluate on; empty = those that RL trained on")
    n_images: int = param(0, "images for each prompt and method; 0 = the preset's", low=0, high=100_000)
    batch_size: int = param(0, "images made at a time; 0 = what suits the model's picture size", low=0, high=1024)
    scorers: list[str] = param(
        [], "metrics such as clip_t, image_reward, clip_i, dino, subject, pick_score; empty = the first five"
    )


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Measured):
    """04_attention_maps: what the words attend to, and what a detailed description does for a rare subject."""

    subject: str = param("", "folder of photos; empty = the pocket world's rare subject")
    class_noun: str = param("monster toy", "what the subject is, in a word or two")
    identifier: str = param("sks", "the rare word that will name the subject")
    description: str = param("triangular", "detailed description of the subject, left out in one of the two arms")
    prompts: list[str] = param([], "activities to draw; empty = the preset's")
    n_steps: int = param(0, "personalization steps of each arm; 0 = the preset's", low=0, high=100_000)
    n_class_images: int = param(0, "class images for prior preservation; 0 = the preset's", low=0, high=100_000)
    train_seeds: list[int] = param([0], "each trains both arms once", low=0, high=2**31 - 1)
    n_images: int = param(0, "images for each prompt, arm and training seed; 0 = the preset's", low=0, high=100_000)


@dataclass(frozen=True, kw_only=True)
class DinoMetric(Measured):
    """05_dino_metric: what subject metrics do when only the pose changes, or only the subject."""

    subject: str = param("", "folder of photos; empty = the pocket world's subjects")
    class_nouns: list[str] = param([], "classes of the pocket world to measure on; empty = all eight")
    n_pairs: int = param(24, "pairs of pictures for each class and change", low=4, high=100_000)
    n_individuals: int = param(400, "individuals that the quick heads are trained on", low=8, high=100_000)

    def __post_init__(self):
        if self.model != "pocket":
            raise ParameterError(
                f"05_dino_metric measures pictures of the pocket world, and model is {self.model!r}: leave it at "
                "'pocket', and choose other scorers by scorer_weights ('official', or a folder)."
            )


@dataclass(frozen=True, kw_only=True)
class PromptAblation(Measured):
    """06_prompt_ablation: RL with identifier prompts only against both kinds of prompts."""

    class_nouns: list[str] = param(["cat"], "classes whose demonstration subjects are trained")
    prompts: list[str] = param([], "activities to train on; empty = the preset's")
    dreambooth_steps: list[int] = param([800], "how long each model is personalized first", low=1, high=100_000)
    train_seeds: list[int] = param([0], "RL seeds of every arm", low=0, high=2**31 - 1)
    n_epochs: int = param(16, "RL epochs of an arm", low=1, high=100_000)
    images_per_epoch: int = param(
        0, "of the arm with both kinds, half of each kind; 0 = the preset's", low=0, high=100_000
    )
    n_images: int = param(16, "pictures on fixed noise that each epoch's policy is measured on", low=1, high=100_000)


@dataclass(frozen=True, kw_only=True)
class HumanStudy(Common):
    """07_human_study: people compare the methods' pictures; in the pocket world simulated raters stand in."""

    run_evaluate: list[str] = param([], "folders of finished 03 runs; empty = outputs/notebook-03_evaluate")
    rater: str = param("", "who rates in this notebook, such as a nickname; empty = nobody does")
    ratings: list[str] = param([], "files of ratings to merge, one or more a rater; empty = the simulated raters")
    n_items: int = param(0, "pictures or pairs a question and method; 0 = all", low=0, high=100_000)


SCHEMAS: dict[str, type[Common]] = {
    "00_start_here": StartHere,
    "01_personalize": Personalize,
    "02_rl_finetune": RLFinetune,
    "03_evaluate": Evaluate,
    "04_attention_maps": AttentionMaps,
    "05_dino_metric": DinoMetric,
    "06_prompt_ablation": PromptAblation,
    "07_human_study": HumanStudy,
}


@dataclass(frozen=True)
class Parameter:
    """One row of a schema: name, type, default, help for people, and what is allowed."""

    name: str
    type: type
    default: Any
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    items: type | None = None  # of a list

    @property
    def allowed(self) -> str:
        """What is allowed, in words: 'a whole number from 0 to 1000'."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        noun = {
            bool: "True or False",
            int: "a whole number",
            float: "a number",
            str: "a text" if self.default == "" else "a text that is not empty",
            list: ("a list of one or more " if self.default else "a list of ")
            + ("whole numbers" if self.items is int else "texts that are not empty"),
        }[self.type]
        if self.low is not None and self.high is not None:
            return f"{noun} from {self.low} to {self.high}" + (f", or {self.default}" if self._below() else "")
        return noun

    def _below(self) -> bool:
        """Whether the default lies below what is allowed, and stands for the preset's own."""
        return self.type in (int, float) and self.low is not None and self.default < self.low

    def check(self, value: Any) -> Any:
        """Return `value` in the parameter's own type; raise ValueError when it is not allowed."""
        kind = type(value)
        if self.type is float and kind in (int, float, str):
            value = float(value)
            if not math.isfinite(value):
                raise ValueError(value)
        elif kind is not self.type:
            raise ValueError(value)
        if self.type is list:
            if not all(type(item) is self.items and (self.items is not str or item.strip()) for item in value):
                raise ValueError(value)
            value = list(value)
        needed = bool(self.default) and self.type in (str, list)
        if needed and not (value.strip() if self.type is str else value):
            raise ValueError(value)
        if self.choices and value not in self.choices:
            raise ValueError(value)
        for number in value if self.type is list else [value]:
            if self._below() and number == self.default:
                continue
            if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
                raise ValueError(value)
        return value


def schema(notebook: str) -> list[Parameter]:
    """List the parameters of a notebook, in the order of its parameters cell.

    Args:
        notebook: its name without the suffix, such as "01_personalize".

    Raises:
        ParameterError: no such notebook.
    """
    if notebook not in SCHEMAS:
        raise ParameterError(f"There is no notebook {notebook!r}{_nearest(notebook, SCHEMAS)}.")
    rows = []
    for field in dataclasses.fields(SCHEMAS[notebook]):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        items = next(iter(get_args(field.type)), None)
        rows.append(Parameter(name=field.name, type=type(default), default=default, items=items, **field.metadata))
    return rows


def make(notebook: str, values: Mapping[str, Any]) -> Any:
    """Check `values` and return the notebook's parameters; what is not given has its default.

    Args:
        notebook: its name without the suffix, such as "01_personalize".
        values: parameter name -> value.

    Returns:
        An instance of the notebook's dataclass (`dataclasses.asdict` turns it into the manifest's parameters).

    Raises:
        ParameterError: an unknown name (the nearest one is named), or a value that is not allowed (what is, is named).
    """
    rows = {row.name: row for row in schema(notebook)}
    for name in values:
        if name not in rows:
            raise ParameterError(f"Notebook {notebook} has no parameter {name!r}{_nearest(name, rows)}.")
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = rows[name].check(value)
        except (ValueError, OverflowError):
            hint = " (papermill: pass text with -r instead of -p)" if _wanted_text(rows[name], value) else ""
            raise ParameterError(
                f"Notebook {notebook}: parameter {name!r} must be {rows[name].allowed}, "
                f"not {_show(value)} of type {type(value).__name__}{hint}."
            ) from None
    return SCHEMAS[notebook](**checked)


def collect(notebook: str, namespace: Mapping[str, Any]) -> Any:
    """Check the variables of a notebook's parameters cell; call it in the next cell as `collect(name, globals())`.

    Any other public variable that holds a plain literal is taken for a mistyped parameter and refused. Only names
    that the parameters cell itself assigns are looked at when the cell is run again by hand, since by then the
    variables of later cells are there too.

    Args:
        notebook: its name without the suffix, such as "01_personalize".
        namespace: the notebook's `globals()`.

    Returns:
        An instance of the notebook's dataclass.

    Raises:
        ParameterError: an unknown or missing name, or a value that is not allowed.
    """
    names = [row.name for row in schema(notebook)]
    candidates = _cell_names(namespace, names) if namespace.get("_ibkit_collected") else set(namespace)
    values = {
        name: value
        for name, value in namespace.items()
        if name in names or (name in candidates and _is_public(name) and type(value) in LITERALS)
    }
    parameters = make(notebook, values)
    missing = [name for name in names if name not in values]
    if missing:
        raise ParameterError(
            f"The parameters cell of notebook {notebook} does not set {', '.join(missing)}; put the line back."
        )
    if isinstance(namespace, dict):
        namespace["_ibkit_collected"] = True
    return parameters


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in IPYTHON_NAMES


def _cell_names(namespace: Mapping[str, Any], names: list[str]) -> set[str]:
    """Names assigned by the cell run last among those that assign most of the notebook's parameters."""
    for source in reversed(namespace.get("In", [])):
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        assigned = {target.id for target in targets if isinstance(target, ast.Name)}
        if len(assigned & set(names)) > len(names) / 2:
            return assigned
    return set()


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; it is one of {', '.join(known)}"


def _wanted_text(row: Parameter, value: Any) -> bool:
    return row.type is str and type(value) in (int, float, bool)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
