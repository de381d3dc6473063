"""Protocols: the prompts of an evaluation, and those that RL may train on. Each is a plain file beside this one, or
one's own.

`dreambench` has no file: its prompts are read from the published folder that holds the subject's photos (see
`ibkit.data.dreambench`). There the paper trains RL on two prompts of its own, one of each kind that DreamBench has.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from ibkit.data import dreambench
from ibkit.errors import ParameterError

FOLDER = Path(__file__).parent
DREAMBENCH = "dreambench"
OWN_IMAGES = 4  # pictures for each prompt of one's own file that does not say; as DreamBench draws
# InstructBooth, appendix D: a recontextualization and an accessorization, not of the benchmark. The wording is ours.
DREAMBENCH_TRAIN = {True: ("in a library", "wearing a raincoat"), False: ("in a library", "with a candle beside it")}


@dataclass(frozen=True)
class Protocol:
    """The prompts of one subject.

    Attributes:
        name: of the file, such as "actions".
        title: in words, with the numbers of subjects, prompts and images.
        class_noun: what the subject is, as the prompts call it.
        train: activities to train RL on.
        evaluate: activities, or templates (see `ibkit.data.prompts.make_prompt`), to draw pictures for.
        images_per_prompt: pictures for each prompt and method.
    """

    name: str
    title: str
    class_noun: str
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    images_per_prompt: int


def names() -> list[str]:
    """The names of all protocols."""
    return [*sorted(path.stem for path in FOLDER.glob("*.toml")), DREAMBENCH]


def class_nouns(name: str) -> list[str]:
    """The classes that a protocol with a file has prompts for, in its order."""
    return [noun for group in _read(name)["group"] for noun in group["class_nouns"]]


def read_protocol(name: str, class_noun: str = "", photos: str | Path = "") -> Protocol:
    """The prompts of a protocol for one subject.

    Args:
        name: see `names`; or the path of one's own file: `.toml` as those beside this one, or else of prompts, one a
            line, which RL is trained on and evaluation draws.
        class_noun: the subject's class; DreamBench takes it from `photos`.
        photos: the subject's folder, which only DreamBench needs.

    Raises:
        ParameterError: no such protocol or file, it is malformed, or it has no prompts for the class.
        PhotoError: the folder above `photos` is not DreamBench.
    """
    if name == DREAMBENCH:
        return _dreambench(Path(photos).expanduser() if photos else None)
    if Path(name).suffix and Path(name).suffix != ".toml":
        return _prompts_of(_text(Path(name).expanduser()), name, class_noun)
    data = _read(name)
    for group in data["group"]:
        if class_noun in group["class_nouns"]:
            prompts = (tuple(group["train"]), tuple(group["evaluate"]))
            return Protocol(name, data["title"], class_noun, *prompts, data["images_per_prompt"])
    raise ParameterError(
        f"protocol {name!r} has no prompts for {class_noun!r}: it knows {', '.join(class_nouns(name))}."
    )


def _prompts_of(text: str, name: str, class_noun: str) -> Protocol:
    """A protocol of a plain file: one prompt a line, without empty lines and those that begin with #."""
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise ParameterError(f"{name} has no prompts: write one a line, such as 'playing soccer'.")
    return Protocol(name, f"{len(prompts)} prompts of {Path(name).name}", class_noun, prompts, prompts, OWN_IMAGES)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ParameterError(f"Cannot read the prompts of {path}: {error}; name a text file or a protocol.") from None


def _own(name: str) -> dict:
    """One's own protocol, checked."""
    try:
        data = tomllib.loads(_text(Path(name).expanduser()))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ParameterError(f"{name} is no TOML file ({error}); take one of {FOLDER} as a pattern.") from None
    data = {"title": Path(name).stem, "images_per_prompt": OWN_IMAGES} | data
    groups = data.get("group")
    if unknown := sorted(data.keys() - {"title", "images_per_prompt", "group"}):
        raise ParameterError(f"{name} has {', '.join(unknown)}, and only title, images_per_prompt and [[group]] count.")
    if not isinstance(groups, list) or not groups:
        raise ParameterError(f"{name} has no [[group]] with class_nouns, train, evaluate: see {FOLDER}/actions.toml.")
    n_images = data["images_per_prompt"]
    if type(n_images) is not int or n_images < 1:
        raise ParameterError(f"images_per_prompt of {name} must be a whole number of at least 1, not {n_images!r}.")
    for number, group in enumerate(groups, 1):
        for key in ("class_nouns", "train", "evaluate"):
            texts = group.get(key) if isinstance(group, dict) else None
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise ParameterError(f"{key} of group {number} of {name} must be a list of one or more texts.")
    return data


def _read(name: str) -> dict:
    if name.endswith(".toml"):
        return _own(name)
    if name not in names() or name == DREAMBENCH:
        raise ParameterError(f"There is no protocol {name!r}: choose one of {', '.join(names())}.")
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def _dreambench(photos: Path | None) -> Protocol:
    if photos is None:
        raise ParameterError("protocol 'dreambench' needs a subject: give the folder of one of its 30, with --subject.")
    bench = dreambench.read(photos.parent)
    subject = next((s for s in bench.subjects if s.name == photos.name), None)
    if subject is None:
        raise ParameterError(f"{photos} is not one of DreamBench's subjects; `ibkit data dreambench` lists them.")
    prompts = bench.live_prompts if subject.live else bench.object_prompts
    title = "DreamBench: 30 subjects x 25 prompts x 4 images"
    train = DREAMBENCH_TRAIN[subject.live]
    return Protocol(DREAMBENCH, title, subject.class_noun, train, prompts, dreambench.IMAGES_PER_PROMPT)
