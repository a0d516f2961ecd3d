"""Scaled dot-product attention, the one place that chooses how; and what Grad-CAM needs kept of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = 256  # keys: below this a bf16 map is cheap enough to be kept on a CPU


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(query key^T * scale) value: [B, H, T, d] and [B, H, S, d] -> [B, H, T, d] in the query's dtype.

    mask: boolean (True: attend) or additive, broadcastable to [B, 1, T, S]. scale: 1 / sqrt(d) unless given.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # torch's own bf16 backward takes ten times as long as its fp32 one
        with torch.autocast("cpu", enabled=False):
            if key.shape[2] <= SHORT:
                return short_attention(query, key, value, mask, dropout, scale)
            return attention(query.float(), key.float(), value.float(), mask, dropout, scale).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """`attention` by its formula, softmax in fp32: keeps the map for the backward pass, which few keys can afford."""
    scores = (query * (scale or query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(-1), dropout).to(value.dtype) @ value


class KeepsAttention(nn.Module):
    """An attention module that can keep its map and the map's gradient, under official BLIP's names."""

    attention_map: Tensor | None = None
    attn_gradients: Tensor | None = None

    def keep(self, weights: Tensor) -> None:
        """Keep the map [B, H, T, S] and, once it is computed, its gradient."""
        self.save_attention_map(weights)
        if weights.requires_grad:
            weights.register_hook(self.save_attn_gradients)

    def save_attention_map(self, attention_map: Tensor) -> None:
        self.attention_map = attention_map

    def get_attention_map(self) -> Tensor | None:
        return self.attention_map

    def save_attn_gradients(self, gradients: Tensor) -> None:
        self.attn_gradients = gradients

    def get_attn_gradients(self) -> Tensor | None:
        return self.attn_gradients
