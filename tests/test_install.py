"""The ways in: make's variables, and the README's cell that installs beside a PyTorch that is there."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version

import pytest

from ibkit.runs import project_root

ROOT = project_root()
MAKE = shutil.which("make")


def run_command(*words, **environment):
    """The command that `make run` would execute."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }  # `make test` sets
    done = subprocess.run(
        [MAKE, "--dry-run", "run", *words], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("\\\n", " ").splitlines()[-1].split())


@pytest.mark.skipif(MAKE is None, reason="there is no make here")
def test_make_hands_over_what_is_named_on_its_command_line():
    words = ["MODEL=sd15", "SUBJECT=my dog/", "CLASS_NOUN=toy bear", "ARGS=--name x"]
    wanted = ".venv/bin/ibkit run --model 'sd15' --subject 'my dog/' --class-noun 'toy bear' --name x"
    assert run_command(*words) == wanted
    assert run_command("SUBJECT=Ann's dog/") == r".venv/bin/ibkit run --subject 'Ann'\''s dog/'"
    assert run_command(MODEL="of somebody else", SUBJECT="x") == ".venv/bin/ibkit run"


def cell():
    """The README's cell for a runtime that has its PyTorch."""
    (found,) = re.findall(r"```python\n(import subprocess.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return found


def test_the_first_cell_keeps_the_torch_that_is_there(tmp_path, monkeypatch):
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda words, check: called.append((words, check)))
    exec(cell(), {})
    assert called == [([sys.executable, *"-m pip install --quiet -c keep.txt --editable ibkit".split()], True)]
    pins = f"torch=={version('torch')}\ntorchvision=={version('torchvision')}\n"
    assert (tmp_path / "keep.txt").read_text() == pins


@pytest.mark.slow
@pytest.mark.parametrize(("torch", "torchvision"), [("2.11.0", "0.26.0"), ("2.14.0", "0.29.0")])
def test_the_kit_fits_beside_a_torch_of_gpu_images(tmp_path, torch, torchvision):
    """pip's own answer, from the package index; nothing is installed."""
    venv.create(tmp_path / "venv", with_pip=True)
    (tmp_path / "keep.txt").write_text(f"torch=={torch}\ntorchvision=={torchvision}\n")
    python = shutil.which("python", path=os.pathsep.join(str(tmp_path / "venv" / name) for name in ("bin", "Scripts")))
    words = ["install", "--dry-run", "--quiet", "--report", tmp_path / "report.json", "-c", tmp_path / "keep.txt", ROOT]
    done = subprocess.run([python, "-m", "pip", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    packages = [entry["metadata"] for entry in json.loads((tmp_path / "report.json").read_text())["install"]]
    chosen = {package["name"]: package["version"] for package in packages}
    assert (chosen["torch"], chosen["torchvision"]) == (torch, torchvision) and "ibkit" in chosen
