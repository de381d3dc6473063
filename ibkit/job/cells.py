"""The cells of a grid: what a configuration file asks for, as notebooks with checked parameters.

A grid is a main job for each subject (`job.stages.plan`) whose evaluation is cut into one for each model that nothing
was trained from, so that a chain that fails takes no other with it. They share what is the same: class pictures, a
personalization that several tunings start from, and the pictures of models that several evaluations compare.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ibkit.errors import IbkitError, ParameterError
from ibkit.fields import nearest
from ibkit.job.stages import CHAINS, SHARED, Stage, defaults, given, make_stage, plan, spell
from ibkit.runs import resolve

OF_A_SUBJECT = ("name", "subject", "class_noun", "identifier", "description", "protocol", "prompts")
OF_ALL = tuple(name for name in SHARED if name not in ("subject", "class_noun", "seed"))
KEYS = ("name", "subjects", *CHAINS, "protocol", "set", "parameters", *OF_ALL)
LISTS = {"personalize": str, "tune": str, "seeds": int, "tune_seeds": int, "prompts": str}
PATHS = ("subject", "lora", "model", "scorer_weights", "protocol")  # relative ones are seen from the file
PICTURES = "outputs/cache/pictures"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Cell:
    """One notebook of a grid.

    Attributes:
        name: "subject/run folder", such as "cat/02_rl_finetune-dpok".
        stage: the notebook and its parameters.
        needs: names of the cells whose runs it reads.
    """

    name: str
    stage: Stage
    needs: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ParameterError(f"{self.name}, line {node.start_mark.line + 1}: {twice[0]!r} is named twice.")
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> dict[str, Any]:
    """Read a grid's file: the keys of `KEYS`, and a list of subjects.

    A subject is a word, the class noun of one of the pocket world's or of DreamBench's, or a table with the keys of
    `OF_A_SUBJECT`. Paths are seen from the file's folder.

    Raises:
        ParameterError: it cannot be read, an unknown key (the nearest is named), or a value of another kind.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ParameterError(
            f"{path} cannot be read as a grid's configuration ({said}): check its path, or write it as docs/grids.md "
            "shows."
        ) from error
    if not isinstance(config, dict):
        raise ParameterError(f"{path} is no table of names and values; it needs at least a list of subjects.")
    config = _checked(config, KEYS, path, str(path))
    subjects = config.get("subjects")
    if not isinstance(subjects, list) or not subjects:
        raise ParameterError(
            f"{path}: subjects must be a list of class nouns, or of tables with {_named(OF_A_SUBJECT)}."
        )
    config["subjects"] = [
        {"class_noun": one} if isinstance(one, str) else _checked(one, OF_A_SUBJECT, path, f"{path}, subject {number}")
        for number, one in enumerate(subjects, 1)
    ]
    config.setdefault("name", path.stem)
    if not NAME.fullmatch(config["name"]):
        raise ParameterError(f"{path}: the name {config['name']!r} must be made of letters, digits, '.', '_' and '-'.")
    return config


def _checked(values: Any, known: tuple[str, ...], path: Path, where: str) -> dict[str, Any]:
    """The values of a table, of the right kinds; lists may be given as a single value."""
    if not isinstance(values, dict):
        raise ParameterError(f"{where} is {values!r} and must be a word or a table with {_named(known)}.")
    found = dict(values)
    for name, value in values.items():
        if name not in known:
            raise ParameterError(f"{where}: there is no {name!r}{nearest(str(name), known)}")
        if name in ("subjects", "set", "parameters"):
            if name != "subjects" and not isinstance(value, dict):
                raise ParameterError(f"{where}: {name} must be a table, such as {{ddpo.n_epochs: 20}}.")
            continue
        kind = LISTS.get(name) or SHARED.get(name, str)
        each = value if isinstance(value, list) and name in LISTS else [value]
        for one in each:
            right = (isinstance(one, kind) and (kind is bool or not isinstance(one, bool))) or (
                kind is float and type(one) is int
            )
            if not right:
                words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
                raise ParameterError(f"{where}: {name} has {one!r} and needs {words[kind]}{_quoted(one, kind)}.")
        found[name] = each if name in LISTS else value
        if name in PATHS and (path.parent / str(value)).exists():
            found[name] = str((path.parent / value).resolve())
    return found


def _quoted(value: Any, kind: type) -> str:
    """What to do about YAML's own reading of a word, such as `no`."""
    return f": write it in quotes, '{value}'" if kind is str and isinstance(value, int | float) else ""


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def lay_out(config: Mapping[str, Any], folder: Path, card_gib: float = 0.0) -> list[Cell]:
    """All cells of a grid, each after those that it needs; nothing has run when this returns.

    Args:
        config: from `read_config`.
        folder: of the grid; a subject's runs lie in a folder below it.
        card_gib: memory of the GPUs that a large model must fit on, with what `fit.chosen` adds; 0 = no matter.

    Raises:
        ParameterError: two subjects of one name, and what `stages.given` and `stages.plan` refuse.
        ArtifactError: a notebook or a folder of photos is not there.
    """
    common = {name: value for name, value in config.items() if name in (*CHAINS, "protocol", *OF_ALL)}
    sets, parameters = (
        [f"{name}={value}" for name, value in (config.get(key) or {}).items()] for key in ("set", "parameters")
    )
    cells: list[Cell] = []
    labels: set[str] = set()
    for one in config["subjects"]:
        own = {name: value for name, value in one.items() if name != "name"}
        label = re.sub(
            r"[^A-Za-z0-9._]+", "-", one.get("name") or Path(own.get("subject", "")).name or own["class_noun"]
        )
        if not NAME.fullmatch(label) or label in labels:
            why = "stands for two subjects" if label in labels else "is not made of letters and digits"
            raise ParameterError(f"The subject's name {label!r} {why}: give each a name of its own.")
        labels.add(label)
        try:
            settings = defaults() | given(Namespace(**common | own, parameters=parameters, set=sets))
            if card_gib and settings["01_personalize.model"] != "pocket":
                from ibkit.job.fit import chosen

                settings |= chosen(settings, folder / label, card_gib)[0]
            cells += _of_subject(label, settings, folder / label)
        except IbkitError as error:
            raise type(error)(f"Subject {label}: {error}") from error
    return cells


def _of_subject(label: str, settings: dict[str, Any], folder: Path) -> list[Cell]:
    """A main job's stages, with an evaluation for each model that no stage starts from."""
    *trained, whole = plan(settings, folder, resume=True)
    by_folder = {stage.folder: f"{label}/{stage.name}" for stage in trained}
    starts = {stage.name: stage.parameters.get("run_in", "") for stage in trained}
    cells, used = [], {resolve(start) for start in starts.values() if start}
    for stage in trained:
        start = starts[stage.name]
        before = [resolve(start)] if start else []
        cells.append(Cell(f"{label}/{stage.name}", stage, tuple(by_folder[place] for place in before)))
        if stage.folder in used:
            continue
        chain = [*before, stage.folder]
        name = whole.name + stage.name.removeprefix(stage.notebook.stem)
        values = {"runs": [spell(place) for place in chain], "run_out": spell(folder / name), "picture_cache": PICTURES}
        evaluation = make_stage(name, whole.notebook.stem, whole.parameters | values)
        cells.append(Cell(f"{label}/{name}", evaluation, tuple(by_folder[place] for place in chain)))
    return cells
