"""The delta `tokens`: new words for the text encoder, one or more rows of its embedding (Gal et al. 2022).

Settings: word, such as "<sks>"; start, a word of one token whose row the new ones begin as copies of; n_vectors.

The rows are a parameter of their own, looked up beside the table: nothing else of the text encoder can move, not by
weight decay either. Of several vectors the others are called `<sks>_1`, `<sks>_2` ..., and a prompt names the first,
as in diffusers (`TextToImage.spelled_out`).
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ibkit.errors import ModelError
from ibkit.model.text_to_image import TextToImage


class WiderEmbedding(torch.nn.Module):
    """A token embedding with more rows behind those of the one below, which stays as it is.

    The rows are a parameter of their own: neither a gradient nor weight decay can move another.

    Args:
        below: the embedding so far, ids (...) -> (..., D).
        name: of the delta that brings the rows.
        rows: (n, D).
        first: id of the first of them.
    """

    def __init__(self, below: torch.nn.Module, name: str, rows: torch.Tensor, first: int):
        super().__init__()
        self.below, self.name, self.first = below, name, first
        self.rows = torch.nn.Parameter(rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        row = ids - self.first
        own = (row >= 0) & (row < len(self.rows))
        others = self.below(ids.masked_fill(own, 0))
        return torch.where(own[..., None], self.rows[row.clamp(0, len(self.rows) - 1)], others)


def attach(model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
    """New rows that start as the class word's; the model gets a text encoder and a tokenizer of its own."""
    add_word(model, name, settings["word"], settings["start"], settings["n_vectors"])


def add_word(model: TextToImage, name: str, word: str, start: str, n_vectors: int = 1) -> torch.nn.Parameter:
    """Teach the model a word and return its rows (n_vectors, D); a ModelError where the tokenizer has the word, or the
    one to start from is not one token.
    """
    ids = model.token_ids(start)
    if len(ids) != 1:
        raise ModelError(
            f"{word!r} is to start as {start!r}, which is {len(ids)} tokens in {model.name}: give a word "
            "that the model reads as one token as the setting start."
        )
    words = [word, *(f"{word}_{i}" for i in range(1, n_vectors))]
    if taken := [w for w in words if len(model.token_ids(w)) == 1]:
        raise ModelError(f"{model.name} knows the word {taken[0]!r} already: choose another identifier.")
    # modules of its own and the same weights: models that share an encoder keep their words apart
    shared = {id(tensor): tensor for tensor in (*model.text_encoder.parameters(), *model.text_encoder.buffers())}
    tokenizer, encoder = copy.deepcopy(model.tokenizer), copy.deepcopy(model.text_encoder, shared)
    below = encoder.get_input_embeddings()
    rows = below(torch.tensor(ids, device=model.device)).detach().repeat(n_vectors, 1)
    wider = WiderEmbedding(below, name, rows, first=len(tokenizer))
    tokenizer.add_tokens(words)
    encoder.set_input_embeddings(wider)
    model.tokenizer, model.text_encoder = tokenizer, encoder
    model.forget_text()
    return wider.rows


def rows_of(model: TextToImage, name: str) -> torch.nn.Parameter:
    """The rows of a delta's word, (n, D)."""
    return next(m.rows for m in model.text_encoder.modules() if isinstance(m, WiderEmbedding) and m.name == name)


def parameters(model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
    """Its rows."""
    return {"rows": rows_of(model, name)}


def without(model: TextToImage, name: str) -> NoReturn:
    """Not possible: a prompt with the word means nothing to what lies below."""
    raise ModelError(f"without {name!r} the model cannot read the word that it brings: load the base model beside it.")


def fold(model: TextToImage, name: str) -> None:
    """Make the text encoder's embedding one table again, with the rows of all learned words at its end."""
    embedding, encoder = model.text_encoder.get_input_embeddings(), model.text_encoder
    tables: list[torch.Tensor] = []
    while isinstance(embedding, WiderEmbedding):
        tables.insert(0, embedding.rows.detach())
        embedding = embedding.below
    table = torch.cat([embedding.weight.detach(), *tables])
    encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    encoder.config.vocab_size = len(table)


def export(model: TextToImage, name: str, folder: Path) -> None:
    """Write `learned_embeds.safetensors`, for diffusers' `load_textual_inversion(folder)` on the base model."""
    export_rows(model.deltas[name].settings["word"], rows_of(model, name), folder)


def export_rows(word: str, rows: torch.Tensor, folder: Path) -> None:
    """One row as a vector, several as a matrix, as diffusers writes them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensor = rows.detach().cpu().clone()
    save_file({word: tensor[0] if len(tensor) == 1 else tensor}, folder / "learned_embeds.safetensors")
