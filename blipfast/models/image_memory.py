"""Image memory, what the decoder attends to while it writes: keys and values of images, or their tokens as they are.

A score q . (W_k e) is (W_k^T q) . e, and a weighted sum of values W_v e is W_v times that sum of the tokens e. So both
matrices can be multiplied with each query instead of with each token: the tokens are keys and values for all layers
and heads. Worth it for short texts, where queries are few. The same to rounding; softmax does not see the keys' bias,
which adds one number to all scores of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blipfast.ops.attention import attention
from blipfast.ops.linear import is_plain, linear, onednn_wins, product
from blipfast.processor import products_win

from .med import BertEncoder, BertSelfAttention
from .packed import ImageStates, image_states, in_dtype_of


def image_memory(encoder: BertEncoder, image_embeds: Tensor, mask: Tensor | None, rows: int) -> ImageMemory:
    """Of images [M, N, D_v]: whichever costs fewer products where an image's texts have `rows` tokens in all.

    mask [M, N]: nonzero where a token counts. Tokens on a CPU only: GPUs make keys and values in no time, and have
    kernels for them. Under autocast parts of weights would be cast at every step.
    """
    (N, D_v), D, H = image_embeds.shape[1:], encoder.config.hidden_size, encoder.config.num_attention_heads
    as_tokens = rows * (H * N * D_v + D * D_v)
    as_keys = N * D * D_v + rows * N * D
    blocks = [layer.crossattention.self for layer in encoder.layer]
    layers = (layer for block in blocks for layer in (block.key, block.value))
    slow = image_embeds.device.type != "cpu" or torch.is_autocast_enabled("cpu") or as_tokens >= as_keys
    if slow or not is_plain(*layers):
        return KeysValues(image_states(encoder, image_embeds, mask))
    return Tokens(in_dtype_of(blocks[0].key, image_embeds), mask)


class ImageMemory:
    """M images, [M, ...] in each of `tensors`; the last of these is the mask, bool [M, N], if there is one.

    Made of tensors of its own: images that come overwrite those that go.
    """

    def __init__(self, tensors: list[Tensor], mask: Tensor | None):
        self.mask = None if mask is None else mask.to(torch.bool, copy=True)
        self.tensors = tensors if mask is None else [*tensors, self.mask]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def put(self, here: slice, others: ImageMemory) -> None:
        """Let `others` take the places of images."""
        for mine, theirs in zip(self.tensors, others.tensors, strict=True):
            mine[here] = theirs

    def seen(self, here: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[here, None, None]

    def context(self, i: int, block: BertSelfAttention, x: Tensor, here: slice) -> Tensor:
        """Layer i's cross-attention, of x [n, q, D] over images `here`, to be projected still: [n, q, D]."""
        raise NotImplementedError


class KeysValues(ImageMemory):
    """Every layer's keys and values, each [M, N, H, d]."""

    def __init__(self, images: ImageStates):
        pairs = (layer if len(layer) == 2 else layer[0].unbind(2) for layer in images.layers)
        super().__init__([x for key_value in pairs for x in key_value], images.mask)

    def context(self, i: int, block: BertSelfAttention, x: Tensor, here: slice) -> Tensor:
        key, value = (states[here].transpose(1, 2) for states in self.tensors[2 * i : 2 * i + 2])
        return attend(linear(block.query, x), key, value, self.seen(here))


class Tokens(ImageMemory):
    """Image tokens [M, N, D_v] as they are, and the same transposed, which the scores are made of."""

    def __init__(self, image_embeds: Tensor, mask: Tensor | None):
        super().__init__([image_embeds.clone(), image_embeds.mT.contiguous()], mask)

    def context(self, i: int, block: BertSelfAttention, x: Tensor, here: slice) -> Tensor:
        H, (n, q) = block.num_attention_heads, x.shape[:2]
        W_k, W_v = (layer.weight.unflatten(0, (H, -1)) for layer in (block.key, block.value))
        query = linear(block.query, x).unflatten(-1, (H, -1)).permute(2, 0, 1, 3) * W_k.shape[1] ** -0.5
        query = torch.bmm(query.flatten(1, 2), W_k).unflatten(1, (n, q)).transpose(0, 1).flatten(1, 2)
        sums = self.sums(query, here).unflatten(1, (H, q)).transpose(0, 1).flatten(1, 2)
        values = torch.bmm(sums, W_v.mT).unflatten(1, (n, q)).permute(1, 2, 0, 3)
        return values.flatten(2) + block.value.bias

    def sums(self, query: Tensor, here: slice) -> Tensor:
        """Sums of tokens weighted by the softmax of their scores, [n, r, D_v] for scaled queries [n, r, D_v]."""
        tokens, transposed = (x[here] for x in self.tensors[:2])
        seen = self.seen(here)
        if query.dtype != torch.float32 and not products_win(query.dtype):
            return attention(query[:, None], tokens[:, None], tokens[:, None], seen, scale=1.0).squeeze(1)
        apart = query.dtype == torch.float32 and onednn_wins(query.shape[1], tokens[0].numel())
        # faster than SDPA, whose blocks are meant for narrow heads
        scores = one_by_one(query, tokens) if apart else torch.bmm(query, transposed)
        if seen is not None:
            scores = scores.masked_fill(~seen.squeeze(1), -torch.inf)
        weights = scores.softmax(-1)
        return one_by_one(weights, transposed) if apart else torch.bmm(weights, tokens)


def one_by_one(x: Tensor, matrices: Tensor) -> Tensor:
    """x_i matrix_i^T of each image, [n, r, F] for x [n, r, D] and matrices [n, F, D]: torch asks oneDNN for products in
    fp32 only where they are those of a linear layer."""
    return torch.stack([product(*pair, None) for pair in zip(x, matrices)])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Queries [n, q, D] over keys and values [n, H, S, d] -> [n, q, D]."""
    split = query.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    return attention(split, key, value, mask).transpose(1, 2).flatten(2)
