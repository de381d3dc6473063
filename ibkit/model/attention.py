"""What the words of a prompt look at: cross-attention maps of a text-to-image U-Net.

In a cross-attention layer every place of the latents asks which token to read from. With queries Q of the places, keys
K of the tokens and d channels a head (Rombach et al. 2022, section 3.3),

    A = softmax(Q Kᵀ / √d)          one row a place, one column a token; a row sums to 1

A token's *map* is its column, laid out as a picture: where the token is read. It does not say what the token does
there.

Shapes: N pictures, W words, h heads, r×r places of a layer, L tokens.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ibkit.errors import ModelError, ParameterError, ScoreError
from ibkit.model.text_to_image import TextToImage

# Where literature on Stable Diffusion takes its statistics (Hertz et al. 2022: 16×16 is where words part most clearly).
STATISTICS_RESOLUTION = 16


# --- words and tokens ----------------------------------------------------------------------------------------------


def token_positions(model: TextToImage, prompt: str, words: str) -> list[int]:
    """Columns of the attention matrix that belong to a word, or to a phrase such as "monster toy".

    The start mark is column 0, so the first token of a prompt is 1. A word that is several tokens, or that the prompt
    has several times, has several columns.

    They are looked for as they stand in the prompt; case and number of spaces do not matter. A ParameterError where the
    prompt does not have them, is empty, or too long to be read.
    """
    parts = model.spelled_out(words).split()  # a learned word of several rows has a column for each
    if not parts:
        raise ParameterError("a word to look up is empty: name one of the prompt's words.")
    prompt = model.spelled_out(model.check_prompt(prompt))
    # "sks" is no part of "tasks", and identifiers may have signs in them ("<sks>"), where \b would not hold
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, parts)) + r"(?!\w)"
    spans = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not spans:
        raise ParameterError(f"the prompt {prompt!r} does not have the word {words!r}: name one that stands in it.")
    encoded = model.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    return [
        1 + i
        for i, (start, end) in enumerate(encoded["offset_mapping"])
        if end > start and any(start < b and end > a for a, b in spans)
    ]


# --- recording -----------------------------------------------------------------------------------------------------


def cross_attention_layers(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """The cross-attention layers (`attn2`) in the order in which a forward pass runs them: down, middle, up.

    A U-Net registers its middle last, so its own order of modules is another.

    One that has none, or some that normalize queries, keys or text, which `attention_probabilities` does not, is a
    ModelError.
    """
    stages = ("down_blocks", "mid_block", "up_blocks")
    layers = [(name, module) for name, module in unet.named_modules() if name.split(".")[-1] == "attn2"]
    if not layers or any(name.split(".")[0] not in stages for name, _ in layers):
        raise ModelError("this U-Net has no cross-attention layers (attn2) in down, middle and up blocks to record.")
    extras = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
    for name, module in layers:
        if found := [extra for extra in extras if getattr(module, extra, None) is not None]:
            raise ModelError(f"the cross-attention layer {name} has a {found[0]}, which is not recorded rightly.")
    return sorted(layers, key=lambda layer: stages.index(layer[0].split(".")[0]))  # stable: within a stage as it is


@dataclass
class AttentionRecord:
    """Recorded attention of chosen words.

    Attributes:
        prompt: whose rows were recorded.
        words: W names, in the order of the maps.
        layers: names of the cross-attention layers, in order of execution.
        maps: (layer, resolution, timestep) -> (N, W, r, r) fp32 on the CPU: probability of reading the word, mean over
            its tokens and over heads. Rows follow the order of the pictures.
    """

    prompt: str
    words: tuple[str, ...]
    layers: tuple[str, ...]
    maps: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def timesteps(self) -> list[int]:
        """Recorded t, from noise to picture."""
        return sorted({t for _, _, t in self.maps}, reverse=True)

    @property
    def resolutions(self) -> list[int]:
        """Sides r of the maps, in places, largest first."""
        return sorted({r for _, r, _ in self.maps}, reverse=True)

    @property
    def statistics_resolution(self) -> int:
        """The one resolution for numbers: 16 where the model has it, else its largest; 0 while nothing is recorded."""
        sides = self.resolutions or [0]
        return STATISTICS_RESOLUTION if STATISTICS_RESOLUTION in sides else sides[0]

    def _of_layers(self, t: int, layer: str = "", resolution: int = 0) -> list[torch.Tensor]:
        """Maps of one timestep in order of execution, of one layer or one resolution only if these are given."""
        keys = [key for key in self.maps if key[2] == t and layer in ("", key[0]) and resolution in (0, key[1])]
        if not keys:
            asked = filter(None, (f"t = {t}", layer, f"{resolution} places" * bool(resolution)))
            raise self._nothing(", ".join(asked))
        return [self.maps[key] for key in sorted(keys, key=lambda key: self.layers.index(key[0]))]

    def _nothing(self, asked: str) -> ModelError:
        return ModelError(
            f"no attention was recorded for {asked}: the record has t = {self.timesteps}, sides {self.resolutions}; "
            f"was the prompt {self.prompt!r} drawn while it was open?"
        )

    def pictures(self, timesteps: Sequence[int] = (), layer: str = "", resolution: int = 0) -> torch.Tensor:
        """Maps to look at, (N, W, R, R): bicubic to the largest resolution, mean over layers, summed over steps. A
        ModelError where nothing was recorded.

        Args:
            timesteps: those to sum; empty = all.
            layer, resolution: take these layers only.
        """
        steps = [
            torch.stack([enlarge(maps, self.resolutions[0]) for maps in self._of_layers(t, layer, resolution)]).mean(0)
            for t in timesteps or self.timesteps
        ]
        if not steps:
            raise self._nothing("any step")
        return functools.reduce(torch.add, steps)

    def statistics(self, t: int, resolution: int = 0) -> torch.Tensor:
        """Maps to count with, (N, W, r, r): mean over the layers of one resolution, nothing enlarged. A ModelError
        where nothing was recorded. `resolution` is r; 0 = `statistics_resolution`.
        """
        return torch.stack(self._of_layers(t, resolution=resolution or self.statistics_resolution)).mean(0)


def enlarge(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Maps (N, W, r, r) at size×size, bicubic; what bicubic pushes below 0 is cut, since no probability is."""
    if maps.shape[-1] == size:
        return maps
    return F.interpolate(maps, (size, size), mode="bicubic", align_corners=False).clamp(min=0)


@contextmanager
def record_attention(
    model: TextToImage, prompt: str, words: Mapping[str, Sequence[int]] | Sequence[str]
) -> Iterator[AttentionRecord]:
    """Inside, every forward pass of the model's U-Net adds its cross-attention to the record.

    Only rows whose text is `prompt` are recorded: under guidance that is the conditional half, and of a batch with
    several prompts the pictures of this one. The layers compute their output as they did before, so pictures do not
    change.

    Args:
        words: names -> columns of the attention matrix; or words of the prompt, which are looked up by
            `token_positions`.

    Raises:
        ParameterError: a word is not in the prompt.
        ModelError: the U-Net has no cross-attention layers, or is being recorded already.
    """
    if not isinstance(words, Mapping):
        words = {word: token_positions(model, prompt, word) for word in words}
    layers = cross_attention_layers(model.unet)
    before = {name: module.processor for name, module in layers}
    if any(isinstance(processor, _Recorder) for processor in before.values()):
        raise ModelError("this model's attention is being recorded already: close that record first.")
    record = AttentionRecord(prompt, tuple(words), tuple(before))
    now = _Pass(model.encode_text([prompt])[0])
    for name, module in layers:
        module.set_processor(_Recorder(before[name], name, list(words.values()), record, now))
    watch = model.unet.register_forward_pre_hook(now.begin, with_kwargs=True)
    try:
        yield record
    finally:
        watch.remove()
        for name, module in layers:
            module.set_processor(before[name])


@dataclass
class _Pass:
    """What a layer's processor is not told about the current forward pass.

    Attributes:
        text: the recorded prompt's hidden states (L, D).
        rows: indices of the batch's rows whose text that is.
        t: their timesteps.
    """

    text: torch.Tensor
    rows: list[int] = field(default_factory=list)
    t: list[int] = field(default_factory=list)

    def begin(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the U-Net."""
        texts = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timesteps = torch.as_tensor(timestep).reshape(-1).expand(len(texts)).tolist()
        same = (texts.detach() == self.text.to(texts)).flatten(1).all(1)
        self.rows = same.nonzero().flatten().tolist()
        self.t = [int(timesteps[row]) for row in self.rows]


class _Recorder:
    """An attention processor that records the probabilities; the layer's own processor computes the output."""

    def __init__(self, own, name: str, positions: list[Sequence[int]], record: AttentionRecord, now: _Pass):
        self.own, self.name, self.positions, self.record, self.now = own, name, positions, record, now

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        if self.now.rows:
            self._note(attn, hidden_states, encoder_hidden_states)
        return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    @torch.no_grad()
    def _note(self, attn, places: torch.Tensor, text: torch.Tensor) -> None:
        n, side = len(self.now.rows), math.isqrt(places.shape[1])
        maps = attention_probabilities(attn, places[self.now.rows], text[self.now.rows]).mean(1)  # (N, r·r, L)
        maps = torch.stack([maps[..., columns].mean(-1) for columns in map(list, self.positions)], 1)
        maps = maps.view(n, len(self.positions), side, side).cpu()
        for t in dict.fromkeys(self.now.t):
            mine = maps[[i for i, own in enumerate(self.now.t) if own == t]]
            key = (self.name, side, t)
            self.record.maps[key] = torch.cat([self.record.maps.get(key, mine[:0]), mine])


def attention_probabilities(attn: nn.Module, places: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """softmax(Q Kᵀ · scale) of a cross-attention layer of Stable Diffusion's kind, (N, h, r·r, L) fp32; every row sums
    to 1.

    Args:
        attn: a diffusers `Attention` layer; an adapter on its projections takes part.
        places: (N, r·r, C).
        text: (N, L, D).
    """
    # under autocast the projections compute as they do in the layer's own pass; scores and softmax are fp32
    q, k = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(places), attn.to_k(text)))
    with torch.autocast(places.device.type, enabled=False):
        return (q.float() @ k.float().transpose(-1, -2) * attn.scale).softmax(-1)


# --- overlap with a mask -------------------------------------------------------------------------------------------


def mask_at(mask: Image.Image, resolution: int) -> torch.Tensor:
    """Share of each place that the mask covers, (r, r) in [0, 1]: area average of an 8-bit mask. One that covers
    nothing, or everything, has nothing on one of its sides and is a ScoreError.
    """
    pixels = torch.from_numpy(np.array(mask.convert("L"))).float()[None, None] / 255
    covered = F.adaptive_avg_pool2d(pixels, resolution)[0, 0]
    if not 0 < covered.mean() < 1:
        raise ScoreError("the mask covers all or nothing of the picture: overlap needs something on both of its sides.")
    return covered


def lift(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of a map inside the mask, relative to an even spread: (Σ a·m / Σ a) / mean(m); (...).

    1 is chance, 1 / mean(m) is all attention inside.

    Args:
        maps: a, (..., r, r), not negative.
        mask: m, (r, r) in [0, 1], from `mask_at`.

    A map without any attention, or a mask that covers nothing, is a ScoreError.
    """
    total = maps.sum((-1, -2))
    if not bool((total > 0).all()) or not 0 < mask.mean() <= 1:
        raise ScoreError("lift is not defined: a map has no attention in it, or the mask covers nothing.")
    return (maps * mask).sum((-1, -2)) / total / mask.mean()


def auc(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Probability that a place of maps (..., r, r) inside the mask (r, r) in [0, 1] has more attention than one outside
    (Hanley and McNeil 1982).

    A place is inside when the mask covers at least half of it; equal values count half. 0.5 is chance; (...).

    Where no place is inside, or none outside, it is a ScoreError.
    """
    inside = mask.flatten() >= 0.5
    if inside.all() or not inside.any():
        raise ScoreError("AUC is not defined: no place of the map is inside the mask, or none is outside.")
    flat = maps.flatten(-2)
    difference = flat[..., inside][..., :, None] - flat[..., ~inside][..., None, :]
    return ((difference > 0).float() + 0.5 * (difference == 0)).mean((-1, -2))
