"""Several processes that train one policy: who does what, and how they agree.

Work is scattered in whole chunks and gathered in their order. Gradients are summed, and every process takes the same
step: weights, statistics and random streams are those of one process. Only the order of a sum differs.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ibkit.device import available_cpus
from ibkit.errors import IbkitError, ParameterError, TrainingError

JOIN_SECONDS = 10


class Processes:
    """Rank `number` of `count` training processes.

    Every process must call `agree`, `gather`, `share` and `add_gradients` in the same order.
    """

    def __init__(self, number: int = 0, count: int = 1):
        self.number, self.count = number, count

    @property
    def first(self) -> bool:
        """Rank 0: writes files and logs."""
        return self.number == 0

    def chunk(self, n: int, largest: int) -> int:
        """Size of the chunks that `n` things are cut into: at most `largest`, and small enough for all processes."""
        return min(largest, max(1, n // self.count))

    def deal(self, chunks: Sequence) -> list:
        """This process's share of the chunks, in turn."""
        return list(chunks[self.number :: self.count])

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Inside, each process works on its own share; where one fails, all of them fail, and say why: the one that
        fails by its own error, the others by a TrainingError with what it said.
        """
        if self.count == 1:
            yield
            return
        from accelerate.utils import gather_object

        failure, sentence = None, ""
        try:
            yield
        except Exception as error:  # of any kind, or the others would wait for a process that is gone
            failure, sentence = error, str(error)
            if not isinstance(error, IbkitError):
                sentence = f"process {self.number} of {self.count} failed with {type(error).__name__}: {error}"
        sentences = filter(None, self._together(gather_object, [sentence]))
        if failure is not None:
            raise failure
        if first := next(sentences, ""):
            raise TrainingError(first)

    def gather(self, mine: list) -> list:
        """The results of all processes, in the order before `deal`; tensors on the CPU."""
        if self.count == 1:
            return mine
        from accelerate.utils import gather_object, send_to_device

        shares = self._together(gather_object, [send_to_device(mine, "cpu")])
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def share(self, value: Any) -> Any:
        """Broadcast the value of rank 0; those of the other ranks are ignored."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return self._together(broadcast_object_list, [value])[0]

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum every gradient over the processes, in place."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self._together(reduce, flat, "sum")
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def _together(self, operation: Callable, *arguments) -> Any:
        try:
            return operation(*arguments)
        except RuntimeError as error:  # torch.distributed's own, when a peer closes its connection
            raise TrainingError(
                f"one of the {self.count} processes that train together ended, so process {self.number} cannot go on; "
                "resume to continue from the last checkpoint."
            ) from error


@contextmanager
def start(count: int, device: torch.device, helper: Callable, *arguments) -> Iterator[Processes]:
    """Start `count - 1` more processes on this machine, and be the first of them.

    Args:
        count: processes in all. On GPUs process i takes the i-th; on a CPU they share its cores.
        helper: called in each of the others as `helper(processes, device, *arguments)`; a function of a module, since
            it travels by name. It must train with the same data as the caller.

    Raises:
        ParameterError: fewer GPUs than processes, one GPU named for all of them, or an accelerator that cannot be
            shared out.
    """
    if count == 1:
        yield Processes()
        return
    if device.type not in ("cpu", "cuda"):
        raise ParameterError(f"{count} processes cannot train together on {device.type}: use 1, or device='cpu'.")
    if device.type == "cuda" and device.index is not None:
        raise ParameterError(
            f"{count} processes cannot train together on {device} alone: use device='cuda' (CUDA_VISIBLE_DEVICES "
            "chooses the GPUs), or 1 process."
        )
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise ParameterError(f"{count} processes need {count} GPUs and {torch.cuda.device_count()} are here.")
    with socket.create_server(("127.0.0.1", 0)) as probe:  # a free port
        port = probe.getsockname()[1]
    spawn = torch.multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=_help, args=(number, count, port, device.type, helper, arguments), daemon=True)
        for number in range(1, count)
    ]
    for process in helpers:
        process.start()
    threads = torch.get_num_threads()
    try:
        with _joined(0, count, port, device.type):
            yield Processes(0, count)
    finally:
        torch.set_num_threads(threads)
        for process in helpers:
            process.join(JOIN_SECONDS)
            process.kill()


def _help(number: int, count: int, port: int, kind: str, helper: Callable, arguments: tuple) -> None:
    """What a started process does. A TrainingError is met by all processes, and told by the first."""
    import signal

    from ibkit.device import keep_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears Ctrl-C and ends the others
    keep_memory()
    with _joined(number, count, port, kind):
        try:
            helper(Processes(number, count), torch.device(f"cuda:{number}" if kind == "cuda" else kind), *arguments)
        except TrainingError as error:
            raise SystemExit(1) from error


@contextmanager
def _joined(number: int, count: int, port: int, kind: str) -> Iterator[None]:
    """Inside, this process is one of a group, which accelerate sets up from torchrun's environment variables."""
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    place: dict[str, str | int] = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["TORCHELASTIC_USE_AGENT_STORE"] = False  # torchrun's True would let no process serve that address
    threads = max(1, available_cpus() // count)
    if kind == "cpu":
        place["OMP_NUM_THREADS"] = threads
    # accelerate keeps one state a process: that of an Accelerator made earlier would make this one a group of its own
    earlier = dict(PartialState._shared_state)
    with patch_environment(**place):
        try:
            PartialState._reset_state()
            state = PartialState(cpu=kind == "cpu")
            try:
                if kind == "cpu":
                    torch.set_num_threads(threads)
                yield
            finally:
                state.destroy_process_group()
        finally:
            PartialState._reset_state()
            PartialState._shared_state.update(earlier)
