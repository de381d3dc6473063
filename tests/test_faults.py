"""RL training killed with SIGKILL at random moments ends as if it had never been stopped."""

from benchmarks.faults import run_trials


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    result = run_trials(20, tmp_path)
    assert result["repeatable"]
    assert result["different"] == [] and result["leftovers"] == []
    assert result["killed_while_writing"] >= 3 and result["killed_while_training"] >= 3
