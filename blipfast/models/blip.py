"""BLIP as feature extractor and as captioner; the factories and helpers that the other models share.

Drop-in for official `models/blip.py`: same names, arguments, defaults, forward modes and return values.
Beyond them, `vit` may be a mapping {width, depth, heads, patch_size}, `med_config` a mapping of BERT keys, and
`tokenizer` another tokenizer than bert-base-uncased.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blipfast.text import MODEL_MAX_LENGTH, Tokenizer, as_list, init_tokenizer

from . import recorded
from .checkpoint import AllowRandom, is_url, load_checkpoint
from .generation import Rules, generate, stream
from .med import BertConfig, BertLMHeadModel, BertModel
from .out_of_memory import in_halves
from .packed import image_states, language_loss, language_part, run
from .packing import Ragged
from .vit import create_vit

__all__ = [
    "BLIP_Base",
    "BLIP_Decoder",
    "blip_decoder",
    "blip_feature_extractor",
    "create_vit",
    "init_tokenizer",
    "is_url",
    "load_checkpoint",
]


def text_config(med_config, tokenizer, encoder_width: int) -> BertConfig:
    """MED's settings for an image encoder of `encoder_width`, with one embedding for each of the tokenizer's ids."""
    config = BertConfig.load(med_config)
    config.encoder_width = encoder_width
    config.vocab_size = len(tokenizer)
    return config


def token_ids(
    tokenizer: Tokenizer, texts: str | list[str], config: BertConfig, most: int = MODEL_MAX_LENGTH
) -> list[list[int]]:
    """Token ids of each text, cut at `most` and at the positions that the model has."""
    most = min(most, config.max_position_embeddings)
    return tokenizer(as_list(texts), truncation=True, max_length=most).input_ids


def check_pairs(images: Tensor, texts: Sequence) -> None:
    """Raises ValueError unless there are as many texts as pictures."""
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} pictures need {len(images)} captions, got {len(texts)}.")


def start_with(input_ids: Tensor, token: int) -> Tensor:
    """A copy whose first token, [CLS], is `token`: [ENC] for the image-grounded encoder, [DEC] for the decoder."""
    input_ids = input_ids.clone()
    input_ids[:, 0] = token
    return input_ids


class BLIP_Base(nn.Module):
    """Feature extractor.

    forward(image [B, 3, S, S], caption list of B strings, mode):
    "image" -> image states [B, N, D_v]; "text" -> text states [B, T, D]; "multimodal" -> text states that have
    looked at the image, [ENC] first. Captions of different lengths are padded (official BLIP fails on them).
    """

    def __init__(
        self,
        med_config="configs/med_config.json",
        image_size=224,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        *,
        tokenizer=None,
    ):
        super().__init__()
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer)
        self.tokenizer = tokenizer or init_tokenizer()
        config = text_config(med_config, self.tokenizer, vision_width)
        self.text_encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, image: Tensor | None, caption: list[str] | None, mode: str) -> Tensor:
        if mode not in ("image", "text", "multimodal"):
            raise ValueError(f'mode must be "image", "text" or "multimodal", got {mode!r}.')
        if mode == "image":
            return self.visual_encoder(image)
        device = next(self.parameters()).device
        text = self.tokenizer(caption, padding="longest", return_tensors="pt").to(device)
        if mode == "text":
            out = self.text_encoder(text.input_ids, attention_mask=text.attention_mask, mode="text")
            return out.last_hidden_state
        check_pairs(image, text.input_ids)
        out = self.text_encoder(
            start_with(text.input_ids, self.tokenizer.enc_token_id),
            attention_mask=text.attention_mask,
            encoder_hidden_states=self.visual_encoder(image),
        )
        return out.last_hidden_state


class BLIP_Decoder(nn.Module):
    """Captioner: forward(image, caption) -> LM loss; generate(image, ...) -> captions."""

    def __init__(
        self,
        med_config="configs/med_config.json",
        image_size=384,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        prompt="a picture of ",
        *,
        tokenizer=None,
    ):
        super().__init__()
        self.visual_encoder, vision_width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer)
        self.tokenizer = tokenizer or init_tokenizer()
        config = text_config(med_config, self.tokenizer, vision_width)
        self.text_decoder = BertLMHeadModel(config)
        self.prompt = prompt

    @property
    def prompt(self) -> str:
        """What every caption starts from; `prompt_length` is its number of tokens, with [DEC]."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._prompt, ids = prompt, self.tokenizer(prompt).input_ids
        self.prompt_length = len(ids) - 1
        said = self.tokenizer.decode(ids, skip_special_tokens=True)
        # letters that captions begin with: official BLIP takes len(prompt), but "a close-up" reads "a close - up" then
        self.prompt_width = len(prompt.lstrip()) if said == prompt.strip() else len(said)

    def train(self, mode: bool = True) -> BLIP_Decoder:
        if mode:
            recorded.forget(self.text_decoder)  # training wants the memory
        return super().train(mode)

    def forward(self, image: Tensor, caption: str | list[str]) -> Tensor:
        """Label-smoothed LM loss, mean over the tokens after the prompt. Captions are cut at 40 tokens."""
        texts = token_ids(self.tokenizer, caption, self.text_decoder.config, most=40)
        check_pairs(image, texts)
        text = Ragged.of(texts, image.device, self.tokenizer.bos_token_id)
        part = language_part(self.text_decoder, text, self.prompt_length)
        images = image_states(self.text_decoder.bert.encoder, self.visual_encoder(image))
        return language_loss(self.text_decoder, part, run([part], images)[0])

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        sample=False,
        num_beams=3,
        max_length=30,
        min_length=None,
        top_p=0.9,
        repetition_penalty=1.0,
        length_norm="with_prompt",
        **rules,
    ) -> list[str]:
        """Captions, by beam search or (`sample`) by nucleus sampling, the prompt taken off.

        Lengths count the prompt's tokens. Official quirks, kept: sampling also applies top_k = 50 and always a
        repetition penalty of 1.1; a beam's score is divided by its length with the prompt. length_norm="generated"
        divides by the length without it, as transformers since 4.36. num_return: captions an image, one behind the
        other. Other `rules`: max_new_tokens, length_penalty, top_k, batch_size (see `generation.generate`).
        """
        ids = generate(
            self.text_decoder,
            self.prompt_ids(image.device),
            image_embeds=in_halves(self.visual_encoder, image),
            **self.rules(sample, num_beams, repetition_penalty),
            max_length=max_length,
            min_length=min_length,
            top_p=top_p,
            length_norm=length_norm,
            **rules,
        )
        return self.captions(ids)

    @torch.no_grad()
    def generate_stream(
        self,
        batches: Iterable[Tensor],
        sample=False,
        num_beams=3,
        repetition_penalty=1.0,
        batch_size=None,
        **rules,
    ) -> Iterator[list[str]]:
        """Captions of many pictures, in batches [B, 3, S, S] of any number: a list for each picture, in order.

        A picture whose captions are finished leaves, and the next takes its place. batch_size: pictures decoded at a
        time; unless given, those of a batch on a CPU, 8 at least, and 128 of 3 beams on a GPU if that takes no more
        than a quarter of its free memory, which is kept for the next call (see `recorded`). Where memory runs out for
        a batch or for these, they are halved. Other `rules`: as of `generate`.
        """
        prompt = self.prompt_ids(self.text_decoder.cls.predictions.bias.device)
        rules = Rules.of(len(prompt), **self.rules(sample, num_beams, repetition_penalty), **rules)
        encoded = ((in_halves(self.visual_encoder, images), None) for images in batches)
        early: dict[int, list[str]] = {}
        due = 0
        for number, texts in stream(self.text_decoder, prompt, encoded, rules, batch_size):
            early[number] = self.captions(texts)
            while due in early:
                yield early.pop(due)
                due += 1

    def prompt_ids(self, device) -> Tensor:
        """Token ids [T] that every caption starts from: [DEC] and the prompt."""
        ids = self.tokenizer([self.prompt]).input_ids[0]
        return torch.tensor([self.tokenizer.bos_token_id, *ids[1:-1]], device=device)

    def rules(self, sample: bool, num_beams: int, repetition_penalty: float) -> dict:
        return {
            "eos_token_id": self.tokenizer.sep_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "sample": sample,
            "num_beams": 1 if sample else num_beams,
            "repetition_penalty": 1.1 if sample else repetition_penalty,
        }

    def captions(self, ids) -> list[str]:
        """Token ids as text, without the prompt."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text[self.prompt_width :].lstrip() for text in texts]


def blip_decoder(pretrained: str | Path = "", allow_random: AllowRandom = (), **kwargs: Any) -> BLIP_Decoder:
    """A captioner; see `load_complete` for `pretrained` and `allow_random`."""
    return load_complete(BLIP_Decoder(**kwargs), pretrained, allow_random)


def blip_feature_extractor(
    pretrained: str | Path = "", allow_random: AllowRandom = (), **kwargs: Any
) -> BLIP_Base:
    """A feature extractor; see `load_complete` for `pretrained` and `allow_random`."""
    return load_complete(BLIP_Base(**kwargs), pretrained, allow_random)


def load_complete(model: nn.Module, pretrained: str | Path, allow_random: AllowRandom = ()) -> nn.Module:
    """Load `pretrained`, if given: a file, a run or Hugging Face folder, a URL, or a name on Hugging Face.

    ValueError for weights that would stay random, unless `allow_random` names them (see `checkpoint.load_weights`);
    True allows any: official BLIP leaves weights of retrieval, VQA and NLVR2 models random in silence.
    """
    if pretrained:
        load_checkpoint(model, pretrained, allow_missing=False, allow_random=allow_random)
    return model
