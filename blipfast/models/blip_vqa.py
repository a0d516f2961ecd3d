"""Visual question answering: drop-in for official `models/blip_vqa.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blipfast.text import init_tokenizer

from .answers import answer_losses
from .blip import load_complete, start_with, text_config, token_ids
from .checkpoint import AllowRandom
from .generation import generate
from .med import BertConfig, BertLMHeadModel, BertModel
from .packed import (
    ImageStates,
    all_states,
    check_finite,
    image_states,
    language_loss,
    language_part,
    run,
    text_states,
)
from .packing import Ragged
from .vit import create_vit


class BLIP_VQA(nn.Module):
    """The question reads the image (encoder); the answer reads the question's states (decoder).

    forward(image [B, 3, S, S], question, answer, n, weights, train, inference, k_test, image_of):
    question b is about picture b or, with `image_of`, about picture image_of[b], which is then encoded once.
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
        image_of: list[int] | None = None,
    ):
        self.check(image, question, image_of)
        image_embeds = self.visual_encoder(image)
        if not train and inference == "generate" and self.compat == "official":
            return self.generate_answer(*self.padded_question_states(image_embeds, question, image_of))
        texts = token_ids(self.tokenizer, question, self.text_encoder.config, most=35)
        text = Ragged.of(texts, image.device, self.tokenizer.enc_token_id)
        images = image_states(self.text_encoder.encoder, image_embeds)
        states = all_states(self.text_encoder, text, images, image_of)
        if not train and inference == "generate":
            return self.generate_answer(text.rows.lay_out(states), text.rows.mask)
        questions = text_states(self.text_decoder.bert.encoder, states, text.rows)
        if train:
            return self.answer_loss(questions, answer, n, weights)
        if inference != "rank":
            raise ValueError(f'inference must be "rank" or "generate", got {inference!r}.')
        return self.rank(questions, self.encode_answers(answer), k_test)

    @staticmethod
    def check(image: Tensor, question: str | list[str], image_of: list[int] | None) -> None:
        """Raises ValueError unless every question has a picture."""
        count = 1 if isinstance(question, str) else len(question)
        if image_of is None and len(image) != count:
            raise ValueError(
                f"{count} questions need as many pictures, got {len(image)}; or say by image_of which each is about."
            )
        if image_of is not None and (
            len(image_of) != count or not all(0 <= i < len(image) for i in image_of)
        ):
            raise ValueError(
                f"image_of must give each of {count} questions one of {len(image)} pictures, got {image_of}."
            )

    def padded_question_states(
        self, image_embeds: Tensor, question: list[str], image_of: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """States [B, T, D], those of the padding included as official `generate` reads them, and the mask [B, T]."""
        text = self.tokenizer(
            question, padding="longest", truncation=True, max_length=35, return_tensors="pt"
        ).to(image_embeds.device)
        out = self.text_encoder(
            start_with(text.input_ids, self.tokenizer.enc_token_id),
            attention_mask=text.attention_mask,
            encoder_hidden_states=image_embeds if image_of is None else image_embeds[image_of],
        )
        return out.last_hidden_state, text.attention_mask

    def encode_answers(self, answer) -> list[list[int]]:
        """Token ids of answers with [DEC] first, from strings or from their padded encoding."""
        if answer is None:
            raise ValueError("There are no answers: give strings, or their encoding.")
        if hasattr(answer, "input_ids"):
            rows = zip(answer.input_ids.tolist(), answer.attention_mask.sum(1).tolist())
            return [ids[:length] for ids, length in rows]
        texts = token_ids(self.tokenizer, answer, self.text_decoder.config)
        return [[self.tokenizer.bos_token_id, *ids[1:]] for ids in texts]

    def answer_loss(self, questions: ImageStates, answer, n: list[int], weights: Tensor) -> Tensor:
        """Weighted sum of the answers' LM losses, divided by the number of questions."""
        if n is None or weights is None:
            raise ValueError("Training needs `n`, how many answers each question has, and their `weights`.")
        if sum(n) != len(weights) or len(n) != len(questions):
            raise ValueError(
                f"n must count the answers of each of {len(questions)} questions and sum to {len(weights)} weights; "
                f"got {len(n)} counts that sum to {sum(n)}."
            )
        device = self.text_decoder.cls.predictions.bias.device
        part = language_part(self.text_decoder, Ragged.of(self.encode_answers(answer), device))
        question = [b for b, count in enumerate(n) for _ in range(count)]
        losses = language_loss(self.text_decoder, part, run([part], questions, [question])[0], "none")
        return (weights.to(device) * losses).sum() / len(questions)

    @torch.no_grad()
    def generate_answer(self, states: Tensor, mask: Tensor) -> list[str]:
        ids = generate(
            self.text_decoder,
            torch.tensor([self.tokenizer.bos_token_id], device=states.device),
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
        """`rank` under its official name and arguments: padded question states [B, N, D], answer ids [A, L]."""
        questions = image_states(self.text_decoder.bert.encoder, question_states, question_atts)
        lengths = answer_atts.sum(1).tolist()
        return self.rank(questions, [ids[:n] for ids, n in zip(answer_ids.tolist(), lengths)], k)

    @torch.no_grad()
    def rank(self, questions: ImageStates, answers: list[list[int]], k: int) -> Tensor:
        """Index [B] of the likeliest answer: k candidates by their first token, then by the whole answer's loss.

        answers: token ids, [DEC] first. k is cut to their number. The loss is the training one, label smoothing
        included. Raises ValueError without answers, for k below 1, and for states that are not finite.
        """
        if not answers or k < 1:
            raise ValueError(
                f"Ranking needs answers and k of at least 1, got {len(answers)} answers and k {k}."
            )
        device = self.text_decoder.cls.predictions.bias.device
        B, k = len(questions), min(k, len(answers))
        start = Ragged.of([answers[0][:1]] * B, device)
        first = self.text_decoder.cls(all_states(self.text_decoder.bert, start, questions)).float().softmax(1)
        check_finite(first, range(B), "Question")
        beginnings = torch.tensor([answer[1] for answer in answers]).to(device, non_blocking=True)
        top = first[:, beginnings].topk(k, dim=1).indices
        candidates = [[answers[i] for i in row] for row in top.tolist()]
        losses = torch.stack(answer_losses(self.text_decoder, questions, candidates))
        return top.gather(1, losses.argmin(1, keepdim=True)).squeeze(1)


def blip_vqa(pretrained: str | Path = "", allow_random: AllowRandom = (), **kwargs: Any) -> BLIP_VQA:
    """A VQA model; see `load_complete` for `pretrained` and `allow_random`.

    With vit="large", a pre-trained decoder read 1024-wide image states: its cross-attention's keys and values do not
    fit, and to start them random (official BLIP does) say allow_random="text_decoder.*.crossattention.self.*".
    """
    return load_complete(BLIP_VQA(**kwargs), pretrained, allow_random)


def tile(x: Tensor, dim: int, n_tile: int) -> Tensor:
    """Each slice of `x` along `dim` repeated `n_tile` times in a row."""
    return x.repeat_interleave(n_tile, dim)
