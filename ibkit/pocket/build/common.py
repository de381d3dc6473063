"""The training loop of all build stages, and the files that they share.

Master weights are fp32. A resumed training takes the same batches as one that was never stopped.

Matrices are trained by Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers"), the rest by AdamW. In 200
steps of 16 pictures the autoencoder reaches 18.5 dB that way; AdamW alone reaches 14.5 dB at the best of three rates.
"""

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ibkit.runs import Checkpoints
from ibkit.train.kept import Kept, Optimizer, Weights, part

SEED = 20_26
LOOK_EVERY = 20  # steps between readings of the loss; each one makes the CPU wait for the GPU

Row = tuple[str, float, float | None, int]  # of the model card: name, value, target, n


@dataclass(frozen=True)
class Budget:
    """How long a stage trains, in steps of `batch` pictures; the rates are the peaks of a warm-up + cosine schedule.

    With `seconds` above 0 the schedule ends after that time at the latest: for a borrowed GPU.
    """

    steps: int
    batch: int
    lr: float = 2e-3  # AdamW: vectors, embeddings
    muon_lr: float = 0.02  # Muon: matrices and convolution kernels
    weight_decay: float = 0.01
    ema: float = 0.998
    seconds: float = 0.0


class ShapewiseMuon(torch.optim.Muon):
    """PyTorch's Muon with all matrices of one shape in one batch: the same steps, a fifth of the kernels.

    PyTorch updates matrix by matrix. On a GPU, launching those kernels takes longer than the forward and backward
    passes of a U-Net of many small matrices; on a CPU both variants take the same time.
    """

    @torch.no_grad()
    def step(self) -> None:
        (settings,) = self.param_groups
        params = [p for p in settings["params"] if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        gradients, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - settings["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, settings["momentum"])  # Nesterov
        torch._foreach_mul_(params, 1 - settings["lr"] * settings["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(params):
            by_shape.setdefault(p.shape, []).append(i)
        for (n_rows, n_columns), members in by_shape.items():
            steps = orthogonal(torch.stack([updates[i] for i in members]), settings)
            rate = settings["lr"] * math.sqrt(max(1.0, n_rows / n_columns))
            torch._foreach_add_([params[i] for i in members], list(steps.float().unbind()), alpha=-rate)


def orthogonal(matrices: torch.Tensor, settings: dict) -> torch.Tensor:
    """Muon's Newton-Schulz iteration on a batch of matrices (N, rows, columns), bf16."""
    a, b, c = settings["ns_coefficients"]
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=settings["eps"])
    for _ in range(settings["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hash_seed(*names) -> int:
    return int.from_bytes(hashlib.sha256(repr((SEED, *names)).encode()).digest()[:7], "big")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the machine multiplies it natively (twice as fast here), else fp32; not for the master weights."""
    on_cpu = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cuda" or on_cpu else torch.float32


def fit(
    stage: str,
    folder: Path,
    model: nn.Module,
    loss_fn: Callable[[nn.Module, nn.Module, int, torch.Generator], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    budget: Budget,
    device: torch.device,
    dtype: torch.dtype,
    save_s: float = 120.0,
) -> nn.Module:
    """Train `model` and return it with the averaged (EMA) weights, in evaluation mode.

    Args:
        loss_fn: (working copy of the model in `dtype`, its fp32 running average, step, generator of the step on the
            device) -> (scalar loss, scalars to show).
        save_s: seconds between checkpoints, and so the most that a stopped build loses.
    """
    master = model.to(device=device, dtype=torch.float32)
    work = copy.deepcopy(master).to(dtype=dtype).train()
    ema = copy.deepcopy(master).requires_grad_(False)
    trained = [(m, w) for m, w in zip(master.parameters(), work.parameters(), strict=True) if m.requires_grad]
    tables = {id(t.weight) for t in master.modules() if isinstance(t, nn.Embedding)}
    # Muon takes matrices; a kernel (out, in, 3, 3) is one of shape (out, in * 9), sharing its memory with the weight.
    matrices = {id(m): nn.Parameter(m.data.view(len(m), -1)) for m, _ in trained if m.ndim >= 2 and id(m) not in tables}
    others = [m for m, _ in trained if id(m) not in matrices]
    optimizers = [
        ShapewiseMuon(list(matrices.values()), lr=budget.muon_lr, weight_decay=budget.weight_decay),
        torch.optim.AdamW(others, lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    peaks = [budget.muon_lr, budget.lr]
    kept: dict[str, Kept] = {"master": Weights(master.state_dict()), "ema": Weights(ema.state_dict())}
    kept |= {f"optimizer{n}": Optimizer(optimizer) for n, optimizer in enumerate(optimizers)}
    checkpoints = Checkpoints(folder / "checkpoints" / stage)
    start = 0
    if (found := checkpoints.latest()) is not None:
        start, tensors, _ = found
        for name, one in kept.items():
            one.load(part(tensors, name))
    progress = tqdm(total=budget.steps, initial=start, desc=stage, mininterval=10, smoothing=0.02)
    started = saved_at = time.monotonic()
    log = open(folder / f"{stage}.log", "a")
    for step in range(start, budget.steps):
        done = step / budget.steps
        if budget.seconds:
            done = max(done, (time.monotonic() - started) / budget.seconds)
        last = step + 1 == budget.steps or done >= 1
        factor = min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        with torch.no_grad():
            torch._foreach_copy_([w for _, w in trained], [m for m, _ in trained])
        # Each step has a generator of its own, so a checkpoint needs no generator state.
        loss, shown = loss_fn(work, ema, step, torch.Generator(device).manual_seed(hash_seed(stage, step)))
        if look := step % LOOK_EVERY == 0 or last:
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"build stage {stage}: the loss is {loss.item()} at step {step}; lower its learning rate"
                )
            text = " ".join(f"{k} {v.item():.4g}" for k, v in {"loss": loss.detach(), **shown}.items())
            progress.set_postfix_str(text, refresh=False)
            print(step, text, file=log, flush=True)
        loss.backward()
        for m, w in trained:
            target = matrices.get(id(m), m)
            target.grad = None if w.grad is None else w.grad.float().reshape(target.shape)
            w.grad = None
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(budget.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(master.parameters()), 1 - decay)
            for a, b in zip(master.buffers(), work.buffers(), strict=True):
                a.copy_(b)
        progress.update()
        if look and time.monotonic() - saved_at > save_s or last:
            tensors = {f"{name}.{k}": v for name, one in kept.items() for k, v in one.tensors().items()}
            checkpoints.save(step + 1, tensors, {"stage": stage})
            saved_at = time.monotonic()
        if last:
            break
    progress.close()
    log.close()
    with torch.no_grad():
        for a, b in zip(ema.buffers(), master.buffers(), strict=True):
            a.copy_(b)
    model.load_state_dict(ema.state_dict())
    return model.eval()


def begin_with(model: nn.Module, start: dict[str, torch.Tensor] | None) -> None:
    """Load those weights of an earlier build that fit the model by name and shape; the others stay random."""
    own = model.state_dict()
    fitting = {k: v for k, v in (start or {}).items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(own | fitting)


def save_half(state: dict[str, torch.Tensor], path: Path, **extra: torch.Tensor) -> None:
    """Store float weights as fp16, at half the size, and `extra` tensors in their own type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in state.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors | extra, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def load_float(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save_half` wrote, floats as fp32."""
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(path).items()}


def cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a file, memory-mapped; on the first call `make` computes it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, make())
        temporary.replace(path)
    return np.load(path, mmap_mode="r")
