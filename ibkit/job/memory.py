"""What Stable Diffusion v1.5 takes of a GPU, counted on any machine.

A fake tensor has a shape and no values. On fake tensors the kit's own passes run as on a GPU, under bf16 autocast with
fused attention, and every storage is noted when it is made and when it is freed: weights, gradients, moments, the graph
that a backward pass needs, transients. Operations are counted in the same passes; a multiplication and an addition are
two. A row is one latent in a pass; guidance makes two of a picture.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ibkit.adapt import attach, parameters_of
from ibkit.device import generator
from ibkit.model.single_file import SD15_TEXT, SD15_UNET, SD15_VAE
from ibkit.model.text_to_image import TextToImage, pictures_at_once
from ibkit.train.resources import Resources

TEXT = (77, 768)
PROMPT, NEW_WORD = "a cat", "<new>"
WORD_KINDS = ("tokens", "cross_kv", "mapper")  # of delta, that bring a word
A_WORD = {"word": NEW_WORD, "start": "cat", "words": {NEW_WORD: "cat"}, "seed": 0, "norm": "whole", "truncate": 0}
PICTURE_PX = 512
# PyTorch counts the operations of a GPU's fused attention, and not of the CPU's, which fake tensors take.
OPERATIONS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *rest, **named: (
        sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
}


WEIGHTS = {  # numbers of weights; of the scorers, of the official ones
    "unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
    "image_reward": 446_206_689, "clip": 151_277_313, "dino": 21_665_664, "pick_score": 986_109_441,
    "align": 172_117_841,
}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """What a piece of work takes.

    Attributes:
        nbytes: the most at a time, beside weights and an optimizer's moments.
        flop: operations.
        weights: bytes of the network that works.
        trained: number of weights in training.
    """

    nbytes: float
    flop: float
    weights: int
    trained: int = 0


class Counter(TorchDispatchMode):
    """Bytes of the storages made inside, those alive `now` and the most at a time, `peak`; and operations, `flop`.

    Args:
        outside: networks whose weights are not counted.
    """

    def __init__(self, *outside: torch.nn.Module):
        super().__init__()
        self.now = self.peak = self.flop = 0
        weights = itertools.chain.from_iterable(network.parameters() for network in outside)
        self._known = weakref.WeakSet(weight.untyped_storage() for weight in weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in OPERATIONS:
            self.flop += OPERATIONS[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


def as_on_cuda(unet: torch.nn.Module) -> None:
    """Let it normalise in fp32 under autocast, as on CUDA: the CPU's autocast, which fake tensors see, does not."""
    for part in unet.modules():
        if isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm):
            part.register_forward_pre_hook(lambda part, arguments: (arguments[0].float(),))


def fake(module: torch.nn.Module) -> None:
    """Give a module on the meta device fake tensors on the CPU; call it inside a `FakeTensorMode`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def sd15_unet() -> torch.nn.Module:
    """Its U-Net on the meta device, frozen."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET).eval().requires_grad_(False)
    as_on_cuda(unet)
    return unet


def _model() -> TextToImage:
    """Its U-Net on the meta device and a text that is given: no picture is encoded or decoded."""
    nothing, cpu = torch.nn.Identity(), torch.device("cpu")
    model = TextToImage("sd15", sd15_unet(), nothing, nothing, None, None, cpu, torch.bfloat16)
    model._embeddings[PROMPT] = torch.empty(TEXT)
    return model


class _Words:
    """A tokenizer as far as counting needs one: a word is one token, and one with brackets two until it is taught."""

    model_max_length = TEXT[0]

    def __init__(self) -> None:
        self.added: dict[str, int] = {}

    def __len__(self) -> int:
        return 1 + len(self.added)

    def add_tokens(self, words: Sequence[str]) -> None:
        self.added |= {word: len(self) + i for i, word in enumerate(words)}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added

    def _ids(self, word: str) -> list[int]:
        return [self.added[word]] if word in self.added else [0] if word.isalpha() else [0, 0]

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        ids = [token for word in text.split() for token in self._ids(word)]
        if "padding" not in options:
            return {"input_ids": ids}
        return {"input_ids": torch.tensor([[0, *ids, *[0] * (TEXT[0] - 1 - len(ids))]])}


def _reading_model() -> TextToImage:
    """With Stable Diffusion's text encoder, whose table of words is short: what a learned word needs."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = _model()
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**SD15_TEXT)).eval().requires_grad_(False)
    encoder.set_input_embeddings(torch.nn.Embedding(1, TEXT[1]))
    encoder.config.vocab_size = 1
    model.text_encoder, model.tokenizer = encoder, _Words()
    return model


def step(
    kind: str, settings: Mapping[str, Any], rows: int, checkpointing: bool = False, frozen_bf16: bool = False
) -> Counted:
    """A training step of a delta: graph, gradients and transients, beside weights and moments.

    Counted with 2 and 8 rows, between and beyond which the bytes of a row are the same.

    Args:
        kind, settings: of the delta, as `Method.delta` gives them; a word is supplied here.
    """
    of_kind = tuple(sorted(settings.items()))
    two = _step(kind, of_kind, 2, checkpointing, frozen_bf16)
    if rows == 2:
        return two
    of_a_row = (_step(kind, of_kind, 8, checkpointing, frozen_bf16).nbytes - two.nbytes) / 6
    return replace(two, nbytes=two.nbytes + (rows - 2) * of_a_row, flop=two.flop * rows / 2)


@cache
def _step(kind: str, settings: tuple, rows: int, checkpointing: bool, frozen_bf16: bool) -> Counted:
    model = _reading_model() if kind in WORD_KINDS else _model()
    attach(model, kind, "counted", A_WORD | dict(settings), generator(0, "counted"))
    resources = Resources(checkpointing=checkpointing, frozen_bf16=frozen_bf16)
    resources.prepare(model)
    prompt = f"a {NEW_WORD}" if kind in WORD_KINDS else PROMPT
    t = torch.arange(rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in model.parts().values():
            fake(part)
        weights = list(parameters_of(model, "counted").values())
        x = torch.empty(rows, *model.latent_shape)
        with Counter(*model.parts().values()) as counter:
            loss = model.predict_noise(x, t, [prompt] * rows).square().mean()
            loss.backward()
            del loss
            backward = counter.peak
            optimizer = resources.adamw(weights, lr=0.0, fused=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        moments = sum(value.nbytes for slot in optimizer.state.values() for value in slot.values())
    size = sum(p.nbytes for p in model.unet.parameters())
    n_trained = sum(p.numel() for p in weights)
    return Counted(max(backward, counter.peak - moments), counter.flop, size, n_trained)


@cache
def forward(rows: int) -> Counted:
    """A pass without gradient."""
    model = _model()
    with FakeTensorMode(), torch.no_grad():
        fake(model.unet)
        model._embeddings[PROMPT] = torch.empty(TEXT)
        x, t = torch.empty(rows, *model.latent_shape), torch.empty(rows, dtype=torch.long)
        with Counter(model.unet) as counter:
            model.predict_noise(x, t, [PROMPT] * rows)
    return Counted(counter.peak, counter.flop, 4 * WEIGHTS["unet"])


@cache
def autoencoder(part: str, gradient: bool = False) -> Counted:
    """`encode` or `decode` of as many pictures as the kit takes at a time, one; fp32 as everywhere in the kit.

    Args:
        gradient: of what is given, and with a backward pass.
    """
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**SD15_VAE).eval().requires_grad_(False)
    with FakeTensorMode(), torch.set_grad_enabled(gradient):
        fake(vae)
        shape = (4, 64, 64) if part == "decode" else (3, PICTURE_PX, PICTURE_PX)
        given = torch.empty(pictures_at_once(PICTURE_PX), *shape, requires_grad=gradient)
        with Counter(vae) as counter:
            made = getattr(vae, part)(given)
            if gradient:
                made.sample.sum().backward()
    return Counted(counter.peak, counter.flop, 4 * WEIGHTS["vae"])
