"""Texts of different lengths one behind the other, so that no padding is computed.

A batch of B texts with T tokens in all is a tensor of T rows and a `Rows`, which says where each text is in it. `Reads`
says which image each text looks at. Attention alone needs the texts apart: it lays them out in a padded grid and takes
them back; everything else in a transformer works row by row. Lengths are known on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention


class Grid:
    """T rows, each with a cell in a table of `height` lines and `width` columns."""

    def __init__(self, line: np.ndarray, counts: np.ndarray, device):
        """line [T]: each row's line; counts [height]: how many rows each has. Rows keep their order in their line."""
        self.height, self.width = len(counts), int(counts.max(initial=0))
        starts = np.concatenate([[0], counts.cumsum()[:-1]])
        order = np.argsort(line, kind="stable")
        column = np.empty(len(line), np.int64)
        column[order] = np.arange(len(line)) - starts[line[order]]
        cell = line * self.width + column
        self.full = len(line) == self.height * self.width and bool((cell == np.arange(len(line))).all())
        self.cell = torch.from_numpy(cell).to(device, non_blocking=True)

    def lay_out(self, rows: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] -> [height, width, ...], `fill` where there is no row."""
        if not self.full:
            table = rows.new_full((self.height * self.width, *rows.shape[1:]), fill)
            rows = table.index_copy(0, self.cell, rows)
        return rows.view(self.height, self.width, *rows.shape[1:])

    def take_back(self, table: Tensor) -> Tensor:
        """[height, width, ...] -> [T, ...]."""
        rows = table.flatten(0, 1)
        return rows if self.full else rows[self.cell]


class Rows(Grid):
    """Where the tokens of B texts are: text b has lengths[b] consecutive rows. One line of the grid a text."""

    def __init__(self, lengths: Sequence[int], device, *, start: int = 0):
        """`start`: the place in its text of a text's first row here (see `part`)."""
        self.lengths = np.asarray(lengths, np.int64)
        self.text = np.repeat(np.arange(len(self.lengths)), self.lengths)  # of each row
        super().__init__(self.text, self.lengths, device)
        self.first = self.lengths.cumsum() - self.lengths
        place = start + np.arange(len(self.text)) - self.first[self.text]
        self.position = torch.from_numpy(place).to(device, non_blocking=True)
        self.device = device

    def __len__(self) -> int:
        return len(self.text)

    def part(self, start: int, end: int) -> tuple[Rows, Tensor]:
        """Of every text the tokens from `start` to before `end`, as of a slice (-1: all but the last).

        Returns their Rows and which rows of this batch they are.
        """
        ends = self.lengths + end if end < 0 else np.minimum(self.lengths, end)
        part = Rows(np.maximum(ends - start, 0), self.device, start=start)
        inside = np.arange(len(part)) - part.first[part.text]
        rows = self.first[part.text] + start + inside
        return part, torch.from_numpy(rows).to(self.device, non_blocking=True)

    def attention_mask(self, queries: Rows, causal: bool) -> Tensor | None:
        """Which keys (this grid's columns) a query may see: [B, 1, 1 or Tq, Tk] bool; None if all."""
        if causal:
            column = torch.arange(self.width, device=self.device)
            return (column <= queries.lay_out(queries.position)[..., None])[:, None]
        if self.full:
            return None
        return self.lay_out(torch.ones_like(self.position, dtype=torch.bool), False)[:, None, None]


class Ragged:
    """Token ids [T] of texts of different lengths, and their `rows`."""

    def __init__(self, ids: Tensor, rows: Rows):
        self.ids, self.rows = ids, rows

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], device, first_token: int | None = None) -> Ragged:
        """From token ids on the host. `first_token` takes the place of every text's first, [CLS].

        Raises ValueError for a text without tokens.
        """
        if not len(texts) or not all(map(len, texts)):
            raise ValueError("Every text needs at least one token, and a batch at least one text.")
        ids = np.concatenate([np.asarray(text, np.int64) for text in texts])
        rows = Rows([len(text) for text in texts], device)
        if first_token is not None:
            ids[rows.first] = first_token
        return cls(torch.from_numpy(ids).to(device, non_blocking=True), rows)


class Reads(Grid):
    """Which image each text looks at; the tokens of all texts of one image stand side by side as its queries."""

    def __init__(self, rows: Rows, image: Sequence[int] | None, images: int):
        """image [B]: each text's; None: text b looks at image b. Raises ValueError for an image that is not there."""
        B = len(rows.lengths)
        image = np.arange(B) if image is None else np.asarray(image, np.int64)
        if len(image) != B or (B and not 0 <= image.min() <= image.max() < images):
            raise ValueError(f"{B} texts read images {image.tolist()[:8]}...; there are {images} images.")
        counts = np.bincount(image, weights=rows.lengths, minlength=images).astype(np.int64)
        super().__init__(image[rows.text], counts, rows.device)


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Rows,
    keys: Rows,
    mask: Tensor | None,
    heads: int,
    dropout: float,
) -> Tensor:
    """Attention of each text over itself: query [Tq, D], key and value [Tk, D] -> [Tq, D].

    mask: `keys.attention_mask(queries, causal)`, made once for all layers.
    """

    def split(x: Tensor, grid: Grid) -> Tensor:
        return grid.lay_out(x).unflatten(-1, (heads, -1)).transpose(1, 2)

    context = attention(split(query, queries), split(key, keys), split(value, keys), mask, dropout)
    return queries.take_back(context.transpose(1, 2).flatten(2))


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reads: Reads,
    mask: Tensor | None,
    dropout: float,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Attention of packed tokens [T, D] to the image that each reads: keys and values [M, N, H, d] -> [T, D].

    mask: bool [M, N], the image tokens that count. keep: is given the attention map [M, H, tokens of the image, N].
    """
    heads = key.shape[2]
    laid_out = reads.lay_out(query).unflatten(-1, (heads, -1)).transpose(1, 2)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    mask = None if mask is None else mask[:, None, None]
    if keep is None:
        context = attention(laid_out, key, value, mask, dropout)
    else:
        scores = laid_out @ key.transpose(-2, -1) / key.shape[-1] ** 0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        keep(weights)
        context = F.dropout(weights, dropout) @ value
    return reads.take_back(context.transpose(1, 2).flatten(2))
