"""BLIP pre-training: ITC, ITM and LM over one image-text model. Drop-in for official `models/blip_pretrain.py`."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.ops.contrastive import contrastive_loss
from blipfast.text import init_tokenizer

from . import gather
from .blip import check_pairs, text_config, token_ids
from .checkpoint import load_bert, load_vit
from .med import BertLMHeadModel, BertModel
from .momentum import MomentumModel, hard_negatives
from .packed import ImageStates, Part, all_states, image_states, language_loss, language_part, run
from .packing import Ragged, Rows
from .vit import create_vit


class BLIP_Pretrain(MomentumModel):
    """forward(image [B, 3, S, S], caption list of B strings, alpha) -> (loss_ita, loss_itm, loss_lm).

    With `return_dict=True`: a mapping of those, of loss_mlm (if `mlm_probability` > 0), itm_accuracy and temperature.

    `vit_init` and `bert_init` are files of DeiT/timm ViT and BERT weights to start from (official BLIP downloads
    them); empty: random. `image_size` and `vit_init` must then agree.
    duplicates: two pairs of a batch whose captions read the same are "negative" to each other (official), or
    "positive": never an ITM negative, and a shared target in ITC, queue included.
    queue_warmup: samples to see before the queues serve as keys. 0 (official): at once, with random entries at first.
    Without pre-trained encoders, random and outdated keys pull all features to one point: let the encoders settle.
    negative_all_rank: contrastive keys and hard negatives come from all ranks instead of the own one.
    """

    saves_ids = False

    def __init__(
        self,
        med_config="configs/bert_config.json",
        image_size=224,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        embed_dim=256,
        queue_size=57600,
        momentum=0.995,
        *,
        tokenizer=None,
        vit_init="",
        bert_init="",
        max_tokens=30,
        duplicates="negative",
        queue_warmup=0,
        negative_all_rank=False,
        mlm_probability=0.0,
        temperature=0.07,
    ):
        super().__init__()
        if duplicates not in ("negative", "positive"):
            raise ValueError(f'duplicates must be "negative" or "positive", got {duplicates!r}.')
        self.tokenizer = tokenizer or init_tokenizer()
        self.momentum, self.max_tokens = momentum, max_tokens
        self.duplicates, self.negative_all_rank = duplicates, negative_all_rank
        self.queue_warmup, self.mlm_probability = queue_warmup, mlm_probability

        self.visual_encoder, width = create_vit(vit, image_size, vit_grad_ckpt, vit_ckpt_layer, 0)
        self.visual_encoder_m, _ = create_vit(vit, image_size)
        config = text_config(med_config, self.tokenizer, width)
        self.text_encoder = BertModel(config, add_pooling_layer=False)
        self.text_encoder_m = BertModel(config, add_pooling_layer=False)
        self.text_decoder = BertLMHeadModel(config)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.vision_proj_m = nn.Linear(width, embed_dim)
        self.text_proj_m = nn.Linear(config.hidden_size, embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        if vit_init:
            load_vit(self.visual_encoder, vit_init)
        if bert_init:
            load_bert(self.text_decoder, bert_init)
            load_bert(self.text_encoder, bert_init)
        tie_encoder_decoder_weights(self.text_encoder, self.text_decoder.bert, "", "/attention")
        self.copy_params()
        self.add_queues(embed_dim, queue_size, "queue_ptr")
        self.temp = nn.Parameter(temperature * torch.ones([]))

    def forward(self, image: Tensor, caption, alpha: float, return_dict: bool = False):
        B, device = len(image), image.device
        check_pairs(image, caption)
        self.begin_forward()
        texts = token_ids(self.tokenizer, caption, self.text_encoder.config, self.max_tokens)
        text = Ragged.of(texts, device)
        image_embeds = self.visual_encoder(image)
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        text_feat = self.text_features(self.text_encoder, self.text_proj, text)
        with torch.no_grad():
            class_state = self.visual_encoder_m(image, class_only=True)[:, 0]
            image_feat_m = F.normalize(self.vision_proj_m(class_state), dim=-1).float()
            text_feat_m = self.text_features(self.text_encoder_m, self.text_proj_m, text).float()

        # ITC
        caption_id = caption_ids(texts).to(device, non_blocking=True)
        keys_i, keys_t, key_id = image_feat_m, text_feat_m, caption_id
        if self.negative_all_rank:
            keys_i, keys_t, key_id = (gather.concat_all_gather(x) for x in (keys_i, keys_t, key_id))
        own = torch.arange(B, device=device) + (gather.rank() * B if self.negative_all_rank else 0)
        same = own[:, None] == torch.arange(len(key_id), device=device)
        positives = {"own": own}
        if self.duplicates == "positive":
            same = same | (caption_id[:, None] == key_id[None])
            positives |= {"query_ids": caption_id, "key_ids": key_id, "queue_ids": self.idx_queue[0]}
        if self.queue_warmup:
            counts = torch.full_like(self.queued, self.queue_size)
            positives["queue_length"] = counts * (self.queued >= self.queue_warmup)
        loss_i2t, sim_i2t = contrastive_loss(
            image_feat, image_feat_m, keys_t, self.text_queue, self.temp, alpha, **positives
        )
        loss_t2i, sim_t2i = contrastive_loss(
            text_feat, text_feat_m, keys_i, self.image_queue, self.temp, alpha, **positives
        )
        self.end_forward(image_feat_m, text_feat_m, caption_id)

        # ITM and LM, in one pass over the weights they share
        with torch.no_grad():
            text_negative = hard_negatives(sim_i2t.softmax(1) + 1e-4, same)
            image_negative = hard_negatives(sim_t2i.softmax(1) + 1e-4, same)
        negatives = self.send_negatives(text_negative, image_negative)
        candidates = self.candidates(texts, self.max_tokens, device)
        language = language_part(self.text_decoder, Ragged.of(texts, device, self.tokenizer.bos_token_id))
        images = image_states(self.text_encoder.encoder, image_embeds)
        pairs, candidates = self.matching_pairs(negatives), candidates()
        paired = Ragged.of([candidates[i] for i in pairs.texts], device, self.tokenizer.enc_token_id)
        matching = Part(self.text_encoder, paired, kept=(0, 1))
        itm_states, lm_states = run([matching, language], images, [pairs.images, None])
        loss_itm, accuracy = self.matching_loss(itm_states, pairs)
        loss_lm = language_loss(self.text_decoder, language, lm_states)
        losses = {"loss_ita": (loss_i2t + loss_t2i) / 2, "loss_itm": loss_itm, "loss_lm": loss_lm}
        if not return_dict:
            return tuple(losses.values())
        if self.mlm_probability:
            losses["loss_mlm"] = self.mlm_loss(texts, images)
        return losses | {"itm_accuracy": accuracy, "temperature": self.temp.detach().clone()}

    def mlm_loss(self, texts: list[list[int]], images: ImageStates) -> Tensor:
        """Masked language modelling by the image-grounded encoder and the decoder's head.

        15 % (`mlm_probability`) of the word tokens are predicted; of them 80 % read [MASK], 10 % a random token, 10 %
        themselves. Not in BLIP's paper; the objective is BERT's and ALBEF's.
        """
        device = images.layers[0][0].device
        # masked on the host, which then knows how many words are read
        text = Ragged.of(texts, "cpu", self.tokenizer.enc_token_id)
        words = (text.ids != self.tokenizer.sep_token_id) & (text.rows.position > 0)
        masked, chosen = mask_words(
            text.ids, words, self.mlm_probability, self.tokenizer.mask_token_id, len(self.tokenizer)
        )
        read = chosen.nonzero().squeeze(1)
        masked, labels, chosen = (x.to(device, non_blocking=True) for x in (masked, text.ids[read], read))
        states = all_states(self.text_encoder, Ragged(masked, Rows(text.rows.lengths, device)), images)
        logits = self.text_decoder.cls(states[chosen])
        return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(read))


def mask_words(
    ids: Tensor, words: Tensor, probability: float, mask_id: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """BERT's masking of ids where `words`: the ids to read, and which of them are to be predicted."""
    chosen = (torch.rand(ids.shape, device=ids.device) < probability) & words
    draw = torch.rand(ids.shape, device=ids.device)
    masked = torch.where(chosen & (draw < 0.8), mask_id, ids)
    other = torch.randint_like(ids, vocab_size)
    return torch.where(chosen & (draw >= 0.8) & (draw < 0.9), other, masked), chosen


def caption_ids(texts: list[list[int]]) -> Tensor:
    """A number for each text [B] int64, equal for equal texts, the same in every process."""
    return torch.tensor([zlib.crc32(str(text).encode()) for text in texts])


def blip_pretrain(**kwargs: Any) -> BLIP_Pretrain:
    return BLIP_Pretrain(**kwargs)


def tie_encoder_decoder_weights(
    encoder: nn.Module, decoder: nn.Module, base_model_prefix: str, skip_key: str
) -> None:
    """Let `encoder` use the decoder's weights wherever a module's path does not contain `skip_key`.

    With skip_key="/attention", as BLIP calls it, everything is shared but self-attention: "/crossattention" does not
    contain it. Source: official `blip_pretrain.py`.
    """
    parts = dict(encoder.named_modules())
    for name, module in decoder.named_modules():
        if skip_key in f"{base_model_prefix}/{name.replace('.', '/')}":
            continue
        for key in module._parameters:
            setattr(parts[name], key, getattr(module, key))
