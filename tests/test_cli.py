"""The command line: it answers at once, its errors are sentences, its kernel is its own; and `ibkit check`."""

import argparse
import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import huggingface_hub.constants
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ibkit import __version__, cli
from ibkit.errors import ArtifactError
from ibkit.job import check
from ibkit.job.check import Finding, Report
from ibkit.model import hub

ROOT = Path(cli.__file__).parent.parent
HEAVY = ("torch", "numpy", "pandas", "matplotlib", "diffusers", "transformers", "papermill")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a Python of its own, from the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def heavy_modules_after(code: str) -> set[str]:
    done = python(f"import contextlib, io, sys\n{code}\nprint('LOADED', *(m for m in {HEAVY} if m in sys.modules))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("LOADED")[1].split())


@pytest.mark.parametrize(
    "module", ["ibkit", "ibkit.cli", "ibkit.params", "ibkit.runs", "ibkit.device", "ibkit.job.check"]
)
def test_importing_is_light(module):
    assert heavy_modules_after(f"import {module}") == set()


def help_of(*command: str) -> str:
    return f"""
from ibkit.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
    main({[*command, "--help"]!r})
assert "usage: ibkit" in text.getvalue()
"""


def test_help_is_light():
    assert heavy_modules_after(help_of()) == set()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_answers_to_help_without_torch(command):
    assert not {"torch", "diffusers", "transformers"} & heavy_modules_after(help_of(command))


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "ibkit", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ibkit {__version__}\n")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["chekc"])
    assert exit.value.code == 2
    assert "chekc" in capsys.readouterr().err


def command_that(action, monkeypatch):
    """Put a command `probe` on the command line that does `action`."""
    module = type(sys)("probe_command")
    module.add_arguments = lambda parser: parser.add_argument("--x", type=int, default=0)
    module.main = action
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "for a test"))
    monkeypatch.setenv("JUPYTER_PATH", "")


def test_a_command_gets_its_arguments_and_gives_its_status(monkeypatch):
    command_that(lambda arguments: arguments.x, monkeypatch)
    assert cli.main(["probe", "--x", "7"]) == 7


def test_an_error_is_one_sentence_and_status_2(monkeypatch, capsys):
    def fail(arguments: argparse.Namespace) -> int:
        raise ArtifactError("The run is gone; run it again.")

    command_that(fail, monkeypatch)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "error: The run is gone; run it again.\n"


def test_a_mistake_in_the_kit_is_not_hidden(monkeypatch):
    command_that(lambda arguments: 1 // 0, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_ctrl_c_is_status_130_without_a_traceback(monkeypatch, capsys):
    def interrupt(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    command_that(interrupt, monkeypatch)
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_python3_kernel_is_this_python_whatever_the_home_folder_says(tmp_path):
    """Another `python3` kernel in the home folder, preferred by the user's own settings, is not started."""
    for place in ("home/.local/share/jupyter", "elsewhere"):
        kernel = tmp_path / place / "kernels" / "python3"
        kernel.mkdir(parents=True)
        spec = {"argv": ["/nowhere/python3", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec))
    ask = "from jupyter_client import KernelManager; print(KernelManager(kernel_name='python3').format_kernel_cmd()[0])"
    surroundings = {
        "HOME": str(tmp_path / "home"),
        "JUPYTER_PATH": str(tmp_path / "elsewhere"),
        "JUPYTER_PREFER_ENV_PATH": "0",
        "XDG_DATA_HOME": "",
        "JUPYTER_DATA_DIR": "",
    }
    assert python(ask, **surroundings).stdout.strip() == "/nowhere/python3"  # the trap is real
    done = python(f"from ibkit.cli import use_own_kernel; use_own_kernel(); {ask}", **surroundings)
    assert done.stdout.strip() == sys.executable, done.stderr


# ---------------------------------------------------------------------------------------------------- ibkit check


def run_check(monkeypatch, capsys, *findings: Finding) -> tuple[int, dict]:
    monkeypatch.setitem(check.TOPICS, "environment", lambda: Report(list(findings)))
    status = cli.main(["check", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_check_succeeds_when_pocket_can_run(monkeypatch, capsys):
    status, report = run_check(monkeypatch, capsys, Finding("GPU", "none", "buy one", ("sd15",)))
    assert status == 0 and report["ok"]
    assert report["can_run"] == {"pocket": True, "sd15": False}
    assert report["findings"][0] == {"name": "GPU", "found": "none", "advice": "buy one", "stops": ["sd15"]}


def test_check_fails_when_pocket_cannot_run(monkeypatch, capsys):
    status, report = run_check(monkeypatch, capsys, Finding("disk", "full", "free space", ("pocket",)))
    assert status == 1 and not report["ok"] and report["can_run"]["sd15"]


def test_check_in_words_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(check.TOPICS, "other", lambda: Report([Finding("disk", "full", "free space", ("pocket",))]))
    assert cli.main(["check", "other"]) == 1
    text = capsys.readouterr().out
    assert "STOP  disk" in text and "-> free space" in text
    assert "pocket  cannot run here because of: disk" in text and "sd15    can run here" in text


def test_check_recognises_a_cpu_torch_beside_a_cuda_torchvision(monkeypatch):
    message = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(check, "_import_error", lambda name: "" if name == "torch" else message)
    (finding,) = check.check_imports()  # one cause, not one finding for every package that stands on it
    assert finding.name == "torch pair" and "CPU-only torch" in finding.found and "make clean-venv" in finding.advice
    assert finding.stops == ("pocket", "sd15")


def test_check_names_a_package_that_does_not_import(monkeypatch):
    monkeypatch.setattr(check, "_import_error", lambda name: "ImportError: no" if name == "peft" else "")
    assert [finding.name for finding in check.check_imports()] == ["import peft"]


def test_import_errors_of_any_kind_are_caught(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('first line\\nsecond')")
    monkeypatch.syspath_prepend(tmp_path)
    assert check._import_error("broken_package") == "RuntimeError: first line"
    assert check._import_error("no_such_package").startswith("ModuleNotFoundError")
    assert check._import_error("json") == ""


def versions(monkeypatch, **installed: str) -> dict[str, Finding]:
    real = check.importlib.metadata.version

    def version(name: str) -> str:
        found = installed.get(name.replace("-", "_"), None)
        if found == "":
            raise check.importlib.metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(check.importlib.metadata, "version", version)
    return {finding.name: finding for finding in check.check_versions()}


def test_check_compares_versions_with_pyproject(monkeypatch):
    found = versions(monkeypatch, transformers="4.55.0", peft="", torch="2.15.0+cpu", torchvision="0.29.2+cpu")
    assert "4.55.0, which is not <6,>=5.0" in found["transformers"].found
    assert "'transformers<6,>=5.0'" in found["transformers"].advice
    assert found["peft"].found == "not installed" and found["peft"].stops
    assert not found["torch"].advice


NOT_IMPORTED = {"jupyterlab"}  # a program for the user


def test_every_dependency_is_imported():
    sources = [path.read_text() for path in (ROOT / "ibkit").rglob("*.py")]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    packages = importlib.metadata.packages_distributions()
    used = {canonicalize_name(name) for module in names for name in packages.get(module.partition(".")[0], [])}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {Requirement(line).name for line in declared} - used == NOT_IMPORTED


def test_check_compares_torch_with_what_torchvision_asks_for(monkeypatch):
    monkeypatch.setattr(check, "_requirements", lambda: [f"{name}>=0" for name in check.COMPARED])
    monkeypatch.setattr(check.importlib.metadata, "requires", lambda name: ["numpy", "torch==2.11.0"])
    assert "asks for torch==2.11.0" in versions(monkeypatch, torch="2.15.0")["torch pair"].found
    assert "torch pair" not in versions(monkeypatch, torch="2.11.0+cu128")


def test_check_measures_memory_and_disk_against_each_preset(monkeypatch):
    usage = type("Usage", (), {"free": 3 * 2**30})
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage)
    assert check.check_disk().stops == ("sd15",)
    usage.free = 2**20
    assert check.check_disk().stops == ("pocket", "sd15")
    usage.free = 2**40
    assert check.check_disk().stops == () and not check.check_disk().advice


def test_check_names_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "POCKET_WEIGHTS", tmp_path)
    for name in check.POCKET_FILES[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert check.check_pocket_weights().found == f"missing: {check.POCKET_FILES[-1]}"
    (tmp_path / check.POCKET_FILES[-1]).mkdir()
    assert check.check_pocket_weights().stops == ()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's client with an empty cache of its own, allowed online."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def test_check_does_not_ask_the_hub_when_told_to_stay_offline(monkeypatch, hub_cache):
    monkeypatch.setattr(hub, "answers", lambda url: pytest.fail("the network was used"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    finding = check.check_hub()
    assert finding.found == f"HF_HUB_OFFLINE is set, and unet/config.json is not in {hub_cache}"
    assert finding.stops == ("sd15",)


def test_check_says_whether_the_hub_answers(monkeypatch, hub_cache):
    monkeypatch.setattr(hub, "answers", lambda url: True)
    assert check.check_hub().stops == ()
    monkeypatch.setattr(hub, "answers", lambda url: False)
    assert check.check_hub().stops == ("sd15",)


def test_a_server_that_never_answers_does_not_hold_the_check_up(monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.05)

    def never(*args, **kwargs):
        hub.threading.Event().wait(60)
        raise TimeoutError

    monkeypatch.setattr(hub.urllib.request, "urlopen", never)
    start = time.monotonic()
    assert hub.answers("https://example.invalid") is False
    assert time.monotonic() - start < 30


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    code = "import sys; from ibkit import cli; sys.exit(cli.main(['claims', 'outputs/reference', '--json']))"
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command.stdout.close()
    assert command.stderr.read() == "" and command.wait(60) == 141
