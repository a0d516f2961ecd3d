"""What Grad-CAM needs kept of an attention module. Attention itself is `blipfast.ops.attention`."""

from __future__ import annotations

from torch import Tensor, nn


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
