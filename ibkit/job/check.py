"""`ibkit check`: what this machine has, what can run on it, and what to do about what cannot.

A topic is a function `() -> Report` and one line in `TOPICS`; `ibkit check TOPIC` runs it.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ibkit.model import hub
from ibkit.runs import project_root

POCKET_WEIGHTS = Path(__file__).parents[1] / "pocket" / "weights"
POCKET_FILES = (
    "pipeline/model_index.json", "clip/model.safetensors", "dino/model.safetensors", "image_reward/model.safetensors",
    "judge",
)  # fmt: skip
# What a preset needs: the main job's peak memory and the runs it writes; for sd15 the least that any method takes of a
# GPU (`ibkit plan --ladder`), and of the disk model, scorers, and DreamBooth's result and checkpoints.
POCKET_RAM_GIB, POCKET_DISK_GIB = 4, 1
SD15_GPU_GIB, SD15_RAM_GIB, SD15_DISK_GIB = 8, 16, 30
COMPARED = ("torch", "torchvision", "transformers", "diffusers", "peft", "accelerate", "open-clip-torch", "papermill")
IMPORTED = ("transformers", "diffusers", "peft", "accelerate", "open_clip")
BOTH = ("pocket", "sd15")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do when that is a problem."""

    name: str
    found: str
    advice: str = ""  # empty when all is well
    stops: tuple[str, ...] = ()  # what cannot run because of it


@dataclass(frozen=True)
class Report:
    """The findings of a topic, what they were looked at for, and which of that must be able to run."""

    findings: list[Finding]
    subjects: tuple[str, ...] = field(default=BOTH)
    required: tuple[str, ...] = ("pocket",)

    @property
    def can_run(self) -> dict[str, bool]:
        """Each subject and whether it can run: whether no finding stops it."""
        return {name: not any(name in finding.stops for finding in self.findings) for name in self.subjects}

    @property
    def ok(self) -> bool:
        """Whether what is required can run."""
        return all(self.can_run[name] for name in self.required)


def environment() -> Report:
    """Look at Python, packages, GPU, memory, disk, hub and weights, for the presets pocket and sd15."""
    python = check_python()
    if python.stops:
        return Report([python])  # nothing below runs on it
    return Report(
        [
            python,
            *check_versions(),
            *check_imports(),
            check_gpu(),
            check_memory(),
            check_disk(),
            check_pocket_weights(),
            check_hub(),
        ]
    )


def rl() -> Report:
    """Recompute what the RL stage computes, in other ways, on this machine; see `ibkit.job.selfcheck`."""
    from ibkit.job.selfcheck import run_checks

    findings = []
    for check in run_checks():
        found = f"{check.measured:.1e}, below {check.allowed:.1e} is right"
        trouble = () if check.ok else (check.hint, ("the RL stage",))
        findings.append(Finding(check.name, found, *trouble))
    return Report(findings, ("the RL stage",), ("the RL stage",))


TOPICS: dict[str, Callable[[], Report]] = {"environment": environment, "rl": rl}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ibkit check`."""
    parser.add_argument("topic", nargs="?", default="environment", choices=TOPICS, help="what to look at")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print the report of a topic; returns 0 when what it requires can run, else 1."""
    report = TOPICS[arguments.topic]()
    if arguments.json:
        findings = [asdict(finding) for finding in report.findings]
        print(json.dumps({"ok": report.ok, "can_run": report.can_run, "findings": findings}, indent=1))
    else:
        print(in_words(report))
    return 0 if report.ok else 1


def in_words(report: Report) -> str:
    """The report as lines of text: a mark, the thing, what was found, and under it what to do."""
    lines = []
    width = max(16, *(len(finding.name) for finding in report.findings))
    for finding in report.findings:
        mark = "ok  " if not finding.advice else "STOP" if set(finding.stops) & set(report.required) else "note"
        lines.append(f"{mark}  {finding.name:<{width}} {finding.found}")
        if finding.advice:
            lines.append(f"{'':<{width + 7}}-> {finding.advice}")
    lines.append("")
    for name, can_run in report.can_run.items():
        reasons = [finding.name for finding in report.findings if name in finding.stops]
        lines.append(f"{name:<7} {'can run here' if can_run else 'cannot run here because of: ' + ', '.join(reasons)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- software


def check_python() -> Finding:
    """Python's version."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036, `python3.10 -m ibkit check` in a checkout gets here
        return Finding("Python", found, "install Python 3.11 or newer and run `make clean-venv test`", BOTH)
    return Finding("Python", found)


def check_versions() -> list[Finding]:
    """The installed packages against the bounds of pyproject.toml, and torchvision against the torch it asks for."""
    from packaging.requirements import Requirement

    bounds = {requirement.name: requirement for requirement in map(Requirement, _requirements())}
    findings = [_check_version(bounds[name]) for name in COMPARED]
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("torchvision") or []]
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return findings
    for requirement in wanted:
        if requirement.name == "torch" and not requirement.specifier.contains(torch, prereleases=True):
            found = f"torchvision asks for {requirement}, and torch {torch} is installed"
            findings.append(Finding("torch pair", found, _PAIR_ADVICE, BOTH))
    return findings


_PIP = f"{sys.executable} -m pip install"
_PAIR_ADVICE = (
    "install both from one place: run `make clean-venv test`, or "
    f"`{_PIP} --force-reinstall torch torchvision` with one and the same index for both"
)


def _requirements() -> list[str]:
    """The core requirements: of the checkout when there is one (an editable install's own list may be older)."""
    import tomllib  # not in the Pythons that check_python refuses

    path = project_root() / "pyproject.toml"
    if path.is_file():
        return tomllib.loads(path.read_text())["project"]["dependencies"]
    return [line for line in importlib.metadata.requires("ibkit") or [] if "extra ==" not in line]


def _check_version(bound) -> Finding:
    try:
        version = importlib.metadata.version(bound.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(bound.name, "not installed", f"{_PIP} '{bound}'", BOTH)
    if not bound.specifier.contains(version, prereleases=True):
        return Finding(bound.name, f"{version}, which is not {bound.specifier}", f"{_PIP} '{bound}'", BOTH)
    return Finding(bound.name, version)


def check_imports() -> list[Finding]:
    """Import torch, torchvision and what stands on them; say what the misleading messages mean."""
    for name in ("torch", "torchvision"):
        if error := _import_error(name):
            return [_explain_import_error(name, error)]  # all the others would fail because of it
    return [_explain_import_error(name, error) for name in IMPORTED if (error := _import_error(name))]


def _import_error(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary package raises RuntimeError, OSError, AttributeError ...
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _explain_import_error(name: str, error: str) -> Finding:
    if "torchvision::nms" in error:
        found = f"{name} does not import: a CPU-only torch is beside a torchvision built for CUDA, or the other way"
        return Finding("torch pair", f"{found} ({error})", _PAIR_ADVICE, BOTH)
    return Finding(f"import {name}", error, "run `make clean-venv test` to install everything anew", BOTH)


# ---------------------------------------------------------------------------------------------------- machine


def check_gpu() -> Finding:
    """A CUDA GPU, whether this torch computes on it, and its memory."""
    if _import_error("torch"):
        return Finding("GPU", "not looked at: torch does not import", "mend torch first", ("sd15",))
    import torch

    if not torch.cuda.is_available():
        advice = f"sd15 needs an NVIDIA GPU with {SD15_GPU_GIB} GiB at least; pocket runs on the CPU"
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            advice = "this torch is built without CUDA though there is an NVIDIA driver: install torch's CUDA build"
        return Finding("GPU", "none", advice, ("sd15",))
    properties = torch.cuda.get_device_properties(0)
    gib = properties.total_memory / 2**30
    found = f"{torch.cuda.device_count()} x {properties.name}, {gib:.0f} GiB"
    try:
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
    except RuntimeError as error:
        advice = f"this torch cannot compute on it ({str(error).splitlines()[0]}): update the driver or torch"
        return Finding("GPU", found, advice, ("sd15",))
    if not torch.cuda.is_bf16_supported(False):
        return Finding("GPU", found, "sd15 needs a GPU that computes in bf16: Ampere (2020) or newer", ("sd15",))
    if gib < SD15_GPU_GIB - 0.5:  # a card sold as 16 GiB shows a little less
        return Finding("GPU", found, f"sd15 needs {SD15_GPU_GIB} GiB at least", ("sd15",))
    return Finding("GPU", found)


def check_memory() -> Finding:
    """Memory of the machine, or of the container when that is less, against what the presets need."""
    import psutil

    gib = psutil.virtual_memory().total / 2**30
    try:
        gib = min(gib, int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30)
    except (OSError, ValueError):  # no such file (no cgroup v2), or its limit is "max"
        pass
    needs = {"pocket": POCKET_RAM_GIB, "sd15": SD15_RAM_GIB}
    return _enough("memory", gib, needs, "in all", "use a machine with more memory")


def check_disk() -> Finding:
    """Free disk where runs are written, against what the presets need."""
    gib = shutil.disk_usage(project_root()).free / 2**30
    needs = {"pocket": POCKET_DISK_GIB, "sd15": SD15_DISK_GIB}
    return _enough("disk", gib, needs, f"free at {project_root()}", "free space, or remove old runs under outputs/")


def _enough(name: str, gib: float, needs: dict[str, int], where: str, remedy: str) -> Finding:
    short = {preset: need for preset, need in needs.items() if gib < need * 0.95}  # 16 GiB sold is 15.5 shown
    advice = "; ".join(f"{preset} needs {need} GiB" for preset, need in short.items())
    return Finding(name, f"{gib:.1f} GiB {where}", f"{advice}: {remedy}" if short else "", tuple(short))


def check_pocket_weights() -> Finding:
    """Whether the weights that ship with the kit are there."""
    missing = [name for name in POCKET_FILES if not (POCKET_WEIGHTS / name).exists()]
    if missing:
        advice = "clone the repository again, or build them: python -m ibkit.pocket.build"
        return Finding("pocket weights", f"missing: {', '.join(missing)}", advice, ("pocket",))
    size = sum(path.stat().st_size for path in POCKET_WEIGHTS.rglob("*") if path.is_file())
    return Finding("pocket weights", f"present, {size / 2**20:.1f} MiB")


def check_hub() -> Finding:
    """Whether Stable Diffusion 1.5 can be had: its files that are read are in the hub's cache, or the hub answers."""
    if error := _import_error("huggingface_hub"):
        return Finding("model hub", error, "run `make clean-venv test` to install everything anew", ("sd15",))
    from huggingface_hub import constants

    folder, missing = hub.in_cache(hub.HUB_NAMES["sd15"])
    if not missing:
        return Finding("model hub", f"not needed: {hub.HUB_NAMES['sd15']} is in the cache")
    lacks = f"{missing[0]} is not in {folder}"
    by_hand = "or copy a folder in diffusers format or a .safetensors file here and name it: --model PATH"
    if constants.HF_HUB_OFFLINE:
        return Finding("model hub", f"HF_HUB_OFFLINE is set, and {lacks}", f"unset it for sd15, {by_hand}", ("sd15",))
    if wrong := hub.misset(constants.ENDPOINT):
        return Finding("model hub", wrong.partition(": ")[0], wrong.partition(": ")[2], ("sd15",))
    if not hub.answers(constants.ENDPOINT):
        advice = f"sd15 needs it once, to download the model; look at network and proxy, {by_hand}"
        return Finding(
            "model hub", f"{constants.ENDPOINT} did not answer within {hub.TIMEOUT_S:g} s", advice, ("sd15",)
        )
    return Finding("model hub", f"{constants.ENDPOINT} answers")
