"""What another package brings by entry points runs through stage, evaluation, tables, claims and report; and is refused
in words where it is broken.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibkit.errors import ParameterError
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


def test_the_toy_runs_from_stage_to_report(ibkit, tmp_path):
    methods = {method["name"]: method for method in json.loads(ibkit("methods", "--json"))}
    assert methods["toy_shake"]["settings"][0]["name"] == "n_steps"
    job = tmp_path / "job"
    ibkit("stage", "01_personalize", "--out", job / "01_personalize", "-p", "method=toy_shake", "--set", "n_steps=2",
          "-p", "device=cpu")  # fmt: skip
    made = read_run(job / "01_personalize")
    assert len(made.table("history.csv")) == 2 and made.json("adapted.json")["deltas"][0]["method"] == "toy_shake"
    tuning = ("--set", "n_epochs=1", "--set", "images_per_epoch=4", "--set", "sampler.n_steps=3", "-p", "device=cpu")
    ibkit("stage", "02_rl_finetune", "--out", job / "02_rl_finetune", "-p", f"run_in={job / '01_personalize'}",
          "-p", "reward=toy_redness", *tuning)  # fmt: skip
    ibkit("stage", "03_evaluate", "--out", job / "03_evaluate", "-p", f"runs=['{job / '02_rl_finetune'}']",
          "-p", "scorers=['toy_redness', 'clip_t', 'dino']", "-p", "n_images=2", "-p", "device=cpu")  # fmt: skip
    scores = read_run(job / "03_evaluate").table("scores.csv")
    assert {"base", "toy_shake", "toy_shake+ddpo"} <= set(scores["arm"])
    assert scores.loc[scores["arm"] != "real", "toy_redness"].between(0, 1).all()
    tables = ibkit("tables", job)
    assert "Redness" in tables and "Shaken + DDPO" in tables
    claims = {claim["id"]: claim for claim in json.loads(ibkit("claims", job, "--json"))}
    assert claims["C1"]["claim"].startswith("Shaken loses") and claims["C1"]["verdict"] != "not tested"
    code = f"from ibkit.report import build_report; print(build_report({str(job)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (install(tmp_path / "again"), TOY)))}
    subprocess.run([sys.executable, "-c", code], cwd=project_root(), env=environment, check=True)
    page = (job / "report.html").read_text()
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
