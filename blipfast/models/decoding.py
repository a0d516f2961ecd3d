"""One step of the MED decoder for many images at once, with static caches.

What the beams of an image look at is held once (`image_memory`). An image's self-attention cache has a slot for every
prompt token, shared by all beams, and one for every token of every beam. Beams that change places copy nothing: a mask
says which slots are a beam's own past.
Shapes: n images, k beams, P prompt tokens, S slots, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .few_rows import linear
from .image_memory import ImageMemory, attend
from .med import BertLMHeadModel, BertOutput, BertSelfOutput, residual_norm


class Decoding:
    """Caches for up to as many images as `images` has; the first n of them are in use."""

    def __init__(
        self, decoder: BertLMHeadModel, images: ImageMemory, beams: int, prompt: int, max_length: int
    ):
        """images: of the first batch, kept and later overwritten in place. prompt: its number of tokens."""
        self.decoder, self.images, self.beams, self.prompt = decoder, images, beams, prompt
        heads, like = decoder.config.num_attention_heads, images.tensors[0]
        slots = text_rows(beams, prompt, max_length)
        shape = (len(images), slots, heads, decoder.config.hidden_size // heads)
        self.cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in decoder.bert.encoder.layer]
        self.past = torch.zeros(len(images), beams, slots, dtype=torch.bool, device=like.device)
        self.past[..., :prompt] = True

    def put(self, place: int, images: ImageMemory, i: int) -> None:
        """Let image i of `images` take a place; its past is that of the prompt."""
        self.images.put(place, images, i)
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
        here = slice(first, last)
        rows = torch.arange(first, last, device=tokens.device)[:, None]
        used = mask.shape[-1]
        x = bert.embeddings(tokens, positions)
        for i, layer in enumerate(bert.encoder.layer):
            block = layer.attention
            heads = self.cache[i][0].shape[2]
            for cache, made_by in zip(self.cache[i], (block.self.key, block.self.value)):
                cache[rows, slots] = linear(made_by, x).unflatten(-1, (heads, -1)).to(cache.dtype)
            if last_only and i == len(self.cache) - 1:
                x, mask = x[:, -1:], mask[:, -1:]
            own = (cache[here, :used].transpose(1, 2) for cache in self.cache[i])
            context = attend(linear(block.self.query, x), *own, mask[:, None])
            x = close(block.output, context, x)
            block = layer.crossattention
            context = self.images.context(i, block.self, x, here)
            x = close(block.output, context, x)
            inner = linear(layer.intermediate.dense, x, gelu=True)
            x = close(layer.output, inner, x)
        head = self.decoder.cls.predictions
        x = head.transform.LayerNorm(linear(head.transform.dense, x, gelu=True))
        return linear(head.decoder, x)


def close(output: BertSelfOutput | BertOutput, branch: Tensor, x: Tensor) -> Tensor:
    """What `output(branch, x)` gives, of few rows: projection, residual, LayerNorm."""
    return residual_norm(output, linear(output.dense, branch), x)


def text_rows(beams: int, prompt: int, max_length: int) -> int:
    """Tokens of an image's texts: the prompt once, and the rest of every beam."""
    return prompt + (max_length - prompt) * beams
