"""Texts of different lengths one behind the other, so that no padding is computed.

A batch of B texts with T tokens in all is a tensor of T rows and a `Rows`, which says where each text is in it. `reads`
says which image each text looks at. Attention alone needs the texts apart (`blipfast.ops.attention`); everything else
in a transformer works row by row. Lengths are known on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.ops.attention import Layout, apart, attention_varlen
from blipfast.ops.linear import is_plain

BLOCK = 64  # see `in_blocks`


class Rows:
    """Where the tokens of B texts are: text b has lengths[b] consecutive rows of T."""

    def __init__(self, lengths: Sequence[int], device, *, start: int = 0):
        """`start`: the place in its text of a text's first row here (see `part`)."""
        self.lengths, self.device = np.asarray(lengths, np.int64), device
        self.text = np.repeat(np.arange(len(self.lengths)), self.lengths)  # of each row
        self.first = self.lengths.cumsum() - self.lengths
        self.start = start

    def __len__(self) -> int:
        return len(self.text)

    @cached_property
    def position(self) -> Tensor:
        """[T], of each token in its text."""
        place = self.start + np.arange(len(self)) - self.first[self.text]
        return torch.from_numpy(place).to(self.device, non_blocking=True)

    @cached_property
    def layout(self) -> Layout:
        """Of each text over itself."""
        return Layout(self.lengths, device=self.device)

    def lay_out(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [B, longest, ...], zeros where a text has no token."""
        return self.layout.queries.lay_out(rows)

    @property
    def mask(self) -> Tensor:
        """Where `lay_out` puts tokens, bool [B, longest]."""
        return self.lay_out(torch.ones(len(self), dtype=torch.bool, device=self.device))

    def part(self, start: int, end: int) -> tuple[Rows, Tensor]:
        """Of every text the tokens from `start` to before `end`, as of a slice (-1: all but the last).

        Returns their Rows and which rows of this batch they are.
        """
        ends = self.lengths + end if end < 0 else np.minimum(self.lengths, end)
        part = Rows(np.maximum(ends - start, 0), self.device, start=start)
        inside = np.arange(len(part)) - part.first[part.text]
        rows = self.first[part.text] + start + inside
        return part, torch.from_numpy(rows).to(self.device, non_blocking=True)


class Ragged:
    """Token ids [T] of texts of different lengths, and their `rows`.

    begun: what a model made of them before they look at an image, states [T, D] (see `packed.begin`).
    """

    def __init__(self, ids: Tensor, rows: Rows, begun: Tensor | None = None):
        self.ids, self.rows, self.begun = ids, rows, begun

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

    def pick(self, texts: Sequence[int]) -> Ragged:
        """Copies of these texts, in this order, any of them any number of times."""
        old, texts = self.rows, np.asarray(texts, np.int64)
        rows = Rows(old.lengths[texts], old.device)
        taken = np.arange(len(rows)) + (old.first[texts] - rows.first)[rows.text]
        taken = torch.from_numpy(taken).to(old.device, non_blocking=True)
        return Ragged(self.ids[taken], rows, None if self.begun is None else self.begun[taken])


def better_stacked(device: torch.device) -> bool:
    """Whether several matrices are stacked to multiply a tensor once: many small products take a GPU longer than one,
    while on a CPU stacking takes as long as a product."""
    return device.type != "cpu"


def stackable(layers: Sequence[nn.Module]) -> bool:
    """Whether to stack them, here: plain linear layers, on a GPU, whose weights are whole (ZeRO-3 cuts them)."""
    whole = is_plain(*layers) and not any(hasattr(layer.weight, "ds_id") for layer in layers)
    return whole and better_stacked(layers[0].weight.device)


def stacked(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear layer whose outputs are those of `layers` side by side."""
    return tuple(torch.cat([getattr(layer, kind) for layer in layers]) for kind in ("weight", "bias"))


def in_blocks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`function` of tensors [T, D] whose rows do not meet in it.

    On a CPU in bf16, T is rounded up by rows of zeros: oneDNN compiles a matrix product for every T that it has not
    seen, which took a quarter of the demo's time and a gigabyte of memory.
    """
    T = len(rows[0])
    if rows[0].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return function(*rows)
    return function(*(F.pad(x, (0, 0, 0, -T % BLOCK)) for x in rows))[:T]


def reads(lengths: Sequence[int], image: Sequence[int], images: int, tokens: int, device) -> Layout:
    """Which of `images` images, of `tokens` tokens each, the texts of these lengths look at: text b at image[b].

    Raises ValueError for an image that is not there.
    """
    image = list(image)
    if len(image) != len(lengths) or not all(0 <= m < images for m in image):
        raise ValueError(f"{len(lengths)} texts read images {image[:8]}...; there are {images} images.")
    index = None if image == list(range(images)) else image
    return Layout(lengths, [tokens] * images, index, device=device)


def cross_attention(
    query: Tensor,
    key_value: Sequence[Tensor],
    layout: Layout,
    mask: Tensor | None,
    dropout: float,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Attention of packed tokens [T, D] to the image that each reads: keys and values [M, N, H, d], or both in one
    tensor [M, N, 2, H, d], -> [T, D].

    mask: bool [M, N], the image tokens that count. keep: is given the attention map [M, H, tokens of the image, N].
    """
    parts = (query.unflatten(-1, key_value[0].shape[-2:]), *key_value)
    if keep is None:
        return attention_varlen(parts, layout, key_mask=mask, dropout=dropout).flatten(1)
    query, key, value = apart(parts)
    laid_out, key, value = (x.transpose(1, 2) for x in (layout.queries.lay_out(query), key, value))
    scores = laid_out @ key.transpose(-2, -1) / key.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    keep(weights)
    context = F.dropout(weights, dropout) @ value
    return layout.queries.take_back(context.transpose(1, 2)).flatten(1)
