"""Image-text matching: drop-in for official `models/blip_itm.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.text import init_tokenizer

from .blip import load_complete, text_config, token_ids
from .checkpoint import AllowRandom
from .med import BertModel
from .packed import ImageStates, first_states, image_states, in_dtype_of
from .packing import Ragged
from .vit import create_vit


class BLIP_ITM(nn.Module):
    """forward(image [B, 3, S, S], caption, match_head):

    "itm" -> logits [B, 2] of each pair (class 1: they match); "itc" -> cosine similarities [B images, B' texts].
    caption: B texts; for "itm" also one for all pictures, and any number for one picture.

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

    def encode_text(self, caption: str | list[str]) -> list[list[int]]:
        """Token ids of each text, cut at 35."""
        return token_ids(self.tokenizer, caption, self.text_encoder.config, most=35)

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Projected, normalised features [B, E] of image states [B, N, D_v]."""
        class_state = in_dtype_of(self.vision_proj, image_embeds[:, 0])
        return F.normalize(self.vision_proj(class_state), dim=-1)

    def text_features(self, texts: list[list[int]]) -> Tensor:
        """Projected, normalised features [B, E] of token ids."""
        text = Ragged.of(texts, self.itm_head.weight.device)
        return F.normalize(self.text_proj(first_states(self.text_encoder, text)), dim=-1)

    def image_states(self, image_embeds: Tensor) -> ImageStates:
        """What `match` reads of image states [M, N, D_v], to be made once for all texts."""
        return image_states(self.text_encoder.encoder, image_embeds)

    def pack(self, texts: list[list[int]]) -> Ragged:
        """Token ids as `match` reads them."""
        first = None if self.compat == "official" else self.tokenizer.enc_token_id
        return Ragged.of(texts, self.itm_head.weight.device, first)

    def match(
        self, images: ImageStates, texts: list[list[int]] | Ragged, image: list[int] | None = None
    ) -> Tensor:
        """ITM logits [B, 2] of token ids against images; text b looks at image image[b] (None: at image b).

        texts: also as `pack` gives them, where many images meet the same ones (see `packed.begin`).
        """
        text = texts if isinstance(texts, Ragged) else self.pack(texts)
        return self.itm_head(first_states(self.text_encoder, text, images, image))

    def forward(self, image: Tensor, caption: str | list[str], match_head: str = "itm") -> Tensor:
        if match_head not in ("itm", "itc"):
            raise ValueError(f'match_head must be "itm" or "itc", got {match_head!r}.')
        texts = self.encode_text(caption)
        if match_head == "itm":
            pairs = max(len(image), len(texts))
            if len(texts) not in (1, pairs) or len(image) not in (1, pairs) or not pairs:
                raise ValueError(
                    f"{len(image)} pictures and {len(texts)} captions are no pairs: give as many of both, or one of "
                    "either."
                )
            images = self.image_states(self.visual_encoder(image))
            of = [0] * pairs if len(image) == 1 else None
            return self.match(images, texts * (pairs // len(texts)), of)
        if not len(image) or not texts:
            raise ValueError(f"There must be pictures and captions, got {len(image)} and {len(texts)}.")
        image_feat = self.image_features(self.visual_encoder(image, class_only=True))
        return image_feat @ self.text_features(texts).t()


def blip_itm(pretrained: str | Path = "", allow_random: AllowRandom = (), **kwargs: Any) -> BLIP_ITM:
    """A matcher; see `load_complete` for `pretrained` and `allow_random`."""
    return load_complete(BLIP_ITM(**kwargs), pretrained, allow_random)
