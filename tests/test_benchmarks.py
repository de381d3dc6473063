"""The benchmark that only a GPU can run in earnest: the same code runs here on a small U-Net."""

import pytest
import torch

from benchmarks import sd15


def test_the_benchmark_at_stable_diffusions_shape_runs_on_a_small_u_net(capsys):
    result = sd15.measure(torch.device("cpu"), tiny=True, batches=[1], variants=["plain", "checkpointing"])
    assert [row["variant"] for row in result["rows"]] == ["plain", "checkpointing"]
    for row in result["rows"]:
        assert row["rollout_images_per_second"] > 0 and row["train_images_per_second"] > 0
        assert "note" not in row and row["train_gib"] is None  # a CPU keeps no such count
    forward, trained = result["gflop_forward"], result["gflop_trained"]
    assert 1.2 * forward < trained < 3 * forward  # back to the adapter's layers, without the weights' gradients
    assert capsys.readouterr().out.count("of the ceiling") == 4


def test_stable_diffusions_shape_is_not_tried_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sd15.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        sd15.main()
    assert stopped.value.code == 2 and "needs a GPU" in capsys.readouterr().err
