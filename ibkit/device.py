"""The machine under the kit: device, networks parked off it, random streams, CPU threads, memory that is kept."""

import ctypes
import gc
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ibkit.errors import ParameterError

if TYPE_CHECKING:
    import torch

# mallopt's options (glibc's malloc.h) and the largest threshold that every glibc accepts on 64 bits
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD_BYTES = 32 * 2**20
TRIM_THRESHOLD_BYTES = 2**31 - 1


def pick_device(name: str = "auto") -> "torch.device":
    """Choose where to compute.

    Args:
        name: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ParameterError: no such device, or PyTorch does not see it on this machine.
    """
    import torch

    if not isinstance(name, str):
        raise ParameterError(f"device={name!r} is no text: give auto, cpu, cuda, cuda:0, cuda:1, ..., or mps.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ParameterError(f"device={name!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, ..., mps.")
    if kind == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA GPU here"
        raise ParameterError(f"device={name!r} was asked for, but {why}; use device='auto' or run `ibkit check`.")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ParameterError(
            f"device={name!r} was asked for, but the GPUs here are cuda:0 to cuda:{torch.cuda.device_count() - 1}."
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ParameterError("device='mps' was asked for, but PyTorch sees no Apple GPU here; use device='auto'.")
    return torch.device(name)


def describe_device(device: "torch.device") -> str:
    """Name a device for a manifest: 'NVIDIA H200, 139.8 GiB' or 'CPU x86_64, 2 threads'."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"{device.type.upper()} {platform.machine()}, {torch.get_num_threads()} threads"


def generator(seed: int, *names: str | int) -> "torch.Generator":
    """Make a random stream of its own: the same for the same arguments, independent of every other.

    It lives on the CPU, so that a seed means the same picture on every device.

    Args:
        seed: the run's seed.
        names: what the stream is for, such as `"rollout", epoch, prompt_id`.
    """
    import torch

    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def park(*modules: "torch.nn.Module") -> None:
    """Let networks wait in the machine's memory instead of the GPU's until they are `working`; on a CPU, nothing."""
    for module in modules:
        place = next((parameter.device for parameter in module.parameters()), None)
        if place is not None and place.type != "cpu":
            module.to("cpu").place = place


@contextmanager
def working(*modules: "torch.nn.Module") -> Iterator[None]:
    """Inside, networks that are parked are back on the GPU; the others stay where they are."""
    waiting = [module for module in modules if getattr(module, "place", None)]
    for module in waiting:
        module.to(module.place)
        module.place = None  # so that a `working` inside this one moves nothing
    try:
        yield
    finally:
        park(*waiting)


def available_cpus() -> int:
    """Count the CPUs this process may use: its affinity, and a container's quota, which PyTorch does not look at."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file (no cgroup v2), or its quota is "max"
        pass
    return cpus


def threads() -> int:
    """Let PyTorch use the CPUs this process may use (`OMP_NUM_THREADS` overrides), and return how many."""
    import torch

    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(available_cpus())
    return torch.get_num_threads()


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors instead of giving it back to the kernel.

    A training step on the CPU frees and allocates the same megabytes over and over; zeroing fresh pages for them takes
    up to half of its time. A system without glibc is left as it is.
    """
    _tell_glibc()  # nothing is returned: a notebook's cell that ends with this shows nothing


def _tell_glibc() -> bool:
    """Whether the options took."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )


def give_back_memory() -> None:
    """Give what glibc kept of freed memory back to the system: for a process that computed and now waits."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
