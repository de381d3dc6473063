"""The main job: stages in order through papermill itself, on tiny notebooks; refusals, failures, and going on."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ibkit import cli, runs
from ibkit.errors import ArtifactError, ParameterError
from ibkit.job import notebook as execution
from ibkit.job import run as main_job
from ibkit.job import stages as job_stages
from ibkit.job.notebook import StageFailed, execute, is_done
from ibkit.job.stages import JOB, SHARED, WIRED, Stage, defaults, given, plan
from ibkit.methods.records import METHODS
from ibkit.params import schema
from ibkit.progress import Progress, duration
from ibkit.runs import Run, read_run, writing
from tests.test_report import score_table

ROOT = Path(main_job.__file__).parent.parent

OPEN = """
from ibkit.params import collect
from ibkit.runs import open_run
parameters = collect("{kind}", globals())
inputs = {{"run_in": parameters.run_in}} if getattr(parameters, "run_in", "") else {{}}
inputs |= {{f"run{{i}}": folder for i, folder in enumerate(getattr(parameters, "runs", []))}}
run = open_run("{kind}", parameters, inputs)
print("opened " + "{kind}")
"""
FINISH = "run.finish()"
NOTE = "run.write_text('seed.txt', str(parameters.seed))"


def notebook(folder: Path, kind: str, *cells: str) -> Path:
    """Write a notebook with the parameters cell that the real one has, which opens its run, then does `cells`."""
    literals = "\n".join(f"{row.name} = {row.default!r}  # {row.help}" for row in schema(kind))
    sources = [literals, OPEN.format(kind=kind), *cells]
    written = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    written.cells[0].metadata["tags"] = ["parameters"]
    folder.mkdir(exist_ok=True)
    nbformat.write(written, folder / f"{kind}.ipynb")
    return folder / f"{kind}.ipynb"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Notebooks and outputs of a test's own; the notebooks all succeed, and the last one scores."""
    monkeypatch.setattr(job_stages, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(main_job, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setenv("JUPYTER_PATH", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    score_table(4).to_csv(tmp_path / "scores.csv", index=False)
    copy = f"run.write_text('scores.csv', open({str(tmp_path / 'scores.csv')!r}).read())"
    for kind in JOB:
        notebook(tmp_path / "notebooks", kind, copy if kind == "03_evaluate" else NOTE, FINISH)
    yield tmp_path
    for run in list(writing._OPEN.values()):
        run._close()


@pytest.fixture
def without_evaluation(places, monkeypatch):
    """A job of the first two notebooks without a report, to save the time of a kernel."""
    whole = main_job.plan
    monkeypatch.setattr(main_job, "plan", lambda *words: whole(*words)[:2])
    monkeypatch.setattr(main_job, "_report", lambda stages, run: None)


def job(*words: str) -> int:
    return cli.main(["run", *words])


def stage_of(places: Path, *cells: str, kind: str = "01_personalize", resume: bool = False) -> Stage:
    """A stage whose notebook does `cells`."""
    notebook(places / "notebooks", kind, *cells)
    return next(s for s in plan(defaults(), places / "outputs" / "job", resume) if s.notebook.stem == kind)


def open_job(places: Path, resume: bool = False) -> Run:
    return Run.open(places / "outputs" / "job", "run", {}, resume=resume)


def text_of(folder: Path) -> str:
    """All that an executed notebook kept of what was printed and raised."""
    return folder.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- the whole job


def test_the_job_runs_every_notebook_in_order_and_reports(places, capsys):
    status = job("--name", "two", "--tune-seeds", "3", "7", "--class-noun", "dog", "--set", "ddpo.n_epochs=2")
    out, err = capsys.readouterr()
    assert status == 0, err
    folder = places / "outputs" / "two"
    starts = [line for line in out.splitlines() if line.startswith("[")]
    names = ["01_personalize", "02_rl_finetune-tune3", "02_rl_finetune-tune7", "03_evaluate"]
    assert starts[0] == "[1/4] 01_personalize: one subject from a few photos"
    assert [line.split()[1] for line in starts[::2]] == [f"{name}:" for name in names]
    assert "      opened 02_rl_finetune" in out.splitlines()  # what a notebook prints, indented
    assert re.search("^C1  (supported|undecided) ", out, re.M)
    assert f"open {folder / 'report.html'}" in out and (folder / "report.html").is_file()

    tuned = read_run(folder / "02_rl_finetune-tune7", "02_rl_finetune")
    assert tuned.parameters["seed"] == 7 and tuned.parameters["settings"] == {"n_epochs": 2}
    assert tuned.parameters["run_in"] == str(folder / "01_personalize")
    assert tuned.path("seed.txt").read_text() == "7"
    assert read_run(folder / "01_personalize").parameters["class_noun"] == "dog"
    evaluation = read_run(folder / "03_evaluate").parameters
    assert evaluation["runs"] == [str(folder / name) for name in names[:3]]

    whole = read_run(folder, "run")
    assert set(whole.outputs) == {*(f"{name}.ipynb" for name in names), "report.html"}
    assert whole.parameters["tune_seeds"] == [3, 7] and whole.parameters["01_personalize.class_noun"] == "dog"
    used = whole.metrics["stages"]
    assert set(used) == set(names) and all(stage["seconds"] > 0 and stage["peak_gib"] > 0.02 for stage in used.values())
    table = out[out.index("stage ") :].splitlines()
    assert [line.split()[0] for line in table[1:6]] == [*names, "all"]

    # A second start is refused; going on with it finds nothing to do; other settings are refused.
    assert job("--name", "two") == 2
    assert "already has a run in it" in capsys.readouterr().err
    assert job("--resume") == 0  # the newest
    assert capsys.readouterr().out.count("already done") == 4
    assert job("--resume", "--name", "two", "--class-noun", "cat") == 2
    err = capsys.readouterr().err
    assert "01_personalize.class_noun was 'dog' and is 'cat'" in err and err.count("\n") == 1

    # A renamed job is the same job: the finished is not done again, and the unfinished is gone on with.
    folder.rename(places / "outputs" / "renamed")
    tuned = Run.open(
        places / "outputs" / "renamed" / "02_rl_finetune-tune7", "02_rl_finetune", tuned.parameters,
        {"run_in": places / "outputs" / "renamed" / "01_personalize"}, resume=True,
    )  # fmt: skip
    tuned.fail("killed")
    assert job("--resume", "--name", "renamed") == 0
    out = capsys.readouterr().out
    assert out.count("already done") == 3 and "02_rl_finetune-tune7: done" in out


def test_a_killed_job_goes_on(places, without_evaluation, capsys):
    """SIGKILL in the middle of the second notebook: its kernel ends by itself, the first is not run again."""
    wait = "import time\nif not parameters.resume:\n    print('in the middle', flush=True)\n    time.sleep(300)"
    notebook(places / "notebooks", "02_rl_finetune", NOTE, wait, "print('went on')", FINISH)
    process, seen = start_job(places, "--name", "job")
    follow(process, seen, "in the middle")
    assert job("--resume", "--name", "job") == 2
    assert f"in use by process {process.pid}" in capsys.readouterr().err

    process.kill()
    process.wait()
    assert job("--resume") == 0
    out = capsys.readouterr().out
    assert "[1/2] 01_personalize: already done" in out and "      went on" in out
    assert not list((places / "outputs" / "job").glob(".*.ipynb"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_the_kernel(places, number):
    wait = "import os, time\nprint('kernel', os.getpid(), flush=True)\ntime.sleep(300)"
    notebook(places / "notebooks", "01_personalize", NOTE, wait, FINISH)
    process, seen = start_job(places, "--name", "job")
    kernel = int(follow(process, seen, "kernel").split()[-1])
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.strip() == "interrupted; go on with:  ibkit run --resume --name job"
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    with pytest.raises(ArtifactError, match="failed: It was interrupted"):
        read_run(places / "outputs" / "job")
    assert runs.held_by(places / "outputs" / "job" / "01_personalize") == ""
    assert "kernel" in text_of(places / "outputs" / "job" / "01_personalize.ipynb")


def start_job(places: Path, *words: str) -> tuple[subprocess.Popen, list[str]]:
    code = f"""
import sys
from pathlib import Path
from ibkit import cli
from ibkit.job import run as main_job, stages
stages.NOTEBOOKS, main_job.OUTPUTS = Path({str(places / "notebooks")!r}), Path({str(places / "outputs")!r})
sys.exit(cli.main(["run", *{words!r}]))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit it ignored
    )  # fmt: skip
    return process, []


def follow(process: subprocess.Popen, seen: list[str], word: str) -> str:
    """Read a process's lines until one has the word in it; returns that one."""
    for line in process.stdout:
        seen.append(line)
        if word in line:
            return line.strip()
    raise AssertionError("".join(seen) + process.stderr.read())


# ---------------------------------------------------------------------------------------------------- failures


def test_an_error_of_the_kit_is_told_in_its_own_words_and_is_gone_on_from(places, without_evaluation, capsys):
    sentence = "The photo cat.jpg is {9 px} wide; take a larger one."
    broken = f"from ibkit.errors import PhotoError\nraise PhotoError({sentence!r})"
    good = (places / "notebooks" / "02_rl_finetune.ipynb").read_text()
    notebook(places / "notebooks", "02_rl_finetune", broken)
    assert job("--name", "job", "--seed", "5") == 2
    err = capsys.readouterr().err
    assert err == f"error: 02_rl_finetune: {sentence}\ngo on with:  ibkit run --resume --name job\n"
    folder = places / "outputs" / "job"
    assert "PhotoError" in text_of(folder / "02_rl_finetune.ipynb")
    with pytest.raises(ArtifactError, match="failed: 02_rl_finetune: The photo"):
        read_run(folder)
    first = (folder / "01_personalize" / "manifest.json").read_bytes()

    (places / "notebooks" / "02_rl_finetune.ipynb").write_text(good)
    assert job("--resume") == 0
    assert "01_personalize: already done" in capsys.readouterr().out
    assert (folder / "01_personalize" / "manifest.json").read_bytes() == first
    assert read_run(folder / "02_rl_finetune").parameters["seed"] == 5


def test_another_error_names_its_last_line_and_the_notebook(places):
    stage = stage_of(places, "print('half', end='')", "1 / 0")
    with pytest.raises(StageFailed) as failure:
        execute([stage], open_job(places))
    kept = places / "outputs" / "job" / "01_personalize.ipynb"
    assert str(failure.value) == f"01_personalize: ZeroDivisionError: division by zero (see {kept})"
    assert failure.value.status == 1
    assert "ZeroDivisionError" in text_of(kept)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("import sys; sys.exit(0)", "01_personalize ended without finishing its run"),
        ("import os; os._exit(9)", "01_personalize: its process was killed or crashed"),
    ],
    ids=["unfinished", "dead"],
)
def test_only_a_finished_run_is_a_success(places, cell, words):
    stage = stage_of(places, cell)
    with pytest.raises(StageFailed, match=words) as failure:
        execute([stage], open_job(places))
    assert failure.value.status == 1 and not is_done(stage)


def test_a_stage_is_done_only_with_the_same_parameters_inputs_and_files(places):
    first, stage, _ = plan(defaults(), places / "outputs" / "job")
    assert not is_done(stage)
    made = Run.open(first.folder, "01_personalize", first.parameters)
    made.write_text("weights", "1")
    made.finish()
    run = Run.open(stage.folder, "02_rl_finetune", stage.parameters, inputs={"run_in": first.folder})
    run.write_text("lora", "x")
    assert not is_done(stage)
    run.finish()
    assert is_done(stage)
    assert is_done(Stage(stage.name, stage.notebook, "", stage.parameters | {"resume": True}))
    assert not is_done(Stage(stage.name, stage.notebook, "", stage.parameters | {"sample_every": 9}))
    (stage.folder / "lora").write_text("y")
    assert not is_done(stage)
    (stage.folder / "lora").write_text("x")
    assert is_done(stage)
    remade = Run.open(first.folder, "01_personalize", first.parameters, resume=True)
    remade.write_text("weights", "2")
    remade.finish()
    assert not is_done(stage)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "03_evaluate.n_image=3"], "no parameter 'n_image'; did you mean 'n_images'?"),
        (["-p", "03_evaluat.n_images=3"], "There is no notebook '03_evaluat'; did you mean '03_evaluate'?"),
        (["-p", "03_evaluate.n_images=many"], "'n_images' must be a whole number from 0 to 100000, not 'many'"),
        (["-p", "n_images=3"], "not of the form NOTEBOOK.PARAMETER=VALUE"),
        (["--set", "ddpo.n_epoch=3"], "Method ddpo has no setting 'n_epoch'; did you mean 'n_epochs'?"),
        (["--set", "ddpo.n_epochs=many"], "setting 'n_epochs' must be a whole number from 1 to 1000000, not 'many'"),
        (["--set", "n_epochs=3"], "not of the form METHOD.NAME=VALUE"),
        (["--set", "dpo.n_epochs=3"], "--set names dpo, and this run has lora_dreambooth, ddpo: choose methods by"),
        (["--set", "guard.patient=3"], "The guard has no setting 'patient'; did you mean 'patience'?"),
        (["--reward", "harmonic", "--set", "reward.wieght=1"], "Scorer harmonic has no setting 'wieght'; did you mean"),
        (["--set", "reward.weight=1"], "Scorer image_reward has no setting 'weight'"),
        (["--set", "subject_reward.weight=1"], "There are subject_reward_options and no subject_reward"),
        (["-p", "02_rl_finetune.reward_options={}"], "sets reward_options of 02_rl_finetune itself; use --set reward."),
        (["--personalize", "dreambouth"], "There is no method 'dreambouth'; did you mean 'dreambooth'?"),
        (["--tune", "dreambooth"], "dreambooth is a method to personalize: to tune, choose one of ddpo"),
        (["-p", "02_rl_finetune.method=ddpo"], "the main job sets method of 02_rl_finetune itself; use --tune"),
        (["-p", "00_start_here.seed=3"], "00_start_here is not part of the main job"),
        (["-p", "02_rl_finetune.seed=3"], "use --tune-seeds"),
        (["-p", "03_evaluate.runs=['x']"], "the main job sets runs of 03_evaluate itself"),
        (["--subject-reward", "dinno"], "There is no reward 'dinno'; did you mean 'dino'?"),
        (["--set", "ddpo.combine=product"], "'combine' must be one of 'synergy', 'sum', 'harmonic', not 'product'"),
        (["--seed", "-1"], "'seed' must be a whole number from 0"),
        (["--tune-seeds", "1", "1"], "--tune-seeds names something twice"),
        (["--prompts", " "], "'prompts' must be a list of texts that are not empty"),
        (["--subject", "/nowhere/photos"], "There is no folder of photos /nowhere/photos"),
        (["--lora", "/nowhere/style.safetensors"], "There is no file /nowhere/style.safetensors; check --lora."),
        (["--name", "../x"], "--name '../x' must be made of letters"),
        (["--resume"], "to go on with; start one without --resume"),
        (["--resume", "--name", "x"], "to go on with; start it without --resume"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(places, capsys, words, message):
    assert job(*words) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (places / "outputs").exists()


def test_a_missing_notebook_is_refused(places, capsys):
    (places / "notebooks" / "03_evaluate.ipynb").unlink()
    assert job() == 2
    assert "There is no notebook" in capsys.readouterr().err and not (places / "outputs").exists()


def test_a_notebooks_own_run_is_not_a_job_to_go_on_with(places, capsys):
    Run.open(places / "outputs" / "notebook-01", "01_personalize", {}).finish()
    assert job("--resume", "--name", "notebook-01") == 2
    assert "not of `ibkit run`" in capsys.readouterr().err
    assert job("--resume") == 2
    assert "There is no run in" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- settings


def parsed(*words: str) -> dict:
    parser = main_job.ArgumentParser()
    main_job.add_arguments(parser)
    return given(parser.parse_args(words))


def test_options_go_to_every_notebook_that_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed() == {}
    assert parsed("--device", "cpu") == {f"{notebook}.device": "cpu" for notebook in JOB}
    assert parsed("--prompts", "riding a bike", "cooking") == {
        f"{notebook}.prompts": ["riding a bike", "cooking"] for notebook in ("02_rl_finetune", "03_evaluate")
    }
    assert parsed("--seed", "3") == {"seeds": [3], "03_evaluate.seed": 3}
    assert parsed("--subject-reward", "dino", "--clip-at-level", "--no-clip-subject-at-level") == {
        "02_rl_finetune.subject_reward": "dino",
        "02_rl_finetune.clip_at_level": True,
        "02_rl_finetune.clip_subject_at_level": False,
    }
    assert parsed("--n-inference-steps", "2", "--guidance", "1", "--eta", "0") == {
        f"{notebook}.{name}": value
        for notebook in ("01_personalize", "03_evaluate")
        for name, value in (("n_inference_steps", 2), ("guidance", 1.0), ("eta", 0.0))
    }
    (tmp_path / "photos").mkdir()
    assert parsed("--subject", "photos") == {"01_personalize.subject": str(tmp_path / "photos")}
    assert parsed("--lora", "style.safetensors") == {"01_personalize.lora": str(tmp_path / "style.safetensors")}
    assert parsed("--subject", "") == {"01_personalize.subject": ""}
    assert parsed("--model", "photos")["01_personalize.model"] == str(tmp_path / "photos")
    (tmp_path / "one.safetensors").touch()
    assert parsed("--model", "one.safetensors")["03_evaluate.model"] == str(tmp_path / "one.safetensors")
    assert parsed("--model", "pocket")["01_personalize.model"] == "pocket"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("02_rl_finetune.use_class_prompts=False", False),
        ("02_rl_finetune.use_class_prompts=false", False),
        ("02_rl_finetune.reward=3", "3"),
        ("03_evaluate.n_images=0", 0),
        ("03_evaluate.n_images=-1", -1),
        ("03_evaluate.prompts=['a=b', 'c']", ["a=b", "c"]),
        ("01_personalize.description=red = best", "red = best"),
    ],
)
def test_a_value_of_the_command_line_has_its_parameters_type(text, value):
    assert parsed("-p", text) == {text.partition("=")[0]: value}


def test_p_wins_over_an_option_and_one_seed_needs_no_suffix(places):
    settings = defaults() | parsed("--seed", "1", "--tune-seeds", "4", "-p", "03_evaluate.seed=2")
    stages = plan(settings, places / "outputs" / "job")
    assert [(stage.name, stage.parameters["seed"]) for stage in stages] == [
        ("01_personalize", 1), ("02_rl_finetune", 4), ("03_evaluate", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "place, expected",
    [
        ({}, {}),
        ({"WORLD_SIZE": "1", "RANK": "0"}, {}),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}, {"02_rl_finetune.processes": 4}),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "4"}, None),
    ],
)
def test_the_first_launched_process_does_the_job_with_as_many(monkeypatch, place, expected):
    for name in main_job.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert main_job._launched() == expected
    left = {name for name in os.environ if name in main_job.LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_")}
    assert not left  # or every kernel would wait for the others


def test_processes_on_several_machines_are_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8"), ("RANK", "8")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ParameterError, match="16 processes were launched on several machines"):
        main_job._launched()


def test_every_notebook_of_the_job_has_what_the_job_sets():
    known = {f"{notebook}.{row.name}" for notebook in JOB for row in schema(notebook)}
    assert WIRED.keys() <= known
    assert all(any(f"{notebook}.{name}" in known for notebook in JOB) for name in SHARED)


def chains(places, *words):
    """Name, method, seed and the run it goes on from, of each stage but the evaluation."""
    stages = plan(defaults() | parsed(*words), places / "outputs" / "job")[:-1]
    return [
        (s.name, s.parameters["method"], s.parameters["seed"], Path(s.parameters.get("run_in", "")).name)
        for s in stages
    ]


def test_a_tuning_without_a_seed_takes_that_of_what_it_tunes(places):
    assert chains(places, "--seed", "6") == [
        ("01_personalize", "lora_dreambooth", 6, ""),
        ("02_rl_finetune", "ddpo", 6, "01_personalize"),
    ]
    assert [c[0] for c in chains(places, "--tune", "none")] == ["01_personalize"]
    assert chains(places, "--model", "sd15")[0][1] == "dreambooth"  # each preset has its own


def test_settings_go_to_the_method_that_they_name(places):
    words = ("--personalize", "lora_dreambooth", "--set", "lora_dreambooth.lora_rank=2", "--set", "guard.patience=3")
    first, second, _ = plan(defaults() | parsed(*words, "--set", "ddpo.sampler.n_steps=5"), places / "outputs" / "job")
    assert first.parameters["method"] == "lora_dreambooth" and first.parameters["settings"] == {"lora_rank": 2}
    assert second.parameters["settings"] == {"sampler.n_steps": 5} and second.parameters["guard"] == {"patience": 3}
    words = ("--reward", "harmonic", "--set", "reward.weight=0.3")
    _, second, _ = plan(defaults() | parsed(*words), places / "outputs" / "job")
    assert second.parameters["reward"] == "harmonic" and second.parameters["reward_options"] == {"weight": 0.3}


# ---------------------------------------------------------------------------------------------------- one stage


def test_a_stage_is_done_once_and_gone_on_with(places, capsys):
    out = places / "grid" / "cat-0"
    words = ["stage", "01_personalize", "--out", str(out), "-p", "seed=3", "-p", "class_noun=dog", "--set", "n_steps=2"]
    notebook(places / "notebooks", "01_personalize", NOTE, "if not parameters.resume: raise ValueError", "1 / 0")
    assert cli.main(words) == 1
    assert "ZeroDivisionError" in (told := capsys.readouterr().err) and "go on with the same command" in told
    notebook(places / "notebooks", "01_personalize", NOTE, FINISH)
    assert cli.main(words) == 0
    assert "cat-0: done in" in capsys.readouterr().out
    made = read_run(out, "01_personalize")
    assert (made.parameters["seed"], made.parameters["class_noun"]) == (3, "dog")
    assert made.parameters["settings"] == {"n_steps": 2} and (out.parent / "cat-0.ipynb").is_file()
    assert cli.main(words) == 0 and "already done" in capsys.readouterr().out
    assert cli.main([*words, "-p", "seed=4"]) == 2
    assert "seed was 3 and is 4" in capsys.readouterr().err


def test_a_stage_that_took_the_newest_run_is_done_whatever_is_newest_by_now(places):
    runs = [places / "outputs" / name for name in ("older", "newer")]
    for seed, folder in enumerate(runs):
        run = Run.open(folder, "01_personalize", {"seed": seed})
        run.write_text("seed.txt", str(seed))
        run.finish()
    out = places / "outputs" / "tuned"
    stage = job_stages.make_stage("tuned", "02_rl_finetune", {"run_out": str(out), "settings": {"n_epochs": 2}})
    Run.open(out, "02_rl_finetune", stage.parameters, {"run_in": runs[0]}).finish()

    def done(**values):
        return is_done(dataclasses.replace(stage, parameters=stage.parameters | values))

    assert done() and done(run_in=str(runs[0])) and not done(run_in=str(runs[1])) and not done(seed=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["01_personalise"], "There is no notebook '01_personalise'; did you mean '01_personalize'?"),
        (["01_personalize", "-p", "sed=1"], "no parameter 'sed'; did you mean 'seed'?"),
        (["01_personalize", "-p", "seed"], "-p 'seed' is not of the form PARAMETER=VALUE"),
        (["01_personalize", "-p", "run_out=x"], "run_out is set by the command: use --out"),
        (["01_personalize", "-p", "settings={}"], "settings is set by the command: use --set"),
        (["01_personalize", "--set", "n_step=1"], "lora_dreambooth has no setting 'n_step'; did you mean 'n_steps'?"),
        (["02_rl_finetune", "--set", "guard.patient=1"], "The guard has no setting 'patient'"),
        (["02_rl_finetune", "--set", "reward.weight=1"], "Scorer image_reward has no setting 'weight'"),
        (["00_start_here", "--set", "n_steps=1"], "Notebook 00_start_here has no parameter 'settings'"),
    ],
)
def test_a_stage_refuses_bad_input_before_anything_is_made(places, capsys, words, message):
    assert cli.main(["stage", *words, "--out", str(places / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (places / "out").exists()


# ---------------------------------------------------------------------------------------------------- the methods


def test_the_methods_are_listed_with_every_setting_and_its_source(capsys):
    assert cli.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"dreambooth": "personalize", "ddpo": "tune"}.items() <= {m["name"]: m["stage"] for m in listed}.items()
    for method in listed:
        assert method["source"] and all(row["source"] and row["help"] for row in method["settings"]), method["name"]
        own = {row["name"]: row for row in method["settings"]}
        assert METHODS[method["name"]].pocket.keys() <= own.keys()
        assert all(row["why"] for row in own.values() if row["pocket"] != row["default"])
    assert cli.main(["methods", "ddpo"]) == 0
    text = capsys.readouterr().out
    assert "sampler.n_steps" in text and "default: InstructBooth" in text and "pocket: 10, " in text
    assert cli.main(["methods", "ddpoo"]) == 2
    assert "There is no method 'ddpoo'; did you mean 'ddpo'?" in capsys.readouterr().err


def test_lines_are_whole_and_indented(capsys):
    lines = execution._Lines()
    for text in ("a", "b\nc\r", "d\n", "\n", "end"):
        lines.write(text)
    assert capsys.readouterr().out == "      ab\n      d\n\n"
    lines.close()
    assert capsys.readouterr().out == "      end\n"


# ---------------------------------------------------------------------------------------------------- Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_prints_a_line_now_and_then_and_always_the_last(capsys):
    clock = Clock()
    progress = Progress("train", 40, clock=clock)
    printed = []
    for done in range(1, 41):
        clock.now += 4.0
        progress.update(done, reward=-0.2149, clip_t=0.31)
        printed += capsys.readouterr().out.splitlines()
    assert printed[0] == "train 1/40  reward -0.215  clip t 0.31"  # no speed is known yet
    assert printed[1] == "train 4/40  reward -0.215  clip t 0.31  2 min 24 s left"
    assert printed[-1] == "train 40/40  reward -0.215  clip t 0.31  took 2 min 40 s"
    assert len(printed) == 1 + 13


def test_progress_of_a_resumed_loop_knows_its_speed(capsys):
    clock = Clock()
    progress = Progress("train", 100, every_s=0, clock=clock)
    for done in (91, 92):
        clock.now += 10
        progress.update(done, epoch=done, note="x")
    assert capsys.readouterr().out.splitlines()[1] == "train 92/100  epoch 92  note x  1 min 20 s left"


def test_progress_in_jupyter_is_one_line_that_is_written_over(capsys, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "/notebooks/02_rl_finetune.ipynb")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    clock = Clock()
    progress = Progress("train", 3, clock=clock)
    for done, number in ((1, 123456), (2, 1), (3, 1)):
        clock.now += 1.0
        progress.update(done, n=number)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("\n")
    first, second, third = out.split("\r")[1:]
    assert first == "train 1/3  n 123456" and second.rstrip() == "train 2/3  n 1  1.0 s left"
    assert third.rstrip() == "train 3/3  n 1  took 3.0 s" and len(third.rstrip("\n")) >= len(second.rstrip())


def test_progress_takes_numbers_of_libraries(capsys):
    import torch

    Progress("a", 1).update(1, loss=torch.tensor(0.00123456), lr=1e-5)
    assert capsys.readouterr().out == "a 1/1  loss 0.00123  lr 1e-05  took 0.0 s\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (312, "5 min 12 s"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_kernels_of_two_jobs_cannot_take_each_others_ports(tmp_path):
    """Jupyter draws TCP ports before the kernel binds them; one taken in between hung a job for five minutes."""
    managers = [execution._kernel_manager([])() for _ in range(2)]
    places = [Path(m.connection_file) for m in managers]
    assert {m.transport for m in managers} == {"ipc"} and places[0] != places[1]
    assert all(len(f"{place.with_suffix('')}-ipc-5") < 100 for place in places)


@pytest.mark.parametrize(
    ("model", "subject", "says"), [("pocket", "", False), ("sd15", "photos", False), ("sd15", "", True)]
)
def test_a_job_without_photos_says_whose_pictures_it_takes(model, subject, says):
    words = main_job._stand_in({"model": model, "subject": subject, "class_noun": "cat"})
    assert ("pocket world's cat" in words and "--subject" in words) == says
