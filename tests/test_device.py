"""Devices, seeds, random streams, threads."""

import pytest
import torch

from ibkit import device
from ibkit.errors import ParameterError


def test_auto_is_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", "", "cuda:-1"])
def test_a_name_that_is_no_device_is_refused(name):
    with pytest.raises(ParameterError, match="is not one of auto, cpu, cuda"):
        device.pick_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="device='cuda' was asked for"):
        device.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ParameterError, match="cuda:0 to cuda:1"):
        device.pick_device("cuda:2")


def test_the_cpu_is_described_by_its_threads():
    assert f"{torch.get_num_threads()} threads" in device.describe_device(torch.device("cpu"))


def test_a_stream_depends_on_the_seed_and_on_every_name():
    def draw(*arguments):
        return tuple(torch.rand(4, generator=device.generator(*arguments)).tolist())

    streams = [(0,), (1,), (0, "rollout"), (0, "rollout", 1), (0, "rollout", 2), (0, 1, "rollout"), (0, "rollout", "1")]
    assert len({draw(*arguments) for arguments in streams}) == len(streams)
    assert draw(0, "rollout", 1) == draw(0, "rollout", 1)


def test_a_stream_stays_the_same_across_versions():
    """Runs of old must be repeatable: these numbers change only if the recipe for a stream's seed does."""
    assert device.generator(0, "rollout", 3).initial_seed() == 211106634516208403


def test_asking_for_a_stream_leaves_the_global_one_alone():
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    device.generator(7, "x")
    assert torch.equal(torch.rand(3), first)


def test_threads_follow_the_cpus_this_process_may_use(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(device, "available_cpus", lambda: 3)
        assert device.threads() == 3 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(device, "available_cpus", lambda: 2)
        assert device.threads() == 3  # the variable is PyTorch's own to read, at its start
    finally:
        torch.set_num_threads(before)


def test_a_container_quota_limits_the_cpus(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(device.Path, "read_text", lambda path: "200000 100000\n")
    assert device.available_cpus() == 2
    monkeypatch.setattr(device.Path, "read_text", lambda path: "max 100000\n")
    assert device.available_cpus() == 64


def test_glibc_is_told_to_keep_memory():
    assert device.keep_memory() is None
    assert device._tell_glibc() == (device.platform.libc_ver()[0] == "glibc")
