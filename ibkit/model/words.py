"""Words that a text encoder learns: rows of an embedding beside its table."""

import torch


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
