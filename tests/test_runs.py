"""Run folders and checkpoints: atomic, exclusive, resumable, and refused when incomplete or altered."""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from ibkit import runs
from ibkit.errors import ArtifactError
from ibkit.runs import CHECKPOINTS, Checkpoints, Run, files, hash_file, hash_json, hash_tree, read_run, writing
from ibkit.runs import checkpoints as checkpoints_module

ROOT = Path(runs.__file__).parents[2]
PARAMETERS = {"seed": 0, "n_steps": 10, "prompts": ["playing soccer"], "resume": False, "run_out": ""}


def open_run(folder: Path, resume: bool = False, **changes) -> Run:
    return Run.open(folder, "01_personalize", PARAMETERS | {"resume": resume} | changes, resume=resume)


def finished(folder: Path) -> Path:
    run = open_run(folder)
    run.write_text("notes.txt", "ears")
    run.write_table("tables/scores.csv", pd.DataFrame({"score": [0.1]}))
    run.record(reward=1.5)
    run.finish()
    return folder


def start_python(code: str, *arguments) -> subprocess.Popen:
    """A Python of its own that runs `code` in the checkout and is killed when nobody waits for it any more."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def let_go():
    """Close the runs that a test leaves open."""
    yield
    for run in list(writing._OPEN.values()):
        run._close()


# ---------------------------------------------------------------------------------------------------- writing, reading


def test_what_is_written_is_what_is_read(tmp_path):
    table = pd.DataFrame({"text": ["NA", "a, b", "é"], "score": [0.1 + 0.2, 1e-17, float("nan")], "n": [1, 2, 3]})
    tensors = {"w": torch.randn(3, 2, dtype=torch.bfloat16), "step": torch.tensor(7)}
    run = open_run(tmp_path / "run")
    run.write_bytes("images/0.png", b"\x89PNG")
    run.write_text("notes.txt", "line\r\nline\n")
    run.write_json("model.json", {"rank": 8, "where": Path("a"), "mean": torch.tensor(0.5)})
    run.write_table("scores.csv", table)
    run.write_tensors("lora/weights.safetensors", tensors)
    run.record(reward=torch.tensor(2.0), epochs=3)
    run.record(reward=2.5)
    assert not run.complete
    run.finish()
    assert run.complete

    read = read_run(tmp_path / "run", "01_personalize")
    assert read.parameters == PARAMETERS
    assert read.metrics == {"reward": 2.5, "epochs": 3}
    assert read.path("images/0.png").read_bytes() == b"\x89PNG"
    assert read.path("notes.txt").read_bytes() == b"line\r\nline\n"
    assert read.json("model.json") == {"rank": 8, "where": "a", "mean": 0.5}
    pd.testing.assert_frame_equal(read.table("scores.csv"), table, check_exact=True, check_dtype=False)
    back = read.tensors("lora/weights.safetensors")
    assert back["w"].dtype == torch.bfloat16 and torch.equal(back["w"], tensors["w"]) and back["step"].item() == 7
    assert sorted(read.outputs) == [
        "images/0.png", "lora/weights.safetensors", "model.json", "notes.txt", "scores.csv",
    ]  # fmt: skip
    assert {path.name for path in read.folder.iterdir()} >= {"manifest.json"}
    assert not list(read.folder.rglob("*.tmp")) and not (read.folder / "outputs.jsonl").exists()


def test_a_manifest_tells_how_the_run_was_made(tmp_path):
    manifest = read_run(finished(tmp_path / "run")).manifest
    assert (manifest["schema"], manifest["kind"], manifest["status"]) == (1, "01_personalize", "complete")
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"]
    assert "threads" in manifest["device"] or "GiB" in manifest["device"]
    assert manifest["seconds"] >= 0 and manifest["started"].endswith("+00:00")
    assert manifest["outputs"]["notes.txt"] == {"sha256": hash_file(tmp_path / "run/notes.txt"), "bytes": 4}


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    weight = torch.arange(6.0)
    run = open_run(tmp_path / "run")
    run.write_tensors(
        "w.safetensors", {"a": weight, "tied": weight, "part": weight[2:4], "turned": weight.view(2, 3).T}
    )
    run.finish()
    back = read_run(tmp_path / "run").tensors("w.safetensors")
    assert back["tied"].tolist() == weight.tolist() and back["part"].tolist() == [2, 3]
    assert back["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_figure_is_written_with_what_it_draws_and_repeats_exactly(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], [3, 4])
    run = open_run(tmp_path / "run")
    data = pd.DataFrame({"x": [1, 2], "y": [3, 4]})
    assert run.save_figure(figure, "figures/line", data) == tmp_path / "run/figures/line.png"
    first = {suffix: hash_file(tmp_path / f"run/figures/line.{suffix}") for suffix in ("png", "svg", "csv")}
    run.save_figure(figure, "figures/line", data)
    assert first == {suffix: hash_file(tmp_path / f"run/figures/line.{suffix}") for suffix in ("png", "svg", "csv")}
    assert (tmp_path / "run/figures/line.csv").read_text() == "x,y\n1,3\n2,4\n"
    assert (tmp_path / "run/figures/line.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "run/figures/line.svg").read_text()


def test_a_folder_others_wrote_becomes_outputs(tmp_path):
    run = open_run(tmp_path / "run")
    run.path("lora/weights.bin").write_bytes(b"old")
    (run.path("lora") / "extra.bin").write_bytes(b"x")
    run.note_output("lora")
    (run.path("lora") / "extra.bin").unlink()
    run.path("lora/weights.bin").write_bytes(b"new")
    run.note_output("lora")
    run.finish()
    read = read_run(tmp_path / "run")
    assert read.outputs == ["lora/weights.bin"] and read.path("lora") == tmp_path / "run/lora"
    (tmp_path / "run/lora/weights.bin").write_bytes(b"NEW")
    with pytest.raises(ArtifactError, match=r"lora/weights\.bin is altered"):
        read_run(tmp_path / "run")


def test_noting_an_output_that_is_not_there_is_refused(tmp_path):
    run = open_run(tmp_path / "run")
    run.path("lora").mkdir()
    with pytest.raises(ArtifactError, match="there is no file"):
        run.note_output("lora")


@pytest.mark.parametrize("name", ["../up.txt", "/etc/x", "manifest.json", ".lock", "", "a/../../b"])
def test_names_that_leave_the_folder_or_hide_the_bookkeeping_are_refused(tmp_path, name):
    run = open_run(tmp_path / "run")
    with pytest.raises(ArtifactError, match="not a name for an output"):
        run.write_text(name, "x")
    run.finish()
    with pytest.raises(ArtifactError, match="not a name for an output"):
        read_run(tmp_path / "run").path(name)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    run = open_run(tmp_path / "run")
    with pytest.raises(ArtifactError, match="Cannot record reward"):
        run.record(reward=float("nan"))
    with pytest.raises(ArtifactError, match="Cannot write .*a.json"):
        run.write_json("a.json", [float("inf")])
    with pytest.raises(ArtifactError, match="Cannot open .* with its parameters: reward: weight: .* JSON compliant"):
        Run.open(tmp_path / "other", "01_personalize", {"seed": 1, "reward": {"weight": float("nan")}})
    run.finish()
    assert read_run(tmp_path / "run").metrics == {}


def test_a_closed_run_takes_nothing_more(tmp_path):
    run = open_run(tmp_path / "run")
    run.finish()
    for write in (lambda: run.write_text("a", "x"), lambda: run.record(a=1), run.finish, lambda: run.fail("late")):
        with pytest.raises(ArtifactError, match="is closed"):
            write()


# ---------------------------------------------------------------------------------------------------- refusals


def test_reading_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match=r"is not a run: it has no manifest\.json"):
            read_run(folder)


def test_reading_an_unfinished_run_is_refused_and_says_why(tmp_path):
    run = open_run(tmp_path / "run")
    with pytest.raises(ArtifactError, match=f"still being written by process {os.getpid()}"):
        read_run(tmp_path / "run")
    run._close()
    with pytest.raises(ArtifactError, match="was interrupted; resume it"):
        read_run(tmp_path / "run")
    open_run(tmp_path / "run", resume=True).fail("The loss is not finite.")
    with pytest.raises(ArtifactError, match="failed: The loss is not finite"):
        read_run(tmp_path / "run")


def test_reading_a_run_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="one of 01_personalize, and one of 02_rl_finetune is needed"):
        read_run(finished(tmp_path / "run"), "02_rl_finetune")


def test_an_altered_output_is_refused_by_name(tmp_path):
    folder = finished(tmp_path / "run")
    read_run(folder)
    (folder / "notes.txt").write_text("tail")  # as long as before
    with pytest.raises(ArtifactError, match=r"notes\.txt is altered"):
        read_run(folder)


def test_a_missing_output_is_refused_by_name(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "tables/scores.csv").unlink()
    with pytest.raises(ArtifactError, match=r"tables/scores\.csv is missing"):
        read_run(folder)


def test_an_output_the_run_does_not_have_is_refused_with_those_it_has(tmp_path):
    read = read_run(finished(tmp_path / "run"))
    (tmp_path / "run/stray.csv").write_text("x\n")
    with pytest.raises(ArtifactError, match=r"no output 'stray\.csv'; it has notes\.txt, tables/scores\.csv"):
        read.table("stray.csv")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: text.replace('"reward": 1.5', '"reward": 9.5'), "altered after it was written"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "has schema 2, and this ibkit reads 1"),
        (lambda text: "[]", "is damaged"),
    ],
)
def test_a_damaged_altered_or_unknown_manifest_is_refused(tmp_path, damage, message):
    path = finished(tmp_path / "run") / "manifest.json"
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.raises(ArtifactError, match=message):
        read_run(tmp_path / "run")


def test_an_output_altered_before_the_end_stops_the_run_from_finishing(tmp_path):
    run = open_run(tmp_path / "run")
    run.write_text("a.txt", "long text")
    (tmp_path / "run/a.txt").write_text("cut")
    with pytest.raises(ArtifactError, match=r"a\.txt was changed"):
        run.finish()


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="has files in it but is not a run"):
            open_run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="Cannot use .* as a run folder"):
        open_run(tmp_path / "file" / "run")


# ---------------------------------------------------------------------------------------------------- two processes

HOLD = """
import sys
from ibkit.runs import Run
run = Run.open(sys.argv[1], "01_personalize", {"seed": 0})
run.write_text("a.txt", "x")
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_on_one_folder(tmp_path):
    holder = start_python(HOLD, tmp_path / "run")
    try:
        assert holder.stdout.readline() == "open\n"
        for resume in (False, True):
            with pytest.raises(ArtifactError, match=f"in use by process {holder.pid}"):
                Run.open(tmp_path / "run", "01_personalize", {"seed": 0}, resume=resume)
        with pytest.raises(ArtifactError, match=f"still being written by process {holder.pid}"):
            read_run(tmp_path / "run")
    finally:
        holder.kill()
        holder.communicate()
    run = Run.open(tmp_path / "run", "01_personalize", {"seed": 0}, resume=True)  # SIGKILL let go of it
    assert run.has("a.txt")
    run.finish()
    read_run(tmp_path / "run")


def test_the_same_process_takes_its_own_run_over(tmp_path):
    first = open_run(tmp_path / "run")
    with pytest.raises(ArtifactError, match="already has a run"):
        open_run(tmp_path / "run")
    first.write_text("a.txt", "x")  # refusing did not close it
    second = open_run(tmp_path / "run", resume=True)
    assert second.has("a.txt")
    with pytest.raises(ArtifactError, match="is closed"):
        first.write_text("a.txt", "y")
    second.write_text("a.txt", "z")


# ---------------------------------------------------------------------------------------------------- resuming


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    folder = finished(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"already has a run in it; go on with it \(resume=True, or --resume\)"):
        open_run(folder)
    read_run(folder)


def test_resuming_goes_on_with_outputs_metrics_and_seconds(tmp_path):
    run = open_run(tmp_path / "run")
    run.record(reward=1.0)
    run.write_text("a.txt", "x")
    run.manifest["seconds"] = 0
    run._seconds_before = 100.0
    run.fail("Ctrl-C")
    run = open_run(tmp_path / "run", resume=True, run_out="elsewhere")
    assert run.has("a.txt") and not run.has("b.txt") and run.metrics == {"reward": 1.0} and not run.complete
    assert "reason" not in run.manifest
    run.write_text("b.txt", "y")
    run.finish()
    read = read_run(tmp_path / "run")
    assert sorted(read.outputs) == ["a.txt", "b.txt"] and read.manifest["seconds"] >= 100


def test_resuming_with_other_parameters_is_refused_and_names_them(tmp_path):
    open_run(tmp_path / "run")._close()
    with pytest.raises(ArtifactError, match=r"n_steps was 10 and is 20; seed was 0 and is 1;") as caught:
        open_run(tmp_path / "run", resume=True, seed=1, n_steps=20)
    assert "prompts" not in str(caught.value) and "resume was" not in str(caught.value)
    open_run(tmp_path / "run", resume=True)


def test_resuming_as_another_kind_is_refused(tmp_path):
    finished(tmp_path / "run")
    with pytest.raises(ArtifactError, match="has a run of 01_personalize in it, not of 02_rl_finetune"):
        Run.open(tmp_path / "run", "02_rl_finetune", PARAMETERS, resume=True)


def test_resuming_without_a_run_starts_one(tmp_path):
    assert open_run(tmp_path / "run", resume=True).manifest["status"] == "running"


def test_resuming_a_complete_run_leaves_it_as_it_is(tmp_path):
    folder = finished(tmp_path / "run")
    before = hash_file(folder / "manifest.json")
    run = open_run(folder, resume=True)
    assert run.complete and run.metrics == {"reward": 1.5}
    read_run(folder)
    run.finish()
    assert hash_file(folder / "manifest.json") == before


def test_writing_to_a_complete_run_makes_it_incomplete_first(tmp_path):
    folder = finished(tmp_path / "run")
    run = open_run(folder, resume=True)
    run.write_text("notes.txt", "tail")
    assert not run.complete
    with pytest.raises(ArtifactError, match="still being written"):
        read_run(folder)
    run.finish()
    assert read_run(folder).path("notes.txt").read_text() == "tail"


def test_resuming_makes_damaged_outputs_again_and_says_so(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "notes.txt").write_text("tail")
    with pytest.warns(UserWarning, match=r"notes\.txt is altered and will have to be made again"):
        run = open_run(folder, resume=True)
    assert not run.complete and not run.has("notes.txt") and run.has("tables/scores.csv")


def test_resuming_with_other_versions_says_so(tmp_path, monkeypatch):
    open_run(tmp_path / "run")._close()
    monkeypatch.setattr(writing, "versions", lambda: {"torch": "9.9"})
    with pytest.warns(UserWarning, match=r"goes on with other versions: .*torch was '.*' and is '9\.9'"):
        open_run(tmp_path / "run", resume=True)


# ---------------------------------------------------------------------------------------------------- inputs, hashes


def test_inputs_are_recorded_with_hashes_and_must_not_change(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.png").write_bytes(b"cat")
    first = finished(tmp_path / "first")
    inputs = {"photos": photos, "run_in": read_run(first)}
    run = Run.open(tmp_path / "run", "02", {}, inputs=inputs)
    recorded = run.manifest["inputs"]
    assert recorded["photos"] == {"path": str(photos), "sha256": hash_tree(photos)}
    assert recorded["run_in"]["path"] == str(first)
    run._close()

    (photos / ".DS_Store").write_bytes(b"desktop")
    Run.open(tmp_path / "run", "02", {}, inputs=inputs, resume=True)._close()
    (photos / "1.png").write_bytes(b"dog")
    with pytest.raises(ArtifactError, match="photos was .* and is "):
        Run.open(tmp_path / "run", "02", {}, inputs=inputs, resume=True)


def trained(folder: Path, seconds: float = 1.0, **changes) -> Path:
    run = open_run(folder, **changes)
    run.write_table("history.csv", pd.DataFrame({"loss": [0.5], "seconds": [seconds]}))
    run.finish()
    return folder


def test_the_same_run_made_again_elsewhere_is_the_same_input(tmp_path):
    first, renamed = trained(tmp_path / "first"), tmp_path / "renamed"
    here = {"run_out": "b", "device": "cpu", "processes": 2, "subject": "photos/elsewhere"}
    second = trained(tmp_path / "second", seconds=2.0, resume=True, **here)
    assert hash_file(first / "history.csv") != hash_file(second / "history.csv")
    identity = runs.identify(first)["sha256"]
    assert runs.identify(second)["sha256"] == identity
    first.rename(renamed)
    assert runs.identify(renamed)["sha256"] == identity
    assert runs.identify(trained(tmp_path / "other", seed=1))["sha256"] != identity
    assert runs.identify(finished(tmp_path / "outputs"))["sha256"] != identity
    (renamed / "history.csv").write_text("loss,seconds\n0.5,3.0\n")  # the time, too, is not to be altered afterwards
    with pytest.raises(ArtifactError, match=r"history\.csv is altered"):
        runs.identify(renamed)


def test_a_run_of_other_inputs_is_another_input(tmp_path):
    def tuned(name: str, **changes) -> str:
        first = trained(tmp_path / f"{name}-in", **changes)
        Run.open(tmp_path / name, "02", {"run_in": str(first)}, inputs={"run_in": first}).finish()
        return runs.identify(tmp_path / name)["sha256"]

    assert tuned("a") == tuned("b", seconds=2.0) != tuned("c", seed=1)


def test_runs_that_were_renamed_together_are_gone_on_with(tmp_path):
    def tune(folder: Path, resume: bool) -> Run:
        parameters = {"run_in": str(folder / "01"), "run_out": str(folder / "02"), "n_epochs": 2}
        return Run.open(folder / "02", "02", parameters, inputs={"run_in": folder / "01"}, resume=resume)

    finished(tmp_path / "old" / "01")
    run = tune(tmp_path / "old", resume=False)
    run.write_text("a.txt", "x")
    run._close()
    (tmp_path / "old").rename(tmp_path / "new")
    run = tune(tmp_path / "new", resume=True)
    assert run.has("a.txt")
    run.finish()
    (tmp_path / "new").rename(tmp_path / "newest")
    assert tune(tmp_path / "newest", resume=True).complete
    changed = open_run(tmp_path / "newest" / "01", resume=True)
    changed.write_text("notes.txt", "tail")
    changed.finish()
    with pytest.raises(ArtifactError, match="run_in was .* and is "):
        tune(tmp_path / "newest", resume=True)


def test_going_on_with_another_device_says_so(tmp_path, monkeypatch):
    open_run(tmp_path / "run")._close()
    monkeypatch.setattr(writing, "device_of", lambda name: "another")
    with pytest.warns(UserWarning, match="the device was .* and is 'another'"):
        open_run(tmp_path / "run", resume=True)


def test_an_input_that_is_missing_incomplete_or_altered_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        Run.open(tmp_path / "a", "02", {}, inputs={"run_in": tmp_path / "nowhere"})
    open_run(tmp_path / "first")._close()
    with pytest.raises(ArtifactError, match="was interrupted"):
        Run.open(tmp_path / "a", "02", {}, inputs={"run_in": tmp_path / "first"})
    assert not (tmp_path / "a").exists()


def test_a_path_in_the_checkout_is_recorded_without_the_machines_own_part():
    assert runs.identify(ROOT / "pyproject.toml")["path"] == "pyproject.toml"


def test_relative_paths_start_at_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.resolve("outputs/x") == ROOT / "outputs/x"
    assert runs.resolve(tmp_path) == tmp_path
    assert runs.resolve("~/x") == Path.home() / "x"


def test_a_json_hash_follows_the_value_not_its_spelling():
    assert hash_json({"a": 1, "b": [1.0]}) == hash_json({"b": [1.0], "a": 1})
    assert len({hash_json(value) for value in ({"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1})}) == 4


def test_a_tree_hash_follows_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    seen = {hash_tree(tmp_path)}
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(hash_tree(tmp_path))
    (tmp_path / "b").write_text("2")
    seen.add(hash_tree(tmp_path))
    assert len(seen) == 3


# ---------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(monkeypatch):
    """The disk's free bytes, as everybody sees them."""
    usage = namedtuple("usage", "total used free")
    free = {"bytes": 2**40}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(2**40, 0, free["bytes"]))
    return free


def test_a_full_disk_is_refused_before_anything_changes(tmp_path, disk):
    run = open_run(tmp_path / "run")
    run.write_text("a.txt", "old")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    disk["bytes"] = files.DISK_RESERVE_BYTES
    for write in (
        lambda: run.write_text("a.txt", "new"),
        lambda: run.write_tensors("b.safetensors", {"w": torch.zeros(4)}),
        lambda: run.record(reward=1.0),
        lambda: checkpoints.save(1, {"w": torch.zeros(4)}, {}),
    ):
        with pytest.raises(ArtifactError, match="is full: .* free some space, then resume"):
            write()
    assert (tmp_path / "run/a.txt").read_text() == "old" and not list((tmp_path / "run").rglob("*.tmp"))
    assert checkpoints.latest() is None
    disk["bytes"] = 2**40
    run.finish()
    read_run(tmp_path / "run")


def test_disk_is_measured_against_what_is_needed(tmp_path, disk):
    disk["bytes"] = files.DISK_RESERVE_BYTES + 1000
    files.require_disk(tmp_path / "not" / "made" / "yet", 1000)
    with pytest.raises(ArtifactError, match="is full"):
        files.require_disk(tmp_path, 1001)


def test_a_disk_that_fills_up_during_a_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = open_run(tmp_path / "run")
    run.write_text("a.txt", "old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", no_space)
        with pytest.raises(ArtifactError, match=r"Cannot write .*a\.txt: No space left on device"):
            run.write_text("a.txt", "new")
    assert (tmp_path / "run/a.txt").read_text() == "old" and not list((tmp_path / "run").rglob("*.tmp"))


# ---------------------------------------------------------------------------------------------------- killed

# Runs `work(folder)` again and again, in a fork that SIGKILL ends at its n-th call of anything that changes the disk
# (half-way through it when it writes a file), for n = 1, 2, ... until one gets through; prints how many were killed.
# The folder is a fresh copy each time.
KILL = """
import os, pathlib, shutil, signal, sys
from ibkit import runs
from ibkit.runs import files, writing
import torch, safetensors.torch

def kill_at(n):
    calls = 0
    def counted(function, before_the_end=lambda *args: None):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                before_the_end(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    def half(path, data):
        data = data.encode() if isinstance(data, str) else data
        open(path, "wb").write(data[:len(data) // 2])
    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    pathlib.Path.write_bytes = counted(pathlib.Path.write_bytes, half)
    pathlib.Path.write_text = counted(pathlib.Path.write_text, half)
    save = safetensors.torch.save
    safetensors.torch.save_file = counted(safetensors.torch.save_file, lambda tensors, path: half(path, save(tensors)))

before, places = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
n = 0
while True:
    n += 1
    folder = places / f"{n:03d}"
    shutil.copytree(before, folder)
    child = os.fork()
    if child == 0:
        kill_at(n)
        work(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
print(n - 1)
"""


def killed_at_every_point(tmp_path: Path, before: Path, work: str) -> list[Path]:
    """Folders as `work` left them when it was killed at its first, second, ... change of the disk."""
    places = tmp_path / "killed"
    places.mkdir()
    process = start_python(work + KILL, before, places)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    folders = sorted(places.iterdir())
    assert len(folders) == int(output) + 1
    return folders[:-1]


def test_a_kill_at_any_point_of_a_save_leaves_a_readable_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "before")
    for step in (10, 20):
        checkpoints.save(step, {"w": torch.full((1000,), float(step))}, {"step": step})
    work = """
def work(folder):
    runs.Checkpoints(folder).save(30, {"w": torch.full((1000,), 30.0)}, {"step": 30})
"""
    folders = killed_at_every_point(tmp_path, tmp_path / "before", work)
    assert len(folders) >= 10
    found = set()
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is damaged: the old state is whole, or the new one is
            step, tensors, state = Checkpoints(folder).latest()
        assert tensors["w"].tolist() == [float(step)] * 1000 and state == {"step": step}
        found.add(step)
        Checkpoints(folder).save(40, {"w": torch.zeros(1)}, {})
        assert Checkpoints(folder).steps() == [step, 40] and len(list(folder.iterdir())) == 2  # no leftovers
    assert found == {20, 30}


def test_a_kill_while_the_only_checkpoint_is_saved_again_leaves_it_readable(tmp_path):
    Checkpoints(tmp_path / "before").save(10, {"w": torch.zeros(10)}, {"pass": 1})
    work = """
def work(folder):
    runs.Checkpoints(folder).save(10, {"w": torch.ones(10)}, {"pass": 2})
"""
    passes = {Checkpoints(f).latest()[2]["pass"] for f in killed_at_every_point(tmp_path, tmp_path / "before", work)}
    assert passes == {1, 2}


def test_a_kill_at_any_point_of_a_run_leaves_one_that_resumes(tmp_path):
    run = open_run(tmp_path / "before")
    run.write_text("a.txt", "old")
    run._close()
    work = f"""
def work(folder):
    run = runs.Run.open(folder, "01_personalize", {PARAMETERS!r}, resume=True)
    run.write_text("a.txt", "new")
    run.write_text("b.txt", "new")
    run.record(reward=1.0)
    run.finish()
"""
    endings = set()
    for folder in killed_at_every_point(tmp_path, tmp_path / "before", work):
        assert (folder / "a.txt").read_text() in ("old", "new")
        try:
            read_run(folder)
            endings.add("complete")
        except ArtifactError as error:
            assert "was interrupted; resume it" in str(error)
            endings.add("interrupted")
        with warnings.catch_warnings():
            # A file replaced just before its new hash was noted is the one thing that may be made again.
            warnings.filterwarnings("ignore", message=r".*a\.txt is altered and will have to be made again")
            warnings.filterwarnings("error", message=r".*b\.txt")
            run = open_run(folder, resume=True)
        for name in ("a.txt", "b.txt"):
            if not run.has(name):
                run.write_text(name, "new")
        run.finish()
        assert sorted(read_run(folder).outputs) == ["a.txt", "b.txt"]
        assert not list(folder.rglob("*.tmp"))
    assert endings == {"complete", "interrupted"}


def test_a_note_cut_short_is_an_output_not_noted(tmp_path):
    run = open_run(tmp_path / "run")
    run.write_text("a.txt", "x")
    with open(tmp_path / "run/outputs.jsonl", "a") as journal:
        journal.write('\n{"name": "b.txt", "sha')  # the disk was full for a moment
    run.write_text("c.txt", "z")
    run._close()
    run = open_run(tmp_path / "run", resume=True)
    assert run.has("a.txt") and not run.has("b.txt") and run.has("c.txt")


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    state = {"epoch": 3, "history": [0.1 + 0.2, float("nan")], "text": "é"}
    tensors = {"w": torch.randn(5), "half": torch.randn(3).bfloat16(), "rng": torch.get_rng_state()}
    Checkpoints(tmp_path).save(7, tensors, state)
    step, back, state_back = Checkpoints(tmp_path).latest()
    assert step == 7 and set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    assert repr(state_back) == repr(state)


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None


def test_only_the_newest_are_kept_and_none_from_a_future_that_was_left(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 30, 1_000_000):
        checkpoints.save(step, {}, {})
    assert checkpoints.steps() == [30, 1_000_000]
    checkpoints.save(40, {}, {})
    assert checkpoints.steps() == [30, 40]


def test_the_disk_never_holds_more_than_are_kept(tmp_path, monkeypatch):
    """Those of Stable Diffusion's size are 10 GiB each."""
    on_disk, save = [], checkpoints_module.save_tensors

    def counted(tensors, path):
        save(tensors, path)
        on_disk.append(len(list(tmp_path.rglob("*.safetensors"))))

    monkeypatch.setattr(checkpoints_module, "save_tensors", counted)
    for step in (1, 2, 3, 4):
        Checkpoints(tmp_path).save(step, {"w": torch.zeros(2)}, {})
    assert on_disk == [1, 2, 2, 2]


def test_a_finished_run_has_no_checkpoints_and_leaves_those_of_others(tmp_path):
    run = open_run(tmp_path / "run")
    other = open_run(tmp_path / "run" / "another")
    for one in (run, other):
        Checkpoints(one.folder / "arm" / CHECKPOINTS).save(1, {"w": torch.zeros(2)}, {})
    run.finish()
    assert not (run.folder / "arm" / CHECKPOINTS).exists() and read_run(run.folder)
    assert Checkpoints(other.folder / "arm" / CHECKPOINTS).steps() == [1]


def test_a_run_by_hand_keeps_them_because_its_cells_may_run_again(tmp_path):
    run = Run.open(tmp_path, "01_personalize", PARAMETERS, by_hand=True)
    Checkpoints(run.folder / CHECKPOINTS).save(1, {"w": torch.zeros(2)}, {})
    run.finish()
    assert Checkpoints(run.folder / CHECKPOINTS).steps() == [1]


def test_a_picture_is_written_and_noted(tmp_path):
    run = open_run(tmp_path / "run")
    picture = Image.effect_noise((5, 4), 50)
    with Image.open(run.write_picture("samples/0.png", picture)) as read:
        assert read.format == "PNG" and read.tobytes() == picture.tobytes()
    assert run.has("samples/0.png")


def test_one_checkpoint_alone_is_not_allowed(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "tensors.safetensors"),
        lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
        lambda folder: (folder / "tensors.safetensors").unlink(),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").write_text(
            json.dumps(json.loads((folder / "state.json").read_text()) | {"state": '{"step": 9}'})
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.full((4,), float(step))}, {"step": step})
    damage(tmp_path / "step-000002")
    with pytest.warns(UserWarning, match="checkpoint of step 2 .* is damaged .*; the one before it is used"):
        step, tensors, state = checkpoints.latest()
    assert (step, tensors["w"].tolist(), state) == (1, [1.0] * 4, {"step": 1})
    damage(tmp_path / "step-000001")
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert checkpoints.latest() is None
    assert [warning.message.args[0].split()[4] for warning in caught] == ["2", "1"]
    assert str(caught[1].message).endswith("; none is left, so training starts anew.")


def test_a_process_killed_from_outside_during_saves_leaves_a_readable_checkpoint(tmp_path):
    """The same as above without knowing the points: SIGKILL at some moment of a loop that only saves."""
    code = """
import sys, torch
from ibkit.runs import Checkpoints
for step in range(1, 100_000):
    Checkpoints(sys.argv[1]).save(step, {"w": torch.full((200_000,), float(step))}, {"step": step})
    print(step, flush=True)
"""
    process = start_python(code, tmp_path / "c")
    for _ in range(3):
        saved = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    saved = int(rest.split()[-1]) if rest.split() else saved
    step, tensors, state = Checkpoints(tmp_path / "c").latest()
    assert step in (saved, saved + 1) and state == {"step": step} and tensors["w"].unique().tolist() == [float(step)]
