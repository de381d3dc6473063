"""What every trainer shares: an optimizer's state as named tensors, for checkpoints in safetensors, and what it says
when memory runs out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ibkit.errors import TrainingError


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Say what to do when the GPU's memory, or the machine's, does not suffice for what is done inside.

    Raises:
        TrainingError: it does not; with the advice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(f"out of memory: {advice}.") from error
    except RuntimeError as error:  # what PyTorch's allocator for the CPU raises
        if "can't allocate memory" not in str(error):
            raise
        raise TrainingError(f"out of memory: {advice}.") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """The state of every parameter as `prefix.<index>.<name>`, on the CPU."""
    return {
        f"{prefix}.{i}.{name}": torch.as_tensor(v).cpu()
        for i, slot in optimizer.state_dict()["state"].items()
        for name, v in slot.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], prefix: str = "optimizer"
) -> None:
    """Put back what `optimizer_tensors` took out; learning rates and other settings stay the optimizer's own."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part(tensors, prefix).items():
        i, name = key.split(".", 1)
        slots.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix.`, without it."""
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
