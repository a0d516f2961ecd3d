"""Visual question answering: drop-in for official `models/blip_vqa.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blipfast.text import init_tokenizer

from .blip import start_with, text_config
from .checkpoint import load_checkpoint
from .generation import generate
from .med import BertConfig, BertLMHeadModel, BertModel
from .vit import create_vit


class BLIP_VQA(nn.Module):
    """The question reads the image (encoder); the answer reads the question's states (decoder).

    forward(image [B, 3, S, S], question, answer, n, weights, train, inference, k_test):
    train=True: `answer` lists the answers of all questions, n[b] of them for question b, each with a weight;
    returns the loss. train=False, inference="generate": a list of B answers. inference="rank": the index [B] of the
    best of the candidate answers, `answer`, being strings or their encoding with [DEC] first.

    Official quirks, kept: `generate` also attends to the question's padding (`compat="masked"` does not);
    with vit="large" the decoder still reads 768-wide states, those of the question.
    """

    def __init__(
        self,
        med_config="configs/med_config.json",
        image_size=480,
        vit="base",
        vit_grad_ckpt=False,
        vit_ckpt_layer=0,
        *,
        tokenizer=None,
        compat="official",
    ):
        super().__init__()
        if compat not in ("official", "masked"):
            raise ValueError(f'compat must be "official" or "masked", got {compat!r}.')
        self.compat = compat
        self.visual_encoder, width = create_vit(
            vit, image_size, vit_grad_ckpt, vit_ckpt_layer, drop_path_rate=0.1
        )
        self.tokenizer = tokenizer or init_tokenizer()
        config = text_config(med_config, self.tokenizer, width)
        self.text_encoder = BertModel(config, add_pooling_layer=False)
        decoder_config = BertConfig.load(config)
        decoder_config.encoder_width = config.hidden_size
        self.text_decoder = BertLMHeadModel(decoder_config)

    def forward(
        self,
        image: Tensor,
        question: list[str],
        answer=None,
        n: list[int] | None = None,
        weights: Tensor | None = None,
        train: bool = True,
        inference: str = "rank",
        k_test: int = 128,
    ):
        text = self.tokenizer(
            question, padding="longest", truncation=True, max_length=35, return_tensors="pt"
        ).to(image.device)
        states = self.text_encoder(
            start_with(text.input_ids, self.tokenizer.enc_token_id),
            attention_mask=text.attention_mask,
            encoder_hidden_states=self.visual_encoder(image),
        ).last_hidden_state
        if train:
            return self.answer_loss(states, text.attention_mask, answer, n, weights)
        if inference == "generate":
            return self.generate_answer(states, text.attention_mask)
        if inference != "rank":
            raise ValueError(f'inference must be "rank" or "generate", got {inference!r}.')
        candidates = self.encode_answers(answer, image.device)
        return self.rank_answer(
            states, text.attention_mask, candidates.input_ids, candidates.attention_mask, k_test
        )

    def encode_answers(self, answer, device):
        """Encoding of answers with [DEC] first; an encoding is taken as it is."""
        if hasattr(answer, "input_ids"):
            return answer.to(device)
        encoding = self.tokenizer(list(answer), padding="longest", return_tensors="pt").to(device)
        encoding.input_ids[:, 0] = self.tokenizer.bos_token_id
        return encoding

    def targets(self, input_ids: Tensor) -> Tensor:
        return input_ids.masked_fill(input_ids == self.tokenizer.pad_token_id, -100)

    def answer_loss(self, states: Tensor, mask: Tensor, answer, n: list[int], weights: Tensor) -> Tensor:
        """Weighted sum of the answers' LM losses, divided by the number of questions."""
        if sum(n) != len(weights) or len(n) != len(states):
            raise ValueError(
                f"n must count the answers of each of {len(states)} questions and sum to {len(weights)} weights; "
                f"got {len(n)} counts that sum to {sum(n)}."
            )
        answers = self.encode_answers(answer, states.device)
        question = torch.arange(len(n), device=states.device).repeat_interleave(
            torch.tensor(n, device=states.device)
        )
        losses = self.text_decoder.lm_loss(
            answers.input_ids,
            self.targets(answers.input_ids),
            reduction="none",
            attention_mask=answers.attention_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            encoder_index=question,
        )
        return (weights.to(losses.device) * losses).sum() / len(states)

    @torch.no_grad()
    def generate_answer(self, states: Tensor, mask: Tensor) -> list[str]:
        ids = generate(
            self.text_decoder,
            torch.full((len(states), 1), self.tokenizer.bos_token_id, device=states.device),
            states,
            image_mask=mask if self.compat == "masked" else None,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            max_length=10,
            min_length=1,
            num_beams=3,
        )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def rank_answer(
        self, question_states: Tensor, question_atts: Tensor, answer_ids: Tensor, answer_atts: Tensor, k: int
    ) -> Tensor:
        """Index [B] of the likeliest candidate: k candidates by their first token, then by the whole answer's loss.

        answer_ids [A, L] start with [DEC]. k is cut to A. The loss is the training one, label smoothing included.
        """
        B, k = len(question_states), min(k, len(answer_ids))
        image = dict(encoder_hidden_states=question_states, encoder_attention_mask=question_atts)
        start = answer_ids[:1, :1].expand(B, 1)
        first = self.text_decoder(start, **image).logits[:, 0].float().softmax(1)
        top = first[:, answer_ids[:, 1]].topk(k, dim=1).indices
        ids = answer_ids[top.flatten()]
        losses = self.text_decoder.lm_loss(
            ids,
            self.targets(ids),
            reduction="none",
            attention_mask=answer_atts[top.flatten()],
            **image,
        )
        return top.gather(1, losses.view(B, k).argmin(1, keepdim=True)).squeeze(1)


def blip_vqa(pretrained="", **kwargs) -> BLIP_VQA:
    """A VQA model; of `pretrained`, what is missing is listed."""
    model = BLIP_VQA(**kwargs)
    if pretrained:
        load_checkpoint(model, pretrained)
    return model


def tile(x: Tensor, dim: int, n_tile: int) -> Tensor:
    """Each slice of `x` along `dim` repeated `n_tile` times in a row."""
    return x.repeat_interleave(n_tile, dim)
