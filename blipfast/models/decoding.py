"""One step of the MED decoder for many images at once, with static caches.

An image has one set of cross-attention keys and values, whatever the number of its beams. Its self-attention cache has
a slot for every prompt token, shared by all beams, and one for every token of every beam. Beams that change places
copy nothing: a mask says which slots are a beam's own past.
Shapes: n images, k beams, P prompt tokens, S slots, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blipfast.ops.attention import attention

from .med import BertLMHeadModel
from .packed import ImageStates


class Decoding:
    """Caches for up to as many images as `images` has; the first n of them are in use."""

    def __init__(
        self, decoder: BertLMHeadModel, images: ImageStates, beams: int, prompt: int, max_length: int
    ):
        """images: of the first batch, kept and later overwritten in place. prompt: its number of tokens."""
        self.decoder, self.images, self.beams, self.prompt = decoder, images, beams, prompt
        key = images.layers[0][0]
        slots = prompt + (max_length - prompt) * beams
        shape = (len(key), slots, *key.shape[2:])
        self.cache = [(key.new_zeros(shape), key.new_zeros(shape)) for _ in images.layers]
        self.past = torch.zeros(len(key), beams, slots, dtype=torch.bool, device=key.device)
        self.past[..., :prompt] = True

    def put(self, place: int, images: ImageStates, i: int) -> None:
        """Let image i of `images` take a place; its past is that of the prompt."""
        for mine, theirs in zip(self.images.layers, images.layers):
            for old, new in zip(mine, theirs):
                old[place] = new[i]
        if self.images.mask is not None:
            self.images.mask[place] = images.mask[i]
        self.past[place] = False
        self.past[place, :, : self.prompt] = True

    def move(self, place: int, to: int) -> None:
        """Let an image take the place of another, which has ended."""
        self.put(to, self.images, place)
        self.past[to] = self.past[place]
        for key, value in self.cache:
            key[to], value[to] = key[place], value[place]

    def reorder(self, first: int, last: int, parents: Tensor) -> None:
        """Beams of images first ... last - 1 go on from their `parents` [n, k]."""
        past = self.past[first:last]
        self.past[first:last] = past.gather(1, parents[..., None].expand_as(past))

    def read_prompt(self, first: int, last: int, prompt: Tensor) -> Tensor:
        """Logits [n, 1, V] after the prompt [P], for images first ... last - 1."""
        n, P = last - first, len(prompt)
        places = torch.arange(P, device=prompt.device).expand(n, P)
        mask = torch.ones(P, P, dtype=torch.bool, device=prompt.device).tril().expand(n, P, P)
        return self.step(first, last, prompt.expand(n, P), places, places, mask, last_only=True)

    def read_tokens(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Logits [n, k, V] after each beam's newest token [n, k]; lengths: of each image's texts, with that token."""
        n, k = tokens.shape
        position = torch.tensor(lengths, device=tokens.device)[:, None] - 1
        beam = torch.arange(k, device=tokens.device)
        slots = self.prompt + (position - self.prompt) * k + beam
        self.past[:n].scatter_(2, slots[..., None], True)
        used = self.prompt + (max(lengths) - self.prompt) * k
        mask = self.past[:n, :, :used]
        return self.step(0, n, tokens, position.expand(n, k), slots, mask)

    def step(
        self,
        first: int,
        last: int,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        last_only: bool = False,
    ) -> Tensor:
        """Logits after tokens [n, q], whose keys and values go into `slots`; mask [n, q, used]: the slots each sees."""
        bert = self.decoder.bert
        rows = torch.arange(first, last, device=tokens.device)[:, None]
        used = mask.shape[-1]
        seen = None if self.images.mask is None else self.images.mask[first:last, None, None]
        x = bert.embeddings(tokens, positions)
        for i, layer in enumerate(bert.encoder.layer):
            block = layer.attention
            heads = self.cache[i][0].shape[2]
            for cache, linear in zip(self.cache[i], (block.self.key, block.self.value)):
                cache[rows, slots] = linear(x).unflatten(-1, (heads, -1)).to(cache.dtype)
            if last_only and i == len(self.cache) - 1:
                x, mask = x[:, -1:], mask[:, -1:]
            own = (cache[first:last, :used].transpose(1, 2) for cache in self.cache[i])
            x = block.output(attend(block.self.query(x), *own, mask[:, None]), x)
            block = layer.crossattention
            image = (states[first:last].transpose(1, 2) for states in self.images.layers[i])
            x = block.output(attend(block.self.query(x), *image, seen), x)
            x = layer.output(layer.intermediate(x), x)
        return self.decoder.cls(x)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Queries [n, q, D] over keys and values [n, H, S, d] -> [n, q, D]."""
    split = query.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    return attention(split, key, value, mask).transpose(1, 2).flatten(2)
