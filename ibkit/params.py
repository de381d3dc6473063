"""Typed notebook parameters: what each notebook takes, what is allowed, and a refusal of everything else.

A notebook's parameters cell holds literals, which papermill replaces. papermill only warns about a name that it does
not know, and reads `1e-4` as text, so the cell after it calls `collect`. Types are plain (`int`, `float`, `str`,
`bool`, `list` of texts or of whole numbers, `dict`), because that is what papermill's reader of the cell understands.
The settings of a method are one table, so that every method has the same parameters; the method's record checks them.
"""

import ast
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ibkit.errors import IbkitError, ParameterError
from ibkit.fields import Field, checked, field, fields_of, fill, nearest
from ibkit.shell import cell_names, fold_tracebacks

LITERALS = (int, float, str, bool, list, dict, type(None))
IPYTHON_NAMES = {"In", "Out", "exit", "quit"}


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every notebook takes."""

    model: str = field("pocket", "pocket, sd15, another name on the hub, a diffusers folder, or a .safetensors file")
    revision: str = field("", "revision of a model on the hub; empty = the preset's")
    device: str = field("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = field(0, "every random stream of the notebook is derived from it", low=0, high=2**31 - 1)
    run_out: str = field("", "folder of this notebook's run; empty = outputs/notebook-<its name>")
    resume: bool = field(False, "go on with the run in run_out; where that is empty, equal values always do")


@dataclass(frozen=True, kw_only=True)
class StartHere(Common):
    """00_start_here: the tour."""


@dataclass(frozen=True, kw_only=True)
class Measured(Common):
    """What every notebook takes that scores pictures."""

    scorer_weights: str = field("", "weights of the scorers: pocket, official, or a local folder; empty = the preset's")


@dataclass(frozen=True, kw_only=True)
class Drawn(Measured):
    """What 01 and 03 take to draw pictures by; RL's own sampler is among its settings."""

    n_inference_steps: int = field(0, "denoising steps of a picture; 0 = the preset's", low=0, high=1000)
    guidance: float = field(-1.0, "classifier-free guidance scale, 1 = without; -1 = the preset's", low=-1.0, high=50.0)
    eta: float = field(-1.0, "DDIM's η, 0 = deterministic, 1 = as DDPO samples; -1 = the preset's", low=-1.0, high=1.0)

    def __post_init__(self):
        from ibkit.presets import preset_of

        preset_of(self.model).drawing(vars(self))


def _check_settings(parameters: Any, method: str) -> None:
    """Refuse a setting that a method does not have."""
    from ibkit.presets import preset_of  # torch: who asks for no training need not wait for it
    from ibkit.train.resources import Resources, require_bitsandbytes

    settings = preset_of(parameters.model).settings(method, parameters.settings)
    if getattr(settings, "resources", Resources()).adam_8bit:
        require_bitsandbytes()  # before class pictures are drawn


def _class_of(photos: str, usual: str) -> str:
    """What a subject is where nobody said: the usual without photos, what DreamBench says of its own; a ParameterError
    for a folder of photos that is not DreamBench's.
    """
    if not photos:
        return usual
    from ibkit.data import dreambench
    from ibkit.runs import resolve

    folder = resolve(photos)
    if not folder.is_dir():
        return usual  # who reads the photos says so
    with contextlib.suppress(IbkitError):  # it is not DreamBench
        found = [one.class_noun for one in dreambench.read(folder.parent).subjects if one.name == folder.name]
        if found:
            return found[0]
    raise ParameterError(
        f"The photos in {folder} are of a subject whose class is not named: give its class noun, such as "
        "--class-noun dog, or class_noun in a notebook."
    )


@dataclass(frozen=True, kw_only=True)
class Personalize(Drawn):
    """01_personalize: one subject from a few photos."""

    subject: str = field("", "folder of photos; empty = the pocket world's demonstration subject")
    class_noun: str = field("", "what the subject is, in a word or two; empty = cat, or DreamBench's word")
    identifier: str = field("sks", "the rare word that will name the subject")
    description: str = field("", "detailed description of the subject, put before the class noun; empty = none")
    lora: str = field("", "file of a LoRA made elsewhere, on the base model from the start; empty = none")
    method: str = field("", "how to personalize, see `ibkit methods`; empty = the preset's")
    settings: dict = field({}, "of the method, such as {'n_steps': 400}; the rest is the preset's")

    def __post_init__(self):
        from ibkit.methods.records import find_method
        from ibkit.presets import preset_of

        super().__post_init__()
        object.__setattr__(self, "class_noun", self.class_noun or _class_of(self.subject, "cat"))
        object.__setattr__(self, "method", self.method or preset_of(self.model).personalize)
        _check_settings(self, find_method(self.method, "personalize").name)


@dataclass(frozen=True, kw_only=True)
class RLFinetune(Measured):
    """02_rl_finetune: a personalized model learns from a reward."""

    run_in: str = field("", "folder of a finished 01 run; empty = the newest")
    prompts: list[str] = field([], 'activities such as "playing soccer"; empty = the preset\'s')
    method: str = field("ddpo", "how to fine-tune; `ibkit methods` lists what there is")
    settings: dict = field(
        {}, "of the method, such as {'n_epochs': 20, 'sampler.n_steps': 10}; the rest is the preset's"
    )
    guard: dict = field({}, "what to change of the guard, such as {'patience': 10}; the rest is the preset's")
    use_class_prompts: bool = field(True, "train on prompts without the identifier too")
    reward: str = field("image_reward", "name of the scorer that is the reward")
    reward_options: dict = field({}, "of that scorer, such as {'weight': 0.7} of harmonic")
    clip_at_level: bool = field(False, "count scores above those of true pictures, the reward's level, as the level")
    subject_reward: str = field("", "name of a scorer that is a second objective, such as subject; empty = text alone")
    subject_reward_options: dict = field({}, "of that scorer")
    clip_subject_at_level: bool = field(False, "the same for it; its level is how alike the photos are")
    sample_every: int = field(0, "epochs between sample grids; 0 = the preset's", low=0, high=100_000)
    processes: int = field(
        1, "that train together, each on a GPU of its own; on a CPU they share its cores", low=1, high=64
    )

    def __post_init__(self):
        from ibkit.methods.engine.objectives import RewardSpec
        from ibkit.methods.records import check_tuning, find_method
        from ibkit.presets import preset_of

        method = find_method(self.method, "tune")
        _check_settings(self, method.name)
        guard = fill(preset_of(self.model).guard, self.guard, "The guard")
        RewardSpec(self.reward, options=self.reward_options)
        if self.subject_reward:
            RewardSpec(self.subject_reward, options=self.subject_reward_options)
        elif self.subject_reward_options:
            raise ParameterError("There are subject_reward_options and no subject_reward: name its scorer.")
        check_tuning(method, self.reward, self.subject_reward, self.processes, guard.patience)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Drawn):
    """03_evaluate: the base model and the models of finished runs on the same prompts and seeds."""

    runs: list[str] = field([], "folders of finished 01 and 02 runs, of any methods and seeds; empty = the newest run")
    prompts: list[str] = field([], "activities to evaluate on; empty = those that RL trained on, else the preset's")
    n_images: int = field(0, "images for each prompt and model; 0 = the preset's", low=0, high=100_000)
    batch_size: int = field(0, "images made at a time; 0 = what suits the model's picture size", low=0, high=1024)
    scorers: list[str] = field(
        [], "metrics such as clip_t, image_reward, clip_i, dino, subject, pick_score; empty = the first five"
    )
    best_of: int = field(
        0, "pictures drawn for one that is kept, as one more arm of each personalization; 0 = no such arm", low=0,
        high=64,
    )  # fmt: skip
    best_of_reward: str = field("image_reward", "name of the scorer that chooses it")
    picture_cache: str = field("", "folder in which evaluations share pictures of the same models; empty = none")

    def __post_init__(self):
        from ibkit.scorers import SCORERS

        super().__post_init__()
        for name in (*self.scorers, self.best_of_reward):
            SCORERS.find(name)


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Common):
    """04_attention_maps: what the words attend to, before and after a personalization."""

    run_in: str = field("", "folder of a finished 01 run; empty = the newest")
    prompts: list[str] = field([], "activities to draw; empty = the preset's")
    n_scenes: int = field(4, "rendered scenes of each activity whose attention is counted", low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class DetailedDescription(Measured):
    """14_detailed_description: what a detailed description does for a rare subject."""

    subject: str = field("", "folder of photos; empty = the pocket world's rare subject")
    class_noun: str = field("", "what the subject is, in a word or two; empty = monster toy, or DreamBench's word")
    identifier: str = field("sks", "the rare word that will name the subject")
    description: str = field("triangular", "detailed description of the subject, left out in one of the two arms")
    prompts: list[str] = field([], "activities to draw; empty = the preset's")
    settings: dict = field({}, "of DreamBooth in each arm, such as {'n_steps': 400}; the rest is the preset's")
    train_seeds: list[int] = field([0], "each trains both arms once", low=0, high=2**31 - 1)
    n_images: int = field(0, "images for each prompt, arm and training seed; 0 = the preset's", low=0, high=100_000)

    def __post_init__(self):
        object.__setattr__(self, "class_noun", self.class_noun or _class_of(self.subject, "monster toy"))
        _check_settings(self, "dreambooth")


@dataclass(frozen=True, kw_only=True)
class DinoMetric(Measured):
    """05_dino_metric: what subject metrics do when only the pose changes, or only the subject."""

    subject: str = field("", "folder of photos; empty = the pocket world's subjects")
    class_nouns: list[str] = field([], "classes of the pocket world to measure on; empty = all eight")
    n_pairs: int = field(24, "pairs of pictures for each class and change", low=4, high=100_000)
    n_individuals: int = field(400, "individuals that the quick heads are trained on", low=8, high=100_000)

    def __post_init__(self):
        if self.model != "pocket":
            raise ParameterError(
                f"05_dino_metric measures pictures of the pocket world, and model is {self.model!r}: leave it at "
                "'pocket', and choose other scorers by scorer_weights ('official', or a folder)."
            )


@dataclass(frozen=True, kw_only=True)
class PromptAblation(Measured):
    """06_prompt_ablation: RL with identifier prompts only against both kinds of prompts."""

    class_nouns: list[str] = field(["cat"], "classes whose demonstration subjects are trained")
    prompts: list[str] = field([], "activities to train on; empty = the preset's")
    dreambooth_steps: list[int] = field([800], "how long each model is personalized first", low=1, high=100_000)
    train_seeds: list[int] = field([0], "RL seeds of every arm", low=0, high=2**31 - 1)
    n_epochs: int = field(16, "RL epochs of an arm", low=1, high=100_000)
    settings: dict = field(
        {}, "of DDPO, such as {'images_per_epoch': 32}, half of them of each kind; the rest is the preset's"
    )
    n_images: int = field(16, "pictures on fixed noise that each epoch's policy is measured on", low=1, high=100_000)

    def __post_init__(self):
        _check_settings(self, "ddpo")


@dataclass(frozen=True, kw_only=True)
class HumanStudy(Common):
    """07_human_study: people compare the methods' pictures; in the pocket world simulated raters stand in."""

    run_evaluate: list[str] = field([], "folders of finished 03 runs; empty = the newest")
    rater: str = field("", "who rates in this notebook, such as a nickname; empty = nobody does")
    ratings: list[str] = field([], "files of ratings to merge, one or more a rater; empty = the simulated raters")
    n_items: int = field(0, "pictures or pairs a question and arm; 0 = all", low=0, high=100_000)


@dataclass(frozen=True, kw_only=True)
class Baselines(Common):
    """08_baselines: the systems that InstructBooth is compared with, side by side."""

    run_evaluate: list[str] = field([], "folders of finished 03 runs; empty = the newest")
    second: str = field(
        "dog", "class noun of a second pocket subject for one model of two; empty = leave that out", may_be_empty=True
    )
    settings: dict = field(
        {}, "of Custom Diffusion for the two subjects, such as {'n_steps': 100}; the rest is the preset's"
    )

    def __post_init__(self):
        _check_settings(self, "custom_diffusion")


@dataclass(frozen=True, kw_only=True)
class HumanFeedback(Common):
    """09_human_feedback: a reward learned from good and bad, and a model fine-tuned by it."""

    kinds: list[str] = field(["count", "colour", "place", "all"], "kinds of prompts")
    n_prompts: int = field(6, "rated prompts of each kind; half as many of each unseen sort", low=2, high=1000)
    n_rated: int = field(6, "pictures of each to rate, and as many that nobody does", low=1, high=1000)
    best_of: int = field(8, "new pictures of each prompt, of which the best four are kept", low=2, high=1000)
    error_rate: float = field(0.1, "share of pictures that a simulated rater gets wrong", low=0.0, high=0.5)
    skip_rate: float = field(0.05, "share that a simulated rater skips", low=0.0, high=0.9)
    rater: str = field("", "who rates in this notebook, such as a nickname; empty = nobody does")
    ratings: list[str] = field([], "files of ratings, one or more a rater; empty = a simulated rater")
    reward_settings: dict = field({}, "of the learned reward, such as {'n_steps': 500}; the rest is its own")
    arms: list[str] = field(
        ["labelled", "scored", "pretrain"], "what to fine-tune; empty = the reward alone", may_be_empty=True
    )
    settings: dict = field({}, "of fine-tuning, such as {'n_steps': 100}; the rest is the preset's")
    second_round: bool = field(True, "rate and fine-tune once more, from the last arm")

    def __post_init__(self):
        from ibkit.experiments.human_feedback import check

        check(self)


@dataclass(frozen=True, kw_only=True)
class Variants(Common):
    """What 10 and 11 take: variants of a personalization, trained beside each other in the pocket world."""

    class_nouns: list[str] = field(["cat"], "classes whose demonstration subjects are trained")
    train_seeds: list[int] = field([0], "of the trainings of every variant")
    variants: list[str] = field([], "which to train, by name")
    settings: dict = field({}, "of all variants that have them, such as {'n_steps': 400}; the rest is the preset's")
    n_images: int = field(8, "pictures of each prompt", low=1, high=10_000)

    def check(self, known: Mapping[str, Any]) -> None:
        """Refuse what is no variant, a setting that none of them has, and a model without a judge."""
        from ibkit.experiments.variants import choose, config_of, settings_of
        from ibkit.pocket.world import CLASSES
        from ibkit.presets import preset_of

        preset = preset_of(self.model)
        if not preset.world:
            raise ParameterError("The judge knows the pocket world's pictures alone: give model='pocket'.")
        if wrong := [noun for noun in self.class_nouns if noun not in CLASSES]:
            raise ParameterError(f"The pocket world has no class {wrong[0]!r}{nearest(wrong[0], CLASSES)}")
        chosen = choose(known, self.variants).values()
        names = {name for variant in chosen for name in settings_of(variant)}
        if unknown := [name for name in self.settings if name not in names]:
            raise ParameterError(f"None of the variants has the setting {unknown[0]!r}{nearest(unknown[0], names)}")
        for variant in chosen:
            config_of(preset, variant, self.settings)


@dataclass(frozen=True, kw_only=True)
class DeterministicPG(Variants):
    """10_deterministic_pg: DPG and its variants beside DreamBooth."""

    variants: list[str] = field(["lora_dreambooth", "dpg", "dpg_no_critic"], "which to train, by name")
    settings: dict = field(
        {"n_steps": 600}, "of all variants that have them; the rest is the preset's, whose steps are 1,400"
    )

    def __post_init__(self):
        from ibkit.experiments.variants import DPG

        self.check(DPG)


@dataclass(frozen=True, kw_only=True)
class Preferences(Variants):
    """11_rpo: RPO and its ablations beside DreamBooth."""

    variants: list[str] = field(["lora_dreambooth", "rpo", "rpo_last", "rpo_similarity"], "which to train, by name")

    def __post_init__(self):
        from ibkit.experiments.variants import RPO

        self.check(RPO)


@dataclass(frozen=True, kw_only=True)
class CompareRL(Common):
    """12_compare_rl: the ways to learn from a reward, side by side."""

    run_evaluate: list[str] = field([], "folders of finished 03 runs; empty = the newest")


@dataclass(frozen=True, kw_only=True)
class InsideRL(Common):
    """13_inside_rl: a finished tuning, looked into."""

    run_in: str = field("", "folder of a finished 02 run; empty = the newest")


SCHEMAS: dict[str, type[Common]] = {
    "00_start_here": StartHere,
    "01_personalize": Personalize,
    "02_rl_finetune": RLFinetune,
    "03_evaluate": Evaluate,
    "04_attention_maps": AttentionMaps,
    "05_dino_metric": DinoMetric,
    "06_prompt_ablation": PromptAblation,
    "07_human_study": HumanStudy,
    "08_baselines": Baselines,
    "09_human_feedback": HumanFeedback,
    "10_deterministic_pg": DeterministicPG,
    "11_rpo": Preferences,
    "12_compare_rl": CompareRL,
    "13_inside_rl": InsideRL,
    "14_detailed_description": DetailedDescription,
}


def schema(notebook: str) -> list[Field]:
    """List the parameters of a notebook, such as "01_personalize", in the order of its parameters cell; a
    ParameterError where there is no such notebook.
    """
    if notebook not in SCHEMAS:
        raise ParameterError(f"There is no notebook {notebook!r}{nearest(notebook, SCHEMAS)}")
    return fields_of(SCHEMAS[notebook])


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
    tables = {row.name for row in schema(notebook) if row.type is dict}  # papermill's -p gives them as text
    read = {name: literal(v) if name in tables and type(v) is str else v for name, v in values.items()}
    return SCHEMAS[notebook](**checked(schema(notebook), read, f"Notebook {notebook}"))


def collect(notebook: str, namespace: Mapping[str, Any]) -> Any:
    """Check the variables of a notebook's parameters cell; call it in the next cell as `collect(name, globals())`.

    From here on the notebook shows the kit's errors as sentences (`ibkit.shell`).
    Any other public variable that holds a plain literal is taken for a mistyped parameter and refused. Only names that
    the parameters cell itself assigns are looked at when the cell is run again by hand: later cells' are there by then.

    Args:
        notebook: its name without the suffix, such as "01_personalize"; namespace: the notebook's `globals()`.

    Returns:
        An instance of the notebook's dataclass.

    Raises:
        ParameterError: an unknown or missing name, or a value that is not allowed.
    """
    fold_tracebacks()
    names = [row.name for row in schema(notebook)]
    candidates = cell_names(namespace, names) if namespace.get("_ibkit_collected") else set(namespace)
    values = {
        name: value
        for name, value in namespace.items()
        if name in names
        or (name in candidates - IPYTHON_NAMES and not name.startswith("_") and type(value) in LITERALS)
    }
    parameters = make(notebook, values)
    if missing := [name for name in names if name not in values]:
        raise ParameterError(
            f"The parameters cell of notebook {notebook} does not set {', '.join(missing)}; put the line back."
        )
    if isinstance(namespace, dict):
        namespace["_ibkit_collected"] = True
    return parameters


def literal(text: str) -> Any:
    """A value as Python or JSON would read it; text that neither reads stays text, and is refused where it must not."""
    for read in (ast.literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: too deep
            return read(text)
    return text
