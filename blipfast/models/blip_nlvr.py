"""NLVR2, is the sentence true of the two pictures: drop-in for official `models/blip_nlvr.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.text import init_tokenizer

from .blip import text_config, token_ids
from .checkpoint import AllowRandom, load_checkpoint, load_weights, read_state_dict
from .nlvr_encoder import BertModel
from .packed import first_states, image_states
from .packing import Ragged
from .vit import create_vit

__all__ = ["BLIP_NLVR", "blip_nlvr", "load_checkpoint", "twin_weights"]


class BLIP_NLVR(nn.Module):
    """forward(image, text, targets, train, pair_of): image [2 M, 3, S, S], all first pictures, then all second ones.

    Sentence b is about pair b or, with `pair_of`, about pair pair_of[b], which is then encoded once.
    Returns the loss if `train`, else logits [B, 2] (class 1: true). `targets` [B] may be None in evaluation.
    """

    starts_random = ("cls_head", "*.merge_layer.*")  # no pre-trained checkpoint has them

    def __init__(
        self,
        med_config="configs/med_config.json",
        image_size=480,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        *,
        tokenizer=None,
    ):
        super().__init__()
        self.visual_encoder, width = create_vit(
            vit, image_size, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate=0.1
        )
        self.tokenizer = tokenizer or init_tokenizer()
        config = text_config(med_config, self.tokenizer, width)
        self.text_encoder = BertModel(config, add_pooling_layer=False)
        hidden = config.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(
        self,
        image: Tensor,
        text: list[str],
        targets: Tensor | None,
        train: bool = True,
        pair_of: list[int] | None = None,
    ) -> Tensor:
        texts = token_ids(self.tokenizer, text, self.text_encoder.config)
        if train and targets is None:
            raise ValueError("Training needs targets, 1 for each sentence that is true and 0 for the others.")
        if pair_of is not None and (len(pair_of) != len(texts) or not texts or min(pair_of) < 0):
            raise ValueError(f"pair_of must give each of {len(texts)} sentences a pair, got {pair_of}.")
        pairs = len(texts) if pair_of is None else 1 + max(pair_of)
        if len(image) != 2 * pairs:
            raise ValueError(f"{len(texts)} sentences need {2 * pairs} pictures, got {len(image)}.")
        pictures = self.visual_encoder(image).chunk(2)
        pair = tuple(
            image_states(self.text_encoder.encoder, embeds, name=name)
            for embeds, name in zip(pictures, ("self0", "self1"))
        )
        sentence = Ragged.of(texts, image.device, self.tokenizer.enc_token_id)
        prediction = self.cls_head(first_states(self.text_encoder, sentence, pair, pair_of))
        return F.cross_entropy(prediction.float(), targets) if train else prediction


def blip_nlvr(pretrained: str | Path = "", allow_random: AllowRandom = (), **kwargs: Any) -> BLIP_NLVR:
    """An NLVR2 model; see `load_complete`. The merge layers and the head, which pre-training lacks, may be random."""
    model = BLIP_NLVR(**kwargs)
    if pretrained:
        state = twin_weights(read_state_dict(pretrained))
        load_weights(model, state, str(pretrained), allow_missing=False, allow_random=allow_random)
    return model


def twin_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a one-image encoder, its cross-attention doubled for two images; others as they are."""
    twins = {}
    for key, value in state_dict.items():
        for part in ("crossattention.self.", "crossattention.output.dense."):
            if part in key:
                for image in "01":
                    twins[key.replace(part, f"{part[:-1]}{image}.")] = value
                break
        else:
            twins[key] = value
    return twins
