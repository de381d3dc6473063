"""A model as a base and the deltas that methods put on it: what a run writes, and the next one starts from.

`adapted.json` names the base and each delta's file with its hash; the file of a stage lies in that stage's run. The key
hashes base and deltas alone: no folder, clock or parameter, so a run made again bit for bit has the same one.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ibkit.adapt import lora
from ibkit.adapt.kinds import FOLDED, KINDS, attach, freeze, load_state, state
from ibkit.device import generator
from ibkit.errors import ArtifactError, ModelError
from ibkit.model.loading import load_model
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import CompletedRun, Run, hash_file, hash_json, read_json

FILE = "adapted.json"
SCHEMA = 1
ADAPTER = "adapter"  # name of a delta that was made elsewhere


@dataclass(frozen=True)
class Delta:
    """What one stage put on the model.

    Attributes:
        name: of the delta in the model, unique there.
        method: that made it, such as "dreambooth".
        kind: a key of `KINDS`; settings: of the kind, such as {"rank": 4}.
        seed: of the training.
        file: its weights, safetensors; sha256: of the file.
    """

    name: str
    method: str
    kind: str
    settings: Mapping[str, Any]
    seed: int
    file: Path
    sha256: str


@dataclass(frozen=True)
class Base:
    """A base model: its name and revision as `load_model` takes them, and `model_fingerprint` of its weights.

    `adapters` were made elsewhere and lie below all stages: with them on it, the model is what the stages start from.
    """

    name: str
    revision: str
    fingerprint: str
    adapters: tuple[Delta, ...] = ()


@dataclass(frozen=True)
class Adapted:
    """A base and the deltas on it, lowest first."""

    base: Base
    deltas: tuple[Delta, ...] = field(default=())

    @staticmethod
    def of(model: TextToImage, revision: str = "") -> "Adapted":
        """A loaded base model, nothing on it yet."""
        return Adapted(Base(model.name, revision, model_fingerprint(model)))

    def on_adapter(self, run: Run, model: TextToImage, path: Path) -> "Adapted":
        """The base with a LoRA of others on it, which is put on the model too (see `ibkit.adapt.lora.attach_file`); its
        weights are kept in the run.
        """
        lora.attach_file(model, ADAPTER, path)
        below = self.then(run, f"{ADAPTER}.safetensors", model, ADAPTER, "lora", 0).deltas[-1]
        return replace(self, base=replace(self.base, adapters=(below,)))

    @property
    def stack(self) -> tuple[Delta, ...]:
        """All deltas of the model, those that the base brought first."""
        return (*self.base.adapters, *self.deltas)

    @property
    def arm(self) -> str:
        """The chain of methods, "dreambooth+ddpo"; "base" for none."""
        return "+".join(delta.method for delta in self.deltas) or "base"

    @property
    def key(self) -> str:
        """Hash of all that decides the model's pictures."""
        facts = [{k: v for k, v in asdict(delta).items() if k != "file"} for delta in self.stack]
        return hash_json({"base": self.base.fingerprint, "deltas": facts})

    def free_name(self, method: str) -> str:
        """A delta name for one more stage of a method: the method's, with a number where that is taken."""
        names = [method, *(f"{method}-{i}" for i in range(2, len(self.deltas) + 2))]
        return next(name for name in names if name not in {delta.name for delta in self.stack})

    def then(self, run: Run, file: str, model: TextToImage, name: str, method: str, seed: int) -> "Adapted":
        """One more delta: that of this name on the model, whose weights are written to `file` in the run."""
        path, attached = run.write_tensors(file, state(model, name)), model.deltas[name]
        delta = Delta(name, method, attached.kind, attached.settings, seed, path, hash_file(path))
        return replace(self, deltas=(*self.deltas, delta))

    def write(self, run: Run, name: str = FILE) -> None:
        """Write the description as an output of a run; files are named as seen from its folder."""

        def rows(deltas: Iterable[Delta]) -> list[dict[str, Any]]:
            return [asdict(d) | {"file": Path(os.path.relpath(d.file, run.folder)).as_posix()} for d in deltas]

        base = asdict(self.base) | {"adapters": rows(self.base.adapters)}
        run.write_json(name, {"schema": SCHEMA, "base": base, "deltas": rows(self.deltas)})

    @staticmethod
    def read(run: CompletedRun, name: str = FILE) -> "Adapted":
        """Read it from a finished run; an ArtifactError where it has none, or one that this ibkit cannot read."""
        path = run.path(name)
        try:
            facts = read_json(path)
            if facts["schema"] != SCHEMA:
                raise ValueError(f"schema {facts['schema']}, and this ibkit reads {SCHEMA}")
            adapters, deltas = (
                tuple(Delta(**row | {"file": (run.folder / row["file"]).resolve()}) for row in rows)
                for rows in (facts["base"].get("adapters", []), facts["deltas"])
            )
            return Adapted(Base(**facts["base"] | {"adapters": adapters}), deltas)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} does not describe an adapted model ({error}); run its notebook again."
            ) from error

    def build(self, device: torch.device | str = "cpu") -> TextToImage:
        """Load the base and put the deltas on it, frozen. A file that is missing or altered is an ArtifactError; a base
        that is not the one that the deltas were trained on, or a file that does not fit, a ModelError.
        """
        from safetensors.torch import load_file

        model = load_model(self.base.name, self.base.revision, device)
        if self.stack and model_fingerprint(model) != self.base.fingerprint:
            raise ModelError(
                f"the weights of the model {self.base.name!r} are not those that {self.arm} was trained on: bring them "
                "back, or train again."
            )
        for delta in self.stack:
            if not delta.file.is_file():
                raise ArtifactError(
                    f"{delta.file}, the weights of {delta.name!r}, is not there: its run was moved or removed; "
                    "bring it back."
                )
            if hash_file(delta.file) != delta.sha256:
                raise ArtifactError(f"{delta.file} was altered since {delta.name!r} was trained: run that stage again.")
            attach(model, delta.kind, delta.name, delta.settings, generator(0, "overwritten at once"))
            load_state(model, delta.name, load_file(delta.file))
            freeze(model)
        return model

    def export(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Write what diffusers loads: a pipeline in `folder`, and each delta alone in a folder below it.

        The pipeline has all but adapters and mappers: `pipeline.load_lora_weights(folder / NAME)` takes an adapter.
        """
        whole = Adapted(replace(self.base, adapters=()), tuple(d for d in self.deltas if d.kind in FOLDED))
        plain = whole.build(device)
        for delta in whole.deltas:
            FOLDED[delta.kind](plain, delta.name)
        plain.save_pipeline(folder)
        model = self.build(device)
        for delta in self.stack:
            KINDS[delta.kind].export(model, delta.name, folder / delta.name)
