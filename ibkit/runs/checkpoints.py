"""The newest few states of a training, each whole or not there."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibkit.errors import ArtifactError
from ibkit.runs.files import hash_file, plain, require_disk, savable, save_tensors, sync

if TYPE_CHECKING:
    import torch

SCHEMA = 1
CHECKPOINTS = "checkpoints"  # below a training's folder


class Checkpoints:
    """The newest few states of a loop, each a folder `step-000123` with tensors and a JSON state.

    Args:
        folder: where they are kept; made when it is not there.
        keep: how many are kept; at least two, so that a damaged one has one before it. While one is written the oldest
            is gone already, so the disk holds `keep` of them at most.
    """

    TENSORS, STATE = "tensors.safetensors", "state.json"

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, not {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, "torch.Tensor"], state: Mapping[str, Any]) -> None:
        """Save a state in full or not at all; drop the oldest before, and any from a later step than this one after.

        Args:
            step: how many steps are done.
            tensors: weights, optimizer moments, random generators' states.
            state: what JSON can hold; its keys are texts.

        Raises:
            ArtifactError: the disk is full, or the folder cannot be written.
        """
        tensors = savable(tensors)
        text = json.dumps(dict(state), default=plain)
        target = self.folder / f"step-{step:06d}"
        building, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            self._drop([s for s in self.steps() if s < step][: 1 - self.keep])
            require_disk(self.folder, sum(tensor.nbytes for tensor in tensors.values()) + len(text))
            building.mkdir()
            save_tensors(tensors, building / self.TENSORS)
            head = {"schema": SCHEMA, "step": step, "tensors_sha256": hash_file(building / self.TENSORS)}
            head["state_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            # The state is kept as text inside the JSON, so that its hash is that of the very characters.
            (building / self.STATE).write_text(json.dumps(head | {"state": text}))
            for path in (building / self.TENSORS, building / self.STATE, building):
                sync(path)
            if target.exists():
                os.rename(target, replaced)
            os.rename(building, target)
            sync(self.folder)
            self._drop([s for s in self.steps() if s > step])
            self._clear_leftovers()
        except OSError as error:
            raise ArtifactError(f"Cannot save a checkpoint in {self.folder}: {error.strerror or error}.") from error

    def steps(self) -> list[int]:
        """Steps there are checkpoints of, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdecimal())

    def latest(self) -> tuple[int, dict[str, "torch.Tensor"], dict[str, Any]] | None:
        """The newest undamaged state as (step, tensors, state), or None when there is none.

        A damaged one is passed over with a warning.
        """
        self._clear_leftovers()
        steps = self.steps()
        while steps:
            step = steps.pop()
            try:
                return step, *self._load(step)
            except (OSError, ValueError, KeyError, TypeError) as error:
                instead = "the one before it is used" if steps else "none is left, so training starts anew"
                warnings.warn(
                    f"The checkpoint of step {step} in {self.folder} is damaged ({error}); {instead}.", stacklevel=2
                )
        return None

    def _load(self, step: int) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
        from safetensors.torch import load_file

        folder = self.folder / f"step-{step:06d}"
        head = json.loads((folder / self.STATE).read_text())
        if hashlib.sha256(head["state"].encode()).hexdigest() != head["state_sha256"]:
            raise ValueError("its state was altered")
        if hash_file(folder / self.TENSORS) != head["tensors_sha256"]:
            raise ValueError("its tensors were altered")
        return load_file(folder / self.TENSORS), json.loads(head["state"])

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            leftover = self.folder / f".step-{step:06d}.drop"
            os.rename(self.folder / f"step-{step:06d}", leftover)
            shutil.rmtree(leftover)

    def _clear_leftovers(self) -> None:
        """Remove what a killed `save` left behind, after putting back a state it had moved aside but not replaced."""
        for replaced in self.folder.glob(".step-*.old"):
            target = self.folder / replaced.name[1 : -len(".old")]
            if not target.exists():
                os.rename(replaced, target)
        for suffix in ("new", "old", "drop"):
            for leftover in self.folder.glob(f".step-*.{suffix}"):
                shutil.rmtree(leftover)
