"""Image-text matching: drop-in for official `models/blip_itm.py`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.text import init_tokenizer

from .blip import load_complete, start_with, text_config
from .med import BertModel
from .vit import create_vit


class BLIP_ITM(nn.Module):
    """forward(image [B, 3, S, S], caption, match_head):

    "itm" -> logits [B, 2] of each pair (class 1: they match); "itc" -> cosine similarities [B images, B' texts].

    Official quirk: official BLIP_ITM starts the text with [CLS], although the head was trained behind [ENC].
    The default here is [ENC]; `compat="official"` gives the official scores.
    """

    def __init__(
        self,
        med_config="configs/med_config.json",
        image_size=384,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        embed_dim=256,
        *,
        tokenizer=None,
        compat="",
    ):
        super().__init__()
        if compat not in ("", "official"):
            raise ValueError(f'compat must be "" or "official", got {compat!r}.')
        self.compat = compat
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer)
        self.tokenizer = tokenizer or init_tokenizer()
        config = text_config(med_config, self.tokenizer, vision_width)
        self.text_encoder = BertModel(config, add_pooling_layer=False)
        self.vision_proj = nn.Linear(vision_width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)

    def encode_text(self, caption: list[str], device):
        """Token ids and mask [B, T], cut at 35 tokens."""
        return self.tokenizer(
            caption, padding="longest", truncation=True, max_length=35, return_tensors="pt"
        ).to(device)

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Projected, normalised features [B, E] of image states [B, N, D_v]."""
        return F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def text_features(self, text) -> Tensor:
        """Projected, normalised features [B, E] of a tokenised batch."""
        out = self.text_encoder(text.input_ids, attention_mask=text.attention_mask, mode="text")
        return F.normalize(self.text_proj(out.last_hidden_state[:, 0]), dim=-1)

    def match(self, image_embeds: Tensor, text, encoder_index: Tensor | None = None) -> Tensor:
        """ITM logits [B, 2] of texts against image states [M, N, D_v]; text b reads image encoder_index[b]."""
        ids = text.input_ids
        if self.compat != "official":
            ids = start_with(ids, self.tokenizer.enc_token_id)
        out = self.text_encoder(
            ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=image_embeds,
            encoder_index=encoder_index,
        )
        return self.itm_head(out.last_hidden_state[:, 0])

    def forward(self, image: Tensor, caption: list[str], match_head: str = "itm") -> Tensor:
        if match_head not in ("itm", "itc"):
            raise ValueError(f'match_head must be "itm" or "itc", got {match_head!r}.')
        image_embeds = self.visual_encoder(image)
        text = self.encode_text(caption, image.device)
        if match_head == "itm":
            return self.match(image_embeds, text)
        return self.image_features(image_embeds) @ self.text_features(text).t()


def blip_itm(pretrained="", **kwargs) -> BLIP_ITM:
    """A matcher; `pretrained` is a file or URL, of which every weight of it must be found."""
    return load_complete(BLIP_ITM(**kwargs), pretrained)
