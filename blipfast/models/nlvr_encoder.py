"""The NLVR2 encoder: MED whose cross-attention looks at two images.

Two cross-attentions a layer (self0, self1), each with its output projection (dense0, dense1). Layers 0-5 average the
two; layers 6-11 merge them by a linear map of their concatenation. One LayerNorm serves both. The image argument is a
pair [image0, image1], each [B, N, D_v]. Source: official `models/nlvr_encoder.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import med
from .med import BertConfig, BertSelfAttention


class BertSelfOutput(med.BertSelfOutput):
    """As in MED; with `twin` two projections, averaged or (with `merge`) merged by a linear map.

    In inference projections and merge could be one matrix, [M0 W0, M1 W1]. Of the base model's products at 384 px that
    saves 0.09 %, or 0.04 % made anew for every 64 statements, lest weights change behind it: not worth its code.
    """

    def __init__(self, config: BertConfig, twin: bool = False, merge: bool = False):
        super().__init__(config)
        self.merge = merge
        if twin:
            del self.dense
            self.dense0 = nn.Linear(config.hidden_size, config.hidden_size)
            self.dense1 = nn.Linear(config.hidden_size, config.hidden_size)
        if merge:
            self.merge_layer = nn.Linear(config.hidden_size * 2, config.hidden_size)

    def forward(self, hidden_states: Tensor | list[Tensor], input_tensor: Tensor) -> Tensor:
        if isinstance(hidden_states, Tensor):
            return super().forward(hidden_states, input_tensor)
        first, second = self.dense0(hidden_states[0]), self.dense1(hidden_states[1])
        states = self.merge_layer(torch.cat([first, second], -1)) if self.merge else (first + second) / 2
        return med.residual_norm(self, states, input_tensor)


class BertAttention(nn.Module):
    """Cross-attention to a pair of images."""

    def __init__(self, config: BertConfig, is_cross_attention: bool = False, layer_num: int = -1):
        super().__init__()
        if not is_cross_attention:
            self.self = BertSelfAttention(config)
        else:
            self.self0 = BertSelfAttention(config, is_cross_attention)
            self.self1 = BertSelfAttention(config, is_cross_attention)
        merge = is_cross_attention and layer_num >= 6
        self.output = BertSelfOutput(config, twin=is_cross_attention, merge=merge)

    def forward(self, hidden_states: Tensor, images, masks=None, return_map: bool = False):
        if hasattr(self, "self"):
            context, attention = self.self(hidden_states, images, masks, return_map)
            return self.output(context, hidden_states), attention
        masks = masks or [None, None]
        contexts, maps = [], []
        for attend, image, mask in zip((self.self0, self.self1), images, masks):
            context, attention = attend(hidden_states, attend.key_value(image), mask, return_map)
            contexts.append(context)
            maps.append(attention)
        return self.output(contexts, hidden_states), (torch.stack(maps) if return_map else None)


class BertLayer(med.BertLayer):
    """A MED block whose cross-attention reads the pair."""

    def build_crossattention(self, config: BertConfig) -> nn.Module:
        return BertAttention(config, is_cross_attention=True, layer_num=self.layer_num)

    def attend_image(self, states, image, image_mask, return_map):
        return self.crossattention(states, image, image_mask, return_map)


class BertEncoder(med.BertEncoder):
    layer_class = BertLayer


class BertModel(med.BertModel):
    encoder_class = BertEncoder

    @staticmethod
    def image_masks(mask: list[Tensor]) -> list[Tensor]:
        return [m[:, None, None].bool() for m in mask]
