"""RL that is killed, interrupted, or finds its disk full or a checkpoint damaged ends as if nothing had been."""

import dataclasses
from collections import namedtuple

import pytest
import torch

from benchmarks.faults import run_trials
from ibkit import runs
from ibkit.errors import ArtifactError
from ibkit.rl.ddpo import train
from ibkit.runs import Checkpoints
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
    return model.lora_state()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    result = run_trials(20, tmp_path)
    assert result["repeatable"]
    assert result["different"] == [] and result["leftovers"] == []
    assert result["killed_while_writing"] >= 3 and result["killed_while_training"] >= 3


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
        return usage(2**40, 0, 2**40 if len(saved) < 2 else runs.DISK_RESERVE_BYTES)

    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="is full.*free some space, then resume"):
        patch.setattr(runs.shutil, "disk_usage", free)
        trained(tokenizer, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] == 1
    assert equal(trained(tokenizer, tmp_path), expected)


@pytest.mark.parametrize("where", ["reward", "on_epoch"])
def test_ctrl_c_leaves_a_whole_checkpoint(tokenizer, tmp_path, expected, where):
    def interrupt(*arguments):
        if (tmp_path / "checkpoints").exists():
            raise KeyboardInterrupt
        return brightness(*arguments)

    options = {"reward": interrupt} if where == "reward" else {"on_epoch": interrupt}
    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, tmp_path, **options)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert equal(trained(tokenizer, tmp_path), expected)
