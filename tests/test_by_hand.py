"""A notebook can be run again by hand: the same values go on, others set the old run aside, a cell may save again."""

import os
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from ibkit.errors import ArtifactError
from ibkit.params import make
from ibkit.runs import input_run, locks, newest_run, notebooks, open_run, project_root, read_manifest, read_run, writing


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """Runs of the test go below a folder of its own."""
    monkeypatch.setattr(notebooks, "OUTPUTS", str(tmp_path / "outputs"))
    yield tmp_path / "outputs"
    for run in list(writing._OPEN.values()):
        run._close()


def run_all(seed=0, kind="01_personalize", inputs=None, finish=True, **parameters):
    """What a notebook does, in short."""
    run = open_run(kind, make(kind, {"seed": seed} | parameters), inputs)
    run.write_text("weights", f"of seed {seed}")
    if finish:
        run.finish()
    return run


def test_run_all_twice_is_one_run(outputs, capsys):
    first = run_all()
    manifest = read_manifest(first.folder)
    assert run_all().folder == first.folder and len(list(outputs.iterdir())) == 1
    again = read_run(first.folder, "01_personalize")
    assert again.manifest["outputs"] == manifest["outputs"] and "edited_by_hand" not in again.manifest
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_goes_on(outputs):
    run_all(finish=False)
    run = open_run("01_personalize", make("01_personalize", {}))  # the first cell again, in the same kernel
    assert run.has("weights")
    run.finish()
    assert read_run(outputs / "notebook-01_personalize").path("weights").read_text() == "of seed 0"


def test_where_and_how_it_runs_is_no_other_value(outputs):
    run_all(device="cpu")
    run_all(device="auto")
    assert len(list(outputs.iterdir())) == 1


def test_other_values_set_the_old_run_aside_under_its_time(outputs, capsys):
    old = run_all(seed=0)
    started = read_manifest(old.folder)["started"]
    run_all(seed=3)
    aside = outputs / f"notebook-01_personalize-{started.partition('+')[0].replace(':', '-')}"
    assert read_run(aside).path("weights").read_text() == "of seed 0"
    assert read_run(outputs / "notebook-01_personalize").path("weights").read_text() == "of seed 3"
    said = capsys.readouterr().out
    assert said == f"other values (seed was 0 and is 3): the run that was here is now {aside.name}\n"
    run_all(seed=0)  # within the same second: its folder's name is taken
    names = {path.name for path in outputs.iterdir()}
    assert len(names) == 3 and all(read_run(outputs / name).manifest["status"] == "complete" for name in names)


def test_another_input_is_another_value(outputs, tmp_path, capsys):
    for text in ("one", "two"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / "a.txt").write_text(text)
        run_all(inputs={"photos": tmp_path / "photos"})
    assert "other values (photos was " in capsys.readouterr().out and len(list(outputs.iterdir())) == 2


def test_settings_of_the_method_count_but_not_those_of_memory(outputs):
    run_all(kind="02_rl_finetune", settings={"micro_batch": 4})
    run_all(kind="02_rl_finetune", settings={"micro_batch": 8})
    assert len(list(outputs.iterdir())) == 1
    run_all(kind="02_rl_finetune", settings={"micro_batch": 8, "n_epochs": 3})
    assert len(list(outputs.iterdir())) == 2


def test_in_a_batch_today_s_strictness_stays(outputs):
    place = str(outputs / "mine")
    run_all(run_out=place)
    with pytest.raises(ArtifactError, match="already has a run in it"):
        run_all(run_out=place)
    with pytest.raises(ArtifactError, match="seed was 0 and is 1; use the old ones"):
        run_all(seed=1, run_out=place, resume=True)
    run = run_all(run_out=place, resume=True)
    with pytest.raises(ArtifactError, match="is closed; open it again with resume=True"):
        run.write_text("weights", "more")


def test_saving_after_the_end_replaces_and_marks_the_run(outputs, capsys):
    run = run_all()
    run.write_table("curve.csv", pd.DataFrame({"x": [1]}))
    run.record(best=3)
    edited = read_run(run.folder)  # complete, and its hashes are true
    assert edited.manifest["edited_by_hand"] is True
    assert edited.table("curve.csv")["x"].tolist() == [1] and edited.metrics == {"best": 3}
    with pytest.raises(ArtifactError, match="weights/below"):
        run.write_text("weights/below", "a file")  # a cell that fails leaves the run complete
    input_run("01_personalize", str(run.folder))
    assert "was edited by hand after its end" in capsys.readouterr().out
    run.finish()  # the last cell again
    assert run_all().complete and read_manifest(run.folder)["edited_by_hand"] is True


def test_a_cell_that_failed_can_be_run_again(outputs):
    run = run_all(finish=False)
    run.fail("The learning rate is too large.")
    run.write_text("weights", "better")
    run.finish()
    done = read_run(run.folder)
    assert done.path("weights").read_text() == "better" and "edited_by_hand" not in done.manifest


def test_a_live_process_keeps_its_folder(outputs):
    code = f"""
from ibkit.params import make
from ibkit.runs import notebooks, open_run
notebooks.OUTPUTS = {str(outputs)!r}
run = open_run("01_personalize", make("01_personalize", {{}}))
print("open", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=project_root(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == "open\n"
        for seed in (0, 1):
            with pytest.raises(ArtifactError, match=f"is in use by process {process.pid}"):
                run_all(seed=seed)
        assert [path.name for path in outputs.iterdir()] == ["notebook-01_personalize"]
    finally:
        process.kill()
        process.wait()
    run_all()  # its lock is free again


def test_a_look_at_who_holds_a_folder_does_not_refuse_who_opens_it(outputs):
    look = locks._lock_of(run_all().folder)
    look.acquire()
    release = threading.Timer(0.1, look.release)
    release.start()
    run_all()
    release.join()


def test_an_empty_input_takes_the_newest_finished_run_and_says_which(outputs, capsys):
    with pytest.raises(ArtifactError, match="outputs is finished: run notebooks/01_personalize.ipynb to its last cell"):
        input_run("01_personalize")
    run_all(run_out=str(outputs / "job" / "01_personalize"))
    time.sleep(0.01)
    newest = run_all(seed=1)
    time.sleep(0.01)
    run_all(seed=2, run_out=str(outputs / "later"), finish=False)
    (outputs / "broken").mkdir()
    (outputs / "broken" / "manifest.json").write_text("{")
    assert input_run("01_personalize").folder == newest.folder
    assert "goes on from outputs/notebook-01_personalize, the newest run of 01_personalize" in capsys.readouterr().out
    os.utime(outputs / "job" / "01_personalize" / "manifest.json")
    assert newest_run("01_personalize").folder == outputs / "job" / "01_personalize"
    assert input_run("01_personalize", str(newest.folder)).folder == newest.folder
    assert capsys.readouterr().out == ""
    with pytest.raises(ArtifactError, match="is one of 01_personalize, and one of 02_rl_finetune is needed"):
        input_run("02_rl_finetune", str(newest.folder))


def test_the_package_imports_where_there_is_neither_fcntl_nor_resource():
    code = """
import importlib, pkgutil, sys
import psutil  # it has a use of its own for resource
sys.modules["fcntl"] = sys.modules["resource"] = None
import ibkit
for module in pkgutil.walk_packages(ibkit.__path__, "ibkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from ibkit.job.notebook import own_peak_gib
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=project_root(), text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-2000:]
