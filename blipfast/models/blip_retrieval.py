"""Fine-tuning for retrieval: ITC and ITM with image ids. Drop-in for official `models/blip_retrieval.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.ops.contrastive import contrastive_loss
from blipfast.text import init_tokenizer

from .blip import load_complete, text_config, token_ids
from .checkpoint import AllowRandom
from .gather import GatherLayer, all_gather_with_grad, concat_all_gather
from .med import BertModel
from .momentum import MomentumModel, hard_negatives
from .packed import first_states, image_states
from .packing import Ragged
from .vit import create_vit

MAX_TOKENS = 35

__all__ = ["BLIP_Retrieval", "GatherLayer", "all_gather_with_grad", "blip_retrieval", "concat_all_gather"]


class BLIP_Retrieval(MomentumModel):
    """forward(image [B, 3, S, S], caption, alpha, idx [B] image ids) -> (loss_ita, loss_itm).

    Pairs with equal idx are positives of each other in ITC, queue included, and never ITM negatives.
    negative_all_rank: hard negatives come from all ranks; contrastive keys are the own rank's and the queue's.
    """

    def __init__(
        self,
        med_config="configs/med_config.json",
        image_size=384,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        embed_dim=256,
        queue_size=57600,
        momentum=0.995,
        negative_all_rank=False,
        *,
        tokenizer=None,
    ):
        super().__init__()
        self.tokenizer = tokenizer or init_tokenizer()
        self.momentum, self.negative_all_rank = momentum, negative_all_rank
        self.visual_encoder, width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer)
        self.visual_encoder_m, _ = create_vit(vit, image_size)
        config = text_config(med_config, self.tokenizer, width)
        self.text_encoder = BertModel(config, add_pooling_layer=False)
        self.text_encoder_m = BertModel(config, add_pooling_layer=False)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.vision_proj_m = nn.Linear(width, embed_dim)
        self.text_proj_m = nn.Linear(config.hidden_size, embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.copy_params()
        self.add_queues(embed_dim, queue_size, "ptr_queue")
        self.temp = nn.Parameter(0.07 * torch.ones([]))

    def forward(self, image: Tensor, caption: list[str], alpha: float, idx: Tensor) -> tuple[Tensor, Tensor]:
        texts = token_ids(self.tokenizer, caption, self.text_encoder.config, MAX_TOKENS)
        if not len(image) == len(texts) == idx.numel():
            raise ValueError(
                f"{len(image)} pictures need as many captions and idx, got {len(texts)} and {idx.numel()}."
            )
        self.begin_forward()
        device = image.device
        text = Ragged.of(texts, device)
        image_embeds = self.visual_encoder(image)
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        text_feat = self.text_features(self.text_encoder, self.text_proj, text)

        # ITM's negatives, first, because the host waits for them
        with torch.no_grad():
            idx = idx.view(-1).to(device, non_blocking=True)
            other_image, other_text, other_idx = image_feat, text_feat, idx
            if self.negative_all_rank:
                other_image, other_text, other_idx = (
                    concat_all_gather(x) for x in (image_feat, text_feat, idx)
                )
            same = idx[:, None] == other_idx[None]
            temp = self.temp.float()
            text_weights = (image_feat.float() @ other_text.float().t() / temp).masked_fill(same, -torch.inf)
            image_weights = (text_feat.float() @ other_image.float().t() / temp).masked_fill(same, -torch.inf)
            text_negative = hard_negatives(text_weights.softmax(1).nan_to_num(), same)
            image_negative = hard_negatives(image_weights.softmax(1).nan_to_num(), same)
            negatives = self.send_negatives(text_negative, image_negative)
            candidates = self.candidates(texts, MAX_TOKENS, device)

        # ITC
        with torch.no_grad():
            class_state = self.visual_encoder_m(image, class_only=True)[:, 0]
            image_feat_m = F.normalize(self.vision_proj_m(class_state), dim=-1).float()
            text_feat_m = self.text_features(self.text_encoder_m, self.text_proj_m, text).float()
        ids = {"query_ids": idx, "key_ids": idx, "queue_ids": self.idx_queue[0]}
        loss_i2t, _ = contrastive_loss(
            image_feat, image_feat_m, text_feat_m, self.text_queue, self.temp, alpha, **ids
        )
        loss_t2i, _ = contrastive_loss(
            text_feat, text_feat_m, image_feat_m, self.image_queue, self.temp, alpha, **ids
        )
        self.end_forward(image_feat_m, text_feat_m, idx)

        # ITM
        pairs, candidates = self.matching_pairs(negatives), candidates()
        paired = Ragged.of([candidates[i] for i in pairs.texts], device, self.tokenizer.enc_token_id)
        images = image_states(self.text_encoder.encoder, image_embeds)
        loss_itm, _ = self.matching_loss(first_states(self.text_encoder, paired, images, pairs.images), pairs)
        return (loss_i2t + loss_t2i) / 2, loss_itm


def blip_retrieval(
    pretrained: str | Path = "", allow_random: AllowRandom = (), **kwargs: Any
) -> BLIP_Retrieval:
    """A retrieval model; see `load_complete`. Queues may be missing; momentum encoders then start as copies."""
    return load_complete(BLIP_Retrieval(**kwargs), pretrained, allow_random)
