"""One step of the MED decoder for many images at once, with static caches.

What the beams of an image look at is held once (`image_memory`). An image's self-attention cache has a slot for every
prompt token, shared by all beams, and one for every token of every beam. Beams that change places copy nothing: a mask
says which slots are a beam's own past.
Shapes: n images, k beams, P prompt tokens, S slots, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops.cached_attention import cached_attention
from blipfast.ops.linear import linear

from .image_memory import ImageMemory
from .med import BertLMHeadModel, BertSelfAttention
from .packing import stackable, stacked


class Decoding:
    """Caches for up to as many images as `images` has; the first n of them are in use."""

    def __init__(
        self, decoder: BertLMHeadModel, images: ImageMemory, beams: int, prompt: int, max_length: int
    ):
        """images: of the first batch, kept and later overwritten in place. prompt: its number of tokens."""
        self.decoder, self.images, self.beams, self.prompt = decoder, images, beams, prompt
        heads, like = decoder.config.num_attention_heads, images.tensors[0]
        slots = text_rows(beams, prompt, max_length)
        shape = (len(images), slots, 2, heads, decoder.config.hidden_size // heads)
        self.cache = [like.new_zeros(shape) for _ in decoder.bert.encoder.layer]  # keys and values
        self.past = torch.zeros(len(images), beams, slots, dtype=torch.bool, device=like.device)
        self.past[..., :prompt] = True
        # of each beam's token at position 0, if the beams began there and not after the prompt
        self.slots = torch.arange(beams, device=like.device) + prompt - prompt * beams
        self.weights = self.stack()

    def put(self, first: int, images: ImageMemory) -> None:
        """Let images take the places from `first` on; their past is that of the prompt."""
        here = slice(first, first + len(images))
        self.images.put(here, images)
        self.past[here] = False
        self.past[here, :, : self.prompt] = True

    def move(self, places: Tensor, to: Tensor) -> None:
        """Let images take the places of others, which have ended."""
        for state in [*self.images.tensors, self.past, *self.cache]:
            state[to] = state[places]

    def read_prompt(self, here: slice, prompt: Tensor) -> Tensor:
        """Logits [n, 1, V] after the prompt [P], for images `here`."""
        n, P = here.stop - here.start, len(prompt)
        places = torch.arange(P, device=prompt.device).expand(n, P)
        mask = torch.ones(P, P, dtype=torch.bool, device=prompt.device).tril().expand(n, P, P)
        return self.step(here, prompt.expand(n, P), places, places, mask, last_only=True)

    def read_tokens(self, tokens: Tensor, position: Tensor, longest: int) -> Tensor:
        """Logits [n, k, V] after the newest token [n, k] of each beam of the first n images.

        position [n, 1]: of that token in each image's texts, below `longest`. Nothing is read on the host.
        """
        n, k = tokens.shape
        slots = torch.add(self.slots, position, alpha=k)
        self.past[:n].scatter_(2, slots[..., None], True)
        mask = self.past[:n, :, : text_rows(k, self.prompt, longest)]
        return self.step(slice(0, n), tokens, position.expand(n, k), slots, mask)

    def step(
        self,
        here: slice,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        last_only: bool = False,
    ) -> Tensor:
        """Logits after tokens [n, q] of images `here`, whose keys and values go into `slots`.

        mask [n, q, used]: the slots that each token sees. last_only: logits after the last token alone, [n, 1, V].
        """
        bert = self.decoder.bert
        x = bert.embeddings(tokens, positions)
        for i, (layer, cache) in enumerate(zip(bert.encoder.layer, self.cache)):
            block = layer.attention
            qkv = self.project(i, block.self, x)
            context = cached_attention(qkv.to(cache.dtype), cache[here], slots, mask).flatten(2)
            if last_only and i == len(self.cache) - 1:
                x, context = x[:, -1:], context[:, -1:]
            x = block.output(context, x)
            block = layer.crossattention
            context = self.images.context(i, block.self, x, here)
            x = layer.feed_forward(block.output(context, x))
        return self.decoder.cls(x)

    def project(self, i: int, block: BertSelfAttention, x: Tensor) -> Tensor:
        """Layer i's queries, keys and values of x [n, q, D]: [n, q, 3, H, d]."""
        three = (block.query, block.key, block.value)
        if block.joined is not None and all(map(block.stands_for, three)):
            made = block.joined(x).unflatten(-1, (3, -1))
        elif self.weights is None:
            made = torch.stack([linear(layer, x) for layer in three], -2)
        else:
            made = F.linear(x, *self.weights[i]).unflatten(-1, (3, -1))
        return made.unflatten(-1, (block.num_attention_heads, -1))

    def stack(self) -> list[tuple[Tensor, Tensor]] | None:
        """Each layer's weights of queries, keys and values as one matrix, and their biases: copies. None if no use."""
        blocks = [layer.attention.self for layer in self.decoder.bert.encoder.layer]
        layers = [(block.query, block.key, block.value) for block in blocks]
        if torch.is_autocast_enabled(self.past.device.type) or not all(map(stackable, layers)):
            return None
        return [stacked(three) for three in layers]

    def renew(self) -> None:
        """Copy the weights again, in place: they may have been trained since."""
        for old, new in zip(self.weights or (), self.stack() or ()):
            for mine, theirs in zip(old, new):
                mine.copy_(theirs)


def text_rows(beams: int, prompt: int, max_length: int) -> int:
    """Tokens of an image's texts: the prompt once, and the rest of every beam."""
    return prompt + (max_length - prompt) * beams
