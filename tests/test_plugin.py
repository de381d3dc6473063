"""What another package brings by entry points runs through stage, evaluation, tables, claims and report; and is refused
in words where it is broken.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ibkit.errors import ParameterError
from ibkit.job.run import OUTPUTS
from ibkit.registry import Registry
from ibkit.runs import project_root, read_run

TOY = Path(__file__).parent / "plugin"
POINTS = """
[ibkit.methods]
toy_shake = toy:METHOD
[ibkit.scorers]
toy_redness = toy:Redness
[ibkit.metrics]
toy_redness = toy:METRIC
"""


def install(folder, points=POINTS):
    """What pip leaves behind of a package, without pip."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture(scope="module")
def ibkit(tmp_path_factory):
    place = install(tmp_path_factory.mktemp("site"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (place, TOY)))}

    def run(*words):
        command = [sys.executable, "-m", "ibkit", *map(str, words)]
        result = subprocess.run(command, cwd=project_root(), env=environment, text=True, capture_output=True)
        assert result.returncode == 0, result.stdout + result.stderr[-3000:]
        return result.stdout

    return run


@pytest.fixture(scope="module")
def job(ibkit):
    """A whole job with the toy method and its reward; the main job writes nowhere but below outputs."""
    folder = OUTPUTS / f"test-toy-{os.getpid()}"
    words = ["--personalize", "toy_shake", "--reward", "toy_redness", "--device", "cpu"]
    for value in ("toy_shake.n_steps=2", "ddpo.n_epochs=1", "ddpo.images_per_epoch=4", "ddpo.sampler.n_steps=3"):
        words += ["--set", value]
    words += [
        "-p",
        "03_evaluate.scorers=['toy_redness', 'clip_t', 'dino']",
        "-p",
        "03_evaluate.n_images=2",
        "--n-inference-steps",
        3,
    ]
    yield folder, ibkit("run", "--name", folder.name, *words)
    shutil.rmtree(folder, ignore_errors=True)


def test_the_toy_runs_from_stage_to_report(ibkit, job):
    folder, said = job
    methods = {method["name"]: method for method in json.loads(ibkit("methods", "--json"))}
    assert methods["toy_shake"]["settings"][0]["name"] == "n_steps"
    made = read_run(folder / "01_personalize")
    assert len(made.table("history.csv")) == 2 and made.json("adapted.json")["deltas"][0]["method"] == "toy_shake"
    assert 0 < read_run(folder / "02_rl_finetune").table("history.csv")["reward"][0] < 1
    scores = read_run(folder / "03_evaluate").table("scores.csv")
    assert {"base", "toy_shake", "toy_shake+ddpo"} <= set(scores["arm"])
    assert scores.loc[scores["arm"] != "real", "toy_redness"].between(0, 1).all()
    tables = ibkit("tables", folder)
    assert "Redness" in tables and "Shaken + DDPO" in tables
    assert re.search("^C1  (undecided|supported) ", said, re.M) and "Shaken loses text fidelity" in said
    page = (folder / "report.html").read_text()
    assert "Shaken + DDPO" in page and "Redness" in page


def registry(tmp_path, monkeypatch, points):
    monkeypatch.syspath_prepend(install(tmp_path, points))
    return Registry("ibkit.things", "thing", {"own": "ibkit.errors:IbkitError"})


def test_what_cannot_be_imported_is_said_when_it_is_asked_for(tmp_path, monkeypatch):
    things = registry(tmp_path, monkeypatch, "[ibkit.things]\nbroken = no_such_module:THING\n")
    assert list(things) == ["own", "broken"] and things["own"].__name__ == "IbkitError"
    with pytest.raises(ParameterError, match="The thing 'broken' .no_such_module:THING. cannot be imported: No module"):
        things.find("broken")
    with pytest.raises(ParameterError, match="There is no thing 'brokn'; did you mean 'broken'"):
        things.find("brokn")


def test_a_name_of_the_kit_cannot_be_taken(tmp_path, monkeypatch):
    things = registry(tmp_path, monkeypatch, "[ibkit.things]\nown = toy:METHOD\n")
    with pytest.raises(ParameterError, match="toy:METHOD calls itself the thing 'own', which this kit has"):
        list(things)
