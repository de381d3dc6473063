"""The state of a training, in parts that a checkpoint stores as tensors and JSON facts; and out-of-memory advice."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ibkit.errors import TrainingError


class Keeps(Protocol):
    """State that JSON holds in full: statistics of rewards, a baseline."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None:
        """Restore what `state` returned."""


class Kept:
    """One part of a training's state. The loop saves its tensors and facts, and restores them on resume."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in a checkpoint, known before the first step."""
        return 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, on the CPU."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""

    def facts(self) -> Any:
        """What JSON can hold."""

    def recall(self, facts: Any) -> None:
        """Restore what `facts` returned."""


class Facts(Kept):
    """A part without tensors."""

    def __init__(self, of: Keeps):
        self.of = of

    def facts(self) -> Any:
        return self.of.state()

    def recall(self, facts: Any) -> None:
        self.of.load(facts)


class Weights(Kept):
    """The weights that are trained, by name, as `ibkit.adapt.attach` returns them."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        self.parameters = parameters

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters.values())

    def now(self) -> list[torch.Tensor]:
        """A copy of the weights as they are."""
        return [p.detach().clone() for p in self.parameters.values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])


class Copy(Weights):
    """Weights of another moment, such as the best policy's; before the first `take`, those of its making."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        super().__init__(parameters)
        self.values = self.now()

    def take(self, values: Sequence[torch.Tensor]) -> None:
        """Keep these instead."""
        self.values = list(values)

    def put_on(self) -> None:
        """Make them the model's weights."""
        super().load(dict(zip(self.parameters, self.values, strict=True)))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: v.cpu() for name, v in zip(self.parameters, self.values, strict=True)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in zip(self.parameters, self.values, strict=True):
            value.copy_(tensors[name])


class Average(Copy):
    """An exponential moving average of the weights over steps; a decay of 0 keeps nothing and means the weights."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        super().__init__(parameters if decay else {})
        self.decay, self.weights = decay, parameters

    def result(self) -> list[torch.Tensor]:
        """A copy of the average."""
        return [v.detach().clone() for v in (self.values or self.weights.values())]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the average is the model's weights."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.put_on()
        try:
            yield
        finally:
            Weights.load(self, trained)

    def follow(self, at_most: float = 1.0) -> None:
        """Take one more step into the mean, with the decay or `at_most`."""
        if self.decay:
            weights = [p.detach() for p in self.weights.values()]
            torch._foreach_lerp_(self.values, weights, 1 - min(self.decay, at_most))


class Optimizer(Kept):
    """An optimizer's moments, without its learning rate and other settings.

    Args:
        moment_bytes: of a weight; 8 for AdamW's two.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, moment_bytes: int = 8):
        self.optimizer, self.moment_bytes = optimizer, moment_bytes
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]

    @property
    def nbytes(self) -> int:
        return self.moment_bytes * sum(p.numel() for p in self.weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{i}.{name}": torch.as_tensor(v).cpu()
            for i, weight in enumerate(self.weights)
            for name, v in self.optimizer.state.get(weight, {}).items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        slots: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            i, name = key.split(".", 1)
            # bitsandbytes counts steps by a number
            slots.setdefault(int(i), {})[name] = value.item() if value.dtype == torch.int64 else value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Inside, running out of the GPU's or the machine's memory raises TrainingError with the advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # PyTorch's allocator for the CPU raises a plain RuntimeError
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(f"out of memory: {advice}.") from error


def part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors below `name.`, without it."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
