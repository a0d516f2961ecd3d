"""Scaled dot-product attention, the one place that chooses how; and what Grad-CAM needs kept of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    trains = torch.is_grad_enabled() and query.requires_grad
    if trains and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # torch's bf16 backward on CPU takes ten times as long as its fp32 one
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), mask, dropout, scale).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


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
