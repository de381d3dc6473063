"""A word whose vector a small network makes anew for every denoising step and layer (NeTI, Alaluf et al. 2023).

| here | paper |
|---|---|
| `Mapper.encode` | positional encoding f of (t, ℓ), section 4.1 |
| `Mapper.forward` | M(t, ℓ), with nested dropout (section 4.3) and the norm of the class word |
| bypass | textual bypass (section 4.2): values read more than keys |

Shapes: M pairs (t, ℓ), D text width, L tokens, B rows of a U-Net pass, ℓ layers in order of execution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ibkit.device import working
from ibkit.errors import ParameterError
from ibkit.model.attention import cross_attention_layers

if TYPE_CHECKING:
    from ibkit.model.text_to_image import TextToImage

N_FREQUENCIES = 1024
DEVIATIONS = (0.03, 2.0)  # of the frequencies of t and of ℓ
ANCHORS = range(0, 1000, 100)  # timesteps whose encodings the first layer begins as
N_UNITS = 128
DROPOUT = 0.5  # of nested dropout, for each layer of a step
BYPASS = 0.2  # how far the values' text is moved, as a share of its norm
NORMS = ("whole", "word")  # of word and bypass together, as the reference code does; or of each


class Mapper(nn.Module):
    """(t, ℓ) -> the word's row and its bypass, each (M, D).

    Args:
        n_layers: cross-attention layers.
        width: D.
        norm: of the class word's row.
        frequencies: draws the encoding's; weights: the network's.
        norm_of: one of `NORMS`.
        truncate: units that are used, the first; 0 = all. Fewer give up detail for a word that is easier to edit.
    """

    def __init__(
        self,
        n_layers: int,
        width: int,
        norm: float,
        frequencies: torch.Generator,
        weights: torch.Generator,
        norm_of: str = "whole",
        truncate: int = 0,
    ):
        super().__init__()
        self.n_layers, self.norm, self.norm_of, self.truncate = n_layers, norm, norm_of, truncate
        self.dropout: torch.Generator | None = None  # in training, draws the nested dropout
        drawn = torch.randn(N_FREQUENCIES, 2, generator=frequencies)
        self.register_buffer("frequencies", drawn * torch.tensor(DEVIATIONS))
        n_anchors = len(ANCHORS) * n_layers
        self.first = nn.Linear(2 * N_FREQUENCIES, n_anchors)
        self.hidden = nn.Sequential(
            nn.Linear(n_anchors, N_UNITS), nn.LayerNorm(N_UNITS), nn.LeakyReLU(),
            nn.Linear(N_UNITS, N_UNITS), nn.LayerNorm(N_UNITS), nn.LeakyReLU(),
        )  # fmt: skip
        self.last = nn.Linear(N_UNITS, 2 * width)
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            bound = layer.in_features**-0.5  # PyTorch's usual start, from a stream of its own
            for parameter in (layer.weight, layer.bias):
                parameter.data.uniform_(-bound, bound, generator=weights)
        anchors = torch.tensor([(t, layer) for t in ANCHORS for layer in range(n_layers)])
        self.first.weight.data.copy_(self.encode(anchors[:, 0], anchors[:, 1]))

    def encode(self, t: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """[sin W(t, ℓ), cos W(t, ℓ)] / √1024, (M, 2048), of norm 1; t, layer (M,)."""
        phase = torch.stack([t, layer], 1).float() @ self.frequencies.T
        return torch.cat([phase.sin(), phase.cos()], 1) / N_FREQUENCIES**0.5

    def forward(self, t: torch.Tensor, layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        units = self.hidden(self.first(self.encode(t, layer)))
        out = self.last(units * self.kept_units(layer).to(units))
        if self.norm_of == "whole":
            out = out / out.norm(dim=1, keepdim=True) * self.norm
        word, bypass = out.chunk(2, dim=1)
        if self.norm_of == "word":
            word = word / word.norm(dim=1, keepdim=True) * self.norm
        return word, bypass

    def kept_units(self, layer: torch.Tensor) -> torch.Tensor:
        """Which hidden units are kept, (M, 128) bool: in training, of every other layer a random prefix."""
        index = torch.arange(N_UNITS)
        if self.dropout is None or not torch.is_grad_enabled():  # a picture in between is drawn with all units
            return (index < (self.truncate or N_UNITS)).expand(len(layer), -1)
        dropped = torch.rand(self.n_layers, generator=self.dropout)[layer.cpu()] < DROPOUT
        cut = torch.randint(N_UNITS, (len(layer),), generator=self.dropout)
        return (index < cut[:, None]) | ~dropped[:, None]


class LayerText(NamedTuple):
    """What the layers read of one prompt at one step: keys (ℓ, L, D); values (ℓ, D), which differ at `place` alone."""

    keys: torch.Tensor
    values: torch.Tensor
    place: int


class MappedText:
    """The text of prompts that have the mapped word, for each layer of a pass; others are read as usual.

    Args:
        mapper: the network.
        word: its token id.
        capacity: texts that are kept while the mapper is frozen; at Stable Diffusion's size one is 4 MB.
    """

    def __init__(self, mapper: Mapper, word: int, capacity: int = 128):
        self.mapper, self.word, self.capacity = mapper, word, capacity
        self._kept: OrderedDict[tuple[str, int], LayerText] = OrderedDict()
        self._hooks = ExitStack()

    def forget(self) -> None:
        """Compute all texts anew."""
        self._kept.clear()

    @contextmanager
    def read(self, model: TextToImage, t: torch.Tensor, prompts: Sequence[str], text: torch.Tensor) -> Iterator[None]:
        """Inside, the U-Net's cross-attentions read the layers' own text; `text` (B, L, D) is that without a mapper."""
        self._hooks.close()
        pairs = list(zip(prompts, t.tolist(), strict=True))
        named = {prompt for prompt in set(prompts) if self.place(model, prompt) is not None}
        found = self.texts(model, list(dict.fromkeys(pair for pair in pairs if pair[0] in named)))
        if not found:
            yield
            return
        rows = [found.get(pair) for pair in pairs]
        with ExitStack() as stack:
            for i, (_, layer) in enumerate(cross_attention_layers(model.unet)):
                keys = torch.stack(
                    [plain if row is None else row.keys[i] for plain, row in zip(text, rows, strict=True)]
                )
                values = keys.clone()
                for b, row in enumerate(rows):
                    if row is not None:
                        values[b, row.place] = row.values[i]
                # what stands there now: a LoRA wraps the projection and must read the same text
                for projection, own in ((layer.to_k, keys), (layer.to_v, values)):
                    handle = projection.register_forward_pre_hook(lambda _, args, own=own: (own.to(args[0]), *args[1:]))
                    stack.callback(handle.remove)
            if getattr(model.unet, "is_gradient_checkpointing", False) and torch.is_grad_enabled():
                self._hooks = stack.pop_all()  # the backward pass runs the layers again: until the next pass
            yield

    def place(self, model: TextToImage, prompt: str) -> int | None:
        """Where a prompt has the word; None where it has not, a ParameterError where it has it more than once."""
        ids = model.token_ids(prompt)
        if ids.count(self.word) > 1:
            raise ParameterError(f"the prompt {prompt!r} has the learned word more than once: name the subject once.")
        return 1 + ids.index(self.word) if self.word in ids else None

    def texts(self, model: TextToImage, pairs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], LayerText]:
        """The texts of pairs (prompt, t), all layers of all of them in one pass of the text encoder."""
        trained = any(p.requires_grad for p in self.mapper.parameters())
        missing = [pair for pair in pairs if pair not in self._kept]
        made = {}
        if missing:
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                made = dict(zip(missing, self._encode(model, missing), strict=True))
        found = made | {pair: self._kept[pair] for pair in pairs if pair in self._kept}
        if not trained:
            for pair in pairs:
                self._kept[pair] = found[pair]
                self._kept.move_to_end(pair)
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        return found

    def _encode(self, model: TextToImage, pairs: Sequence[tuple[str, int]]) -> list[LayerText]:
        n = self.mapper.n_layers
        places = [self.place(model, prompt) or 0 for prompt, _ in pairs]
        ids = torch.cat([model.padded_ids(prompt) for prompt, _ in pairs]).repeat_interleave(n, 0)
        t = torch.tensor([t for _, t in pairs], device=ids.device).repeat_interleave(n)
        layer = torch.arange(n, device=ids.device).repeat(len(pairs))
        rows = torch.arange(len(ids), device=ids.device)
        place = torch.tensor(places, device=ids.device).repeat_interleave(n)
        word, bypass = self.mapper(t, layer)
        encoder, before = model.text_encoder, []

        def splice(_, args, embedded):
            return embedded.index_put((rows, place), word.to(embedded))

        norm = encoder.final_layer_norm
        hooks = [
            encoder.get_input_embeddings().register_forward_hook(splice),
            norm.register_forward_pre_hook(lambda _, args: before.append(args[0])),
        ]
        with working(encoder):
            try:
                keys = encoder(ids).last_hidden_state.float()
            finally:
                for hook in hooks:
                    hook.remove()
            h = before[0][rows, place]
            moved = h + BYPASS * h.norm(dim=1, keepdim=True) * bypass / bypass.norm(dim=1, keepdim=True)
            values = norm(moved).float()
        return [LayerText(k, v, p) for k, v, p in zip(keys.split(n), values.split(n), places, strict=True)]
