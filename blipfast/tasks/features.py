"""Features of pictures, of texts, and of texts that have looked at a picture, as official BLIP_Base gives them.

Beside the states of the encoders, for models with projections (pre-trained, retrieval, ITM): the normalised vectors
whose dot products are ITC's cosines, what a nearest-neighbour index wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.models.blip import BLIP_Base, token_ids
from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.load import describe, finished
from blipfast.models.packed import all_states, first_states, image_states
from blipfast.models.packing import Ragged
from blipfast.quantize import prepare


class FeatureExtractor:
    """A model for features, in evaluation mode; every method returns named fp32 tensors on the CPU.

    path: whatever the loaders of `models.load` take and has an image and a text encoder (pre-trained, retrieval, ITM,
    VQA, feature extractor). `projects` says whether it has ITC's projections, without which *_feat are left out.
    Raises FileNotFoundError or ValueError for a checkpoint that is missing, broken or without these encoders.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", precision: str = "fp32"):
        described = describe(path)
        self.projects = {
            "vision_proj.weight",
            "text_proj.weight",
            "itm_head.weight",
        } <= described.state.keys()
        if self.projects:
            model = BLIP_ITM(embed_dim=described.embed_dim, **described.settings)
        else:
            model = BLIP_Base(**described.settings)
        self.model, self.device = prepare(finished(model, described, path), precision, device), device
        self.image_size = self.model.visual_encoder.image_size

    @torch.inference_mode()
    def image(self, images: Tensor, tokens: bool = False) -> dict[str, Tensor]:
        """Of pictures [B, 3, S, S]: image_embeds [B, D_v] ([CLS]), image_feat [B, E].

        tokens: also image_tokens [B, N, D_v].
        """
        states = self.model.visual_encoder(images.to(self.device), class_only=not tokens)
        found = {"image_embeds": states[:, 0]}
        if self.projects:
            found["image_feat"] = F.normalize(self.model.vision_proj(states[:, 0]), dim=-1)
        if tokens:
            found["image_tokens"] = states
        return {name: value.float().cpu() for name, value in found.items()}

    @torch.inference_mode()
    def text(self, texts: Sequence[str], tokens: bool = False) -> dict[str, Tensor]:
        """Of B texts: text_embeds [B, D] ([CLS]), text_feat [B, E].

        tokens: also text_tokens [T, D], the texts' states one behind the other, and text_lengths [B].
        """
        text, lengths = self._ragged(texts)
        states, first = self._states(text, lengths, tokens)
        found = {"text_embeds": first}
        if self.projects:
            found["text_feat"] = F.normalize(self.model.text_proj(first), dim=-1)
        return self._with_tokens(found, "text", states, lengths)

    @torch.inference_mode()
    def multimodal(self, images: Tensor, texts: Sequence[str], tokens: bool = False) -> dict[str, Tensor]:
        """Of text b that has looked at picture b: multimodal_embeds [B, D] ([ENC]).

        tokens: also multimodal_tokens and multimodal_lengths, as in `text`.
        """
        text, lengths = self._ragged(texts, self.model.tokenizer.enc_token_id)
        looked_at = image_states(
            self.model.text_encoder.encoder, self.model.visual_encoder(images.to(self.device))
        )
        states, first = self._states(text, lengths, tokens, looked_at)
        return self._with_tokens({"multimodal_embeds": first}, "multimodal", states, lengths)

    def _ragged(self, texts: Sequence[str], first_token: int | None = None) -> tuple[Ragged, Tensor]:
        ids = token_ids(self.model.tokenizer, texts, self.model.text_encoder.config)
        return Ragged.of(ids, self.device, first_token), torch.tensor([len(text) for text in ids])

    def _states(
        self, text: Ragged, lengths: Tensor, tokens: bool, images=None
    ) -> tuple[Tensor | None, Tensor]:
        """All tokens' states, packed (None if not wanted), and those of each text's first token."""
        if not tokens:
            return None, first_states(self.model.text_encoder, text, images)
        states = all_states(self.model.text_encoder, text, images)
        return states, states[(lengths.cumsum(0) - lengths).to(states.device)]

    @staticmethod
    def _with_tokens(found: dict[str, Tensor], name: str, states: Tensor | None, lengths: Tensor):
        if states is not None:
            found |= {f"{name}_tokens": states, f"{name}_lengths": lengths}
        return {
            key: (value.float() if value.is_floating_point() else value).cpu() for key, value in found.items()
        }
