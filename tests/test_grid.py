"""A grid: its file is checked whole, its cells share what is the same, and it goes on where it stopped."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from ibkit import cli
from ibkit.errors import ArtifactError, ParameterError
from ibkit.job import grid
from ibkit.job import stage as one_stage
from ibkit.job.cells import lay_out, read_config
from ibkit.job.costs import PocketCosts
from ibkit.job.grid_costs import predicted
from ibkit.job.stages import make_stage
from ibkit.runs import Run, held_by, identify, read_run
from ibkit.runs.locks import FolderLock
from tests.test_main_job import FINISH, NOTE, notebook, places  # noqa: F401  (a fixture)

ROOT = Path(cli.__file__).parents[1]
SMALL = """
subjects: [cat, teddy bear]
tune: [ddpo, dpok]
seeds: [0, 1]
set: {ddpo.n_epochs: 3, ddpo.learning_rate: 1e-4, guard.patience: 5}
prompts: [dancing]
"""


def config(tmp_path, text=SMALL, name="small"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    return path


def laid_out(tmp_path, text=SMALL):
    return lay_out(read_config(config(tmp_path, text)), tmp_path / "outputs" / "small")


# ---------------------------------------------------------------------------------------------------- the file


def test_cells_share_personalizations_and_are_evaluated_apart(tmp_path):
    cells = laid_out(tmp_path)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 2 * 2 * (1 + 2 * 2)
    by_name = {cell.name: cell for cell in cells}
    tuned = by_name["teddy-bear/02_rl_finetune-seed1-dpok"]
    assert tuned.needs == ("teddy-bear/01_personalize-seed1",)
    evaluated = by_name["teddy-bear/03_evaluate-seed1-dpok"]
    assert evaluated.needs == (*tuned.needs, tuned.name)
    assert [Path(run).name for run in evaluated.stage.parameters["runs"]] == [n.split("/")[1] for n in evaluated.needs]
    assert by_name["cat/02_rl_finetune-seed0-ddpo"].stage.parameters["settings"] == {
        "n_epochs": 3, "learning_rate": 1e-4,  # which YAML reads as a text
    }  # fmt: skip
    assert tuned.stage.parameters["settings"] == {} and tuned.stage.parameters["guard"] == {"patience": 5}
    place = {name: i for i, name in enumerate(names)}
    assert all(place[need] < place[cell.name] for cell in cells for need in cell.needs)


def test_without_tuning_each_personalization_is_evaluated(tmp_path):
    cells = laid_out(tmp_path, "subjects: [cat]\npersonalize: [lora_dreambooth, neti]\ntune: none\n")
    assert [cell.name for cell in cells] == [
        "cat/01_personalize-lora_dreambooth", "cat/03_evaluate-lora_dreambooth",
        "cat/01_personalize-neti", "cat/03_evaluate-neti",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("subjects: [cat]\nsedes: [0]", "there is no 'sedes'; did you mean 'seeds'?"),
        ("subjects: [cat]\nset: {ddpo.n_epoch: 3}", "Subject cat: .*did you mean 'n_epochs'"),
        ("subjects: [cat]\ntune: [ddpoo]", "did you mean 'ddpo'"),
        ("subjects: [cat]\nparameters: {03_evaluate.n_image: 3}", "did you mean 'n_images'"),
        ("subjects: [cat]\nseeds: [zero]", "seeds has 'zero' and needs a whole number"),
        ("subjects: [cat]\nseeds: [0, 0]", "--seeds names something twice"),
        ("subjects: [cat]\nprompts: [no]", "prompts has False and needs a text: write it in quotes"),
        ("subjects: [cat]\nseeds: [0]\nseeds: [1]", "line .*: 'seeds' is named twice"),
        ("subjects: [cat, cat]", "stands for two subjects"),
        ("subjects: [{class_nuon: cat}]", "subject 1: there is no 'class_nuon'; did you mean 'class_noun'"),
        ("subjects: [{subject: nowhere, class_noun: cat}]", "There is no folder of photos"),
        ("subjects: 3", "must be a list of class nouns"),
        ("subjects: [cat]\nset: 3", "set must be a table"),
        ("subjects: [cat]\nname: a/b", "must be made of letters"),
        ("- cat", "no table of names and values"),
        ("subjects: [cat", "cannot be read as a grid's configuration"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(tmp_path, text, told):
    with pytest.raises((ParameterError, ArtifactError), match=told):
        laid_out(tmp_path, text)


def test_paths_are_seen_from_the_file(tmp_path):
    (tmp_path / "my_dog").mkdir()
    (cell, *_) = laid_out(tmp_path, "subjects: [{subject: my_dog, class_noun: dog, name: rex}]")
    assert cell.name == "rex/01_personalize"
    assert cell.stage.parameters["subject"] == str(tmp_path / "my_dog")


def test_the_command_of_a_cell_is_the_cell(tmp_path):
    """What `ibkit stage` makes of the words is the stage again, also with prompts that need quoting."""
    for cell in laid_out(tmp_path, SMALL.replace("[dancing]", """["dancing, it's fun", 'a "b" $HOME']""")):
        parser = argparse.ArgumentParser()
        one_stage.add_arguments(parser)
        arguments = parser.parse_args(grid.stage_command(cell.stage)[4:])
        values = one_stage.given(arguments) | {"run_out": arguments.out, "resume": True}
        again = make_stage(cell.stage.name, arguments.notebook, values)
        assert again.parameters | {"run_out": ""} == cell.stage.parameters | {"run_out": ""}
        assert again.folder == cell.stage.folder


# ---------------------------------------------------------------------------------------------------- what is there


def finish(cell, **other):
    run = Run.open(cell.stage.folder, cell.stage.notebook.stem, cell.stage.parameters | other)
    run.finish()
    return run


def test_only_what_is_missing_is_to_do(tmp_path):
    folder = tmp_path / "outputs" / "small"
    cells = laid_out(tmp_path)
    assert grid.missing(cells, folder) == cells
    finish(cells[0])
    Run.open(cells[5].stage.folder, cells[5].stage.notebook.stem, cells[5].stage.parameters).fail("for the test")
    assert grid.missing(cells, folder) == cells[1:]
    made = grid.target(cells[0], folder)
    assert made.read_bytes() == (cells[0].stage.folder / "manifest.json").read_bytes()
    # A target without its run says nothing.
    shutil.rmtree(cells[0].stage.folder)
    assert grid.missing(cells, folder) == cells and not made.exists()


def test_finished_cells_of_other_values_are_refused(tmp_path):
    cells = laid_out(tmp_path)
    finish(cells[0])
    folder = tmp_path / "outputs" / "small"
    assert grid.missing(laid_out(tmp_path, SMALL + "device: cpu\n"), folder)  # says how, not what
    other = laid_out(tmp_path, SMALL.replace("set: {", "set: {lora_dreambooth.n_steps: 7, "))
    with pytest.raises(
        ArtifactError, match="01_personalize-seed0: settings was {} and is {'n_steps': 7}.*another name"
    ):
        grid.missing(other, folder)


def test_costs_count_what_is_shared_once(tmp_path):
    cost = PocketCosts(
        forward=1.0, tuned=0, trained=0, picture=0, start=0, flop=1, how="one second a row", resident=0, weights=2**20,
        tuned_row_bytes=0, trained_row_bytes=0,
    )  # fmt: skip
    cells = laid_out(tmp_path, "subjects: [cat]\ntune: [ddpo, dpok]\nprompts: [dancing]\n")
    first, second = (cell for cell in cells if cell.stage.notebook.stem == "03_evaluate")
    all_of_it = predicted(cells, cells, cost)
    saved = all_of_it.seconds[first.name] - all_of_it.seconds[second.name]
    # Base model, personalization with and without identifier are there for the second: 3 of 5 sets.
    fixed = all_of_it.seconds[first.name] - saved * 5 / 3
    assert all_of_it.seconds[second.name] == pytest.approx(fixed + saved * 2 / 3)
    assert "pictures of 4 models in 2 evaluations (2 sets" in all_of_it.shared
    two_seeds = laid_out(
        tmp_path, "subjects: [cat]\ntune: none\nseeds: [0, 1]\npersonalize: [dreambooth, lora_dreambooth]"
    )
    seconds = predicted(two_seeds, two_seeds, cost).seconds
    # Of one seed the class pictures of both methods are the same.
    assert seconds["cat/01_personalize-lora_dreambooth-seed0"] < seconds["cat/01_personalize-dreambooth-seed0"]


# ---------------------------------------------------------------------------------------------------- one stage


def test_each_stage_gets_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(one_stage, "resolve", lambda path: tmp_path / path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(one_stage, "LOOK_S", 0.01)
    taken = FolderLock(tmp_path / "outputs/.gpus/0")
    with one_stage.one_of(["0", "1"]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        with pytest.raises(ArtifactError, match="in use"):
            FolderLock(tmp_path / "outputs/.gpus/1")
    taken.release()
    with one_stage.one_of(["0", "1"]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with one_stage.one_of([]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_a_process_ends_with_its_parent(tmp_path):
    child = "from ibkit.job.stage import end_with_parent; import time; end_with_parent(); print('on', flush=True)\n"
    child += f"try: time.sleep(60)\nexcept KeyboardInterrupt: open({str(tmp_path / 'told')!r}, 'w')"
    parent = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # as under nohup
    parent += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while not (tmp_path / "told").exists():
        assert time.monotonic() < until, "the child works on without its parent"
        time.sleep(0.05)


def test_options_that_contradict_each_other(tmp_path):
    path = str(config(tmp_path))
    for words in (["--gpus", "0,1", "--workers", "2"], ["--workers", "0"]):
        assert cli.main(["grid", path, *words]) == 2
    with pytest.raises(ParameterError, match="name slurm"):
        grid._snakemake(tmp_path, 1, "slrum", [])


# ---------------------------------------------------------------------------------------------------- the whole

GRID = """
import sys
from pathlib import Path
from ibkit import cli
from ibkit.job import grid, stages
place = Path(sys.argv[1])
stages.NOTEBOOKS, grid.OUTPUTS = place / "notebooks", place / sys.argv[2]
grid.require_cells_ready, grid.print_plan = lambda cells: None, lambda *words: 0
whole = grid.stage_command
grid.stage_command = lambda stage: [sys.executable, str(place / "stage.py"), str(place), *whole(stage)[3:]]
sys.exit(cli.main(["grid", *sys.argv[3:]]))
"""
STAGE = """
import sys
from pathlib import Path
from ibkit import cli
from ibkit.job import stages
stages.NOTEBOOKS = Path(sys.argv[1]) / "notebooks"
sys.exit(cli.main(sys.argv[2:]))
"""
TUNE = """
import time
from functools import partial
from pathlib import Path
place = Path({place!r})
if parameters.seed == 1 and (place / "fail").exists():
    raise ValueError("boom")
while parameters.seed == 1 and (place / "wait").exists():
    (place / "waiting").touch()
    time.sleep(0.1)
"""


def start_grid(places, path, outputs, *words):  # noqa: F811
    """`ibkit grid` in a process of its own, on a test's notebooks and outputs."""
    (places / "grid.py").write_text(GRID)
    (places / "stage.py").write_text(STAGE)
    command = [sys.executable, places / "grid.py", places, outputs, path, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_grid_goes_on_after_a_failing_cell_and_after_sigkill(places):  # noqa: F811
    pytest.importorskip("snakemake", reason="needs Snakemake: pip install -e '.[workflow]'")
    notebook(places / "notebooks", "02_rl_finetune", TUNE.format(place=str(places)), NOTE, FINISH)
    path = config(places, "subjects: [cat]\ntune: [ddpo]\nseeds: [0, 1]\n", "both")
    start = partial(start_grid, places, path)

    (places / "fail").touch()
    process = start("outputs")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 1, err
    assert "failed: cat/02_rl_finetune-seed1: 02_rl_finetune-seed1: ValueError: boom" in err
    assert "1 cells failed, 1 need them" in err
    folder = places / "outputs" / "both"
    assert read_run(folder / "cat/03_evaluate-seed0").folder.is_dir()  # the rest went on
    assert "Not finished, and left out:" in (folder / "report.html").read_text()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("cat/*/manifest.json") if "seed0" in str(path)}
    assert len(done) == 3

    (places / "fail").unlink()
    (places / "wait").touch()
    process = start("outputs")
    until = time.monotonic() + 3600
    while not (places / "waiting").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while held_by(folder / "cat/02_rl_finetune-seed1"):
        assert time.monotonic() < until, "a stage works on without its grid"
        time.sleep(0.1)

    (places / "wait").unlink()
    process = start("outputs")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        "[1/2] cat/02_rl_finetune-seed1", "[2/2] cat/03_evaluate-seed1",
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in done} == done
    process = start("outputs")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0 and "[" not in out, err

    undisturbed = start("others")
    out, err = undisturbed.communicate(timeout=3600)
    assert undisturbed.returncode == 0, err
    names = sorted(path.parent.name for path in folder.glob("cat/*/manifest.json"))
    assert len(names) == 6
    for name in names:
        one, other = (identify(places / outputs / "both/cat" / name)["sha256"] for outputs in ("outputs", "others"))
        assert one == other, name


@pytest.mark.slow
def test_a_grid_on_slurm(places):  # noqa: F811
    """By the shipped profile, less what a small cluster lacks; the cells are jobs of a real Slurm."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs snakemake-executor-plugin-slurm")
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("there is no Slurm here: it needs slurmctld and slurmd")
    profile = yaml.safe_load((grid.WORKFLOW / "profiles/slurm/config.yaml").read_text())
    del profile["set-resources"]  # GPUs
    profile["default-resources"] |= {"mem_mb": 1000, "cpus_per_task": 1, "runtime": 20}
    (places / "profile").mkdir()
    (places / "profile/config.yaml").write_text(yaml.safe_dump(profile | {"slurm-status-command": "squeue"}))
    path = config(places, "subjects: [cat]\ntune: none\n", "slurm")
    process = start_grid(places, path, "outputs", "--profile", f"{places / 'profile'}/")
    out, err = process.communicate(timeout=3600)
    folder = places / "outputs/slurm"
    assert process.returncode == 0, err + (folder / "logs/snakemake.txt").read_text()
    assert "[2/2] cat/03_evaluate" in out
    assert "SLURM jobid" in (folder / "logs/snakemake.txt").read_text()
    assert read_run(folder / "cat/03_evaluate").parameters["runs"] == [str(folder / "cat/01_personalize")]
