"""RL that is killed, interrupted, or finds its disk full or a checkpoint damaged ends as if nothing had been."""

import dataclasses
import itertools
import os
import shutil
from collections import namedtuple

import pytest
import torch

from benchmarks.faults import run_trials
from ibkit.adapt import state
from ibkit.errors import ArtifactError
from ibkit.methods.ddpo import train
from ibkit.runs import Checkpoints, checkpoints, files
from tests.test_ddpo import CONFIG, PROMPTS, brightness
from tests.tiny import only_checkpoint, tiny_model

THREE = dataclasses.replace(CONFIG, n_epochs=3)


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory):
    """The adapter of a training that nothing happened to."""
    return trained(tokenizer, tmp_path_factory.mktemp("whole"))


def trained(tokenizer, folder, reward=brightness, **options):
    model = tiny_model(tokenizer)
    train(model, PROMPTS, reward, THREE, folder, **options)
    return state(model, "ddpo")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    result = run_trials(8, tmp_path)  # benchmarks/faults.py does 200
    assert result["repeatable"]
    assert result["different"] == [] and result["leftovers"] == []
    assert result["killed_while_writing"] and result["killed_while_training"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_truncated_checkpoint_costs_one_epoch_and_nothing_else(tokenizer, tmp_path, expected, file):
    stop = dataclasses.replace(THREE, n_epochs=2)
    train(tiny_model(tokenizer), PROMPTS, brightness, stop, tmp_path)
    path = only_checkpoint(tmp_path) / file
    path.write_bytes(path.read_bytes()[:-7])
    epochs = []
    with pytest.warns(UserWarning, match="checkpoint of step 2 .* is damaged"):
        adapter = trained(tokenizer, tmp_path, on_epoch=lambda row, model: epochs.append(row["epoch"]))
    assert epochs == [1, 2] and equal(adapter, expected)


def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_one_before(tokenizer, tmp_path, monkeypatch, expected):
    usage = namedtuple("usage", "total used free")
    saved = []

    def free(path):
        saved.append(1)
        return usage(2**40, 0, 2**40 if len(saved) < 3 else files.DISK_RESERVE_BYTES)  # asked before the start too

    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="is full.*free some space, then resume"):
        patch.setattr(files.shutil, "disk_usage", free)
        trained(tokenizer, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] == 1
    assert equal(trained(tokenizer, tmp_path), expected)


@pytest.mark.parametrize("where", ["reward", "on_epoch"])
def test_ctrl_c_leaves_a_whole_checkpoint(tokenizer, tmp_path, expected, where):
    def interrupt(*arguments):
        if (tmp_path / "checkpoints").exists():
            raise KeyboardInterrupt
        return brightness(*arguments) if where == "reward" else None

    options = {"reward": interrupt} if where == "reward" else {"on_epoch": interrupt}
    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, tmp_path, **options)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert equal(trained(tokenizer, tmp_path), expected)


def test_ctrl_c_within_a_save_leaves_a_checkpoint_that_goes_on(tokenizer, tmp_path, monkeypatch, expected):
    """At every change of a name, before and after it, and half-way through the tensors, in the save of the third epoch,
    which drops an old checkpoint too.
    """
    train(tiny_model(tokenizer), PROMPTS, brightness, dataclasses.replace(THREE, n_epochs=2), tmp_path / "before")
    save = checkpoints.save_tensors

    def half(tensors, path):
        save(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    found = []
    for n in itertools.count(1):
        folder, calls = shutil.copytree(tmp_path / "before", tmp_path / f"{n}"), []

        def interrupted(function, before_the_end, calls=calls, n=n):
            def call(*arguments):
                for moment in (before_the_end, function):
                    calls.append(1)
                    if len(calls) == n:
                        moment(*arguments)
                        raise KeyboardInterrupt
                function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save_tensors", interrupted(save, half))
            for name in ("rename", "replace"):
                patch.setattr(os, name, interrupted(getattr(os, name), lambda *paths: None))
            try:
                trained(tokenizer, folder)
                break
            except KeyboardInterrupt:
                pass
        epochs = []
        adapter = trained(tokenizer, folder, on_epoch=lambda row, model, epochs=epochs: epochs.append(row["epoch"]))
        found.append(3 - len(epochs))
        assert equal(adapter, expected)
        assert not list((folder / "checkpoints").glob(".*"))
    assert found == [2, 2, 2, 2, 2, 3]


def test_an_epoch_whose_on_epoch_was_interrupted_is_made_and_told_again(tokenizer, tmp_path):
    """Or what it keeps of the last epoch would be missing for good."""
    seen = []

    def on_epoch(row, model):
        seen.append(row["epoch"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, tmp_path, on_epoch=on_epoch)
    trained(tokenizer, tmp_path, on_epoch=on_epoch)
    assert seen == [0, 1, 2, 2]
