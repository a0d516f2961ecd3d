"""Text generation from the MED decoder: greedy, beam search, nucleus sampling, as official BLIP defines them.

The rules are those of transformers 4.15, which official BLIP ran on: log-softmax, then the repetition penalty over
all tokens so far (prompt included), then no end before `min_length`, then the beam's score; a finished beam counts
only if it ranks among the best `num_beams`. Lengths count the prompt. Images are encoded once: their keys and values
are projected before the first step and shared by all beams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .med import BertLMHeadModel, KeyValue

TOP_K = 50  # official sampling also keeps only the 50 likeliest tokens (transformers' default)


def generate(
    decoder: BertLMHeadModel,
    prompt: Tensor,
    image_embeds: Tensor,
    *,
    eos_token_id: int,
    pad_token_id: int,
    image_mask: Tensor | None = None,
    max_length: int = 30,
    min_length: int = 10,
    num_beams: int = 1,
    sample: bool = False,
    top_p: float = 0.9,
    top_k: int = TOP_K,
    repetition_penalty: float = 1.0,
    length_penalty: float = 1.0,
    length_norm: str = "with_prompt",
) -> Tensor:
    """Token ids [B, L <= max_length], prompt first, padded after the end token.

    prompt [B, T] and image_embeds [B, N, D_v] (any states to cross-attend to; image_mask [B, N]).
    length_norm: a beam's score is divided by its length "with_prompt" (official) or by the "generated" tokens
    (transformers >= 4.36), to the power length_penalty. Raises ValueError for settings that cannot be met.
    """
    vocab_size = decoder.config.vocab_size
    if min_length > max_length:
        raise ValueError(f"min_length {min_length} exceeds max_length {max_length}.")
    if max_length <= prompt.shape[1]:
        raise ValueError(
            f"max_length {max_length} leaves no room after a prompt of {prompt.shape[1]} tokens."
        )
    if not 1 <= num_beams or 2 * num_beams > vocab_size:
        raise ValueError(
            f"num_beams must be between 1 and half the vocabulary of {vocab_size}, got {num_beams}."
        )
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    if length_norm not in ("with_prompt", "generated"):
        raise ValueError(f'length_norm must be "with_prompt" or "generated", got {length_norm!r}.')
    step = Step(decoder, image_embeds, image_mask, eos_token_id, min_length, repetition_penalty)
    if num_beams > 1:
        search = BeamSearch(num_beams, prompt.shape[1], max_length, eos_token_id, length_penalty, length_norm)
        return search.run(step, prompt, pad_token_id)
    return draw(step, prompt, max_length, eos_token_id, pad_token_id, sample, top_p, top_k)


class Step:
    """One decoding step: next-token log-probabilities after the penalties, with cached keys and values."""

    def __init__(self, decoder, image_embeds, image_mask, eos_token_id, min_length, repetition_penalty):
        self.decoder, self.image_mask = decoder, image_mask
        self.image = decoder.bert.encoder.image_key_values(image_embeds)
        self.eos_token_id, self.min_length = eos_token_id, min_length
        self.repetition_penalty = repetition_penalty
        self.past: list[KeyValue] | None = None

    def __call__(self, ids: Tensor, normalise: bool = True) -> Tensor:
        """[rows, V] fp32 scores of the token after `ids` [rows, T]; log-probabilities if `normalise`."""
        new = ids if self.past is None else ids[:, -1:]
        out = self.decoder.bert(
            new,
            encoder_key_values=self.image,
            encoder_attention_mask=self.image_mask,
            past_key_values=self.past,
            use_cache=True,
            is_decoder=True,
        )
        self.past = out.past_key_values
        scores = self.decoder.cls(out.last_hidden_state[:, -1]).float()
        if normalise:
            scores = scores.log_softmax(-1)
        if self.repetition_penalty != 1.0:
            seen = scores.gather(1, ids)
            penalty = self.repetition_penalty
            scores = scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        if ids.shape[1] < self.min_length:
            scores[:, self.eos_token_id] = -torch.inf
        return scores

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows; each must stay with its image."""
        self.past = [(key[rows], value[rows]) for key, value in self.past]


def draw(step, ids, max_length, eos_token_id, pad_token_id, sample, top_p, top_k) -> Tensor:
    """Greedy search, or sampling from the nucleus; finished rows are filled with padding."""
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < max_length and not bool(finished.all()):
        scores = step(ids, normalise=False)
        if sample:
            token = torch.multinomial(nucleus(scores, top_p, top_k).softmax(-1), 1).squeeze(1)
        else:
            token = scores.argmax(-1)
        token = token.masked_fill(finished, pad_token_id)
        finished = finished | (token == eos_token_id)
        ids = torch.cat([ids, token[:, None]], 1)
    return ids


def nucleus(scores: Tensor, top_p: float, top_k: int) -> Tensor:
    """Keep the `top_k` best scores a row and of them the fewest whose probability reaches `top_p`; others -inf."""
    top_k = min(top_k, scores.shape[-1])
    best, columns = scores.topk(top_k)
    probability = best.softmax(-1)
    before = probability.cumsum(-1) - probability
    best = best.masked_fill(before > top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(1, columns, best)


class Hypotheses:
    """The best finished beams of one image."""

    def __init__(self, size: int):
        self.size = size
        self.best: list[tuple[float, list[int]]] = []

    def add(self, score: float, ids: list[int]) -> None:
        self.best.append((score, ids))
        if len(self.best) > self.size:
            self.best.remove(min(self.best, key=lambda hypothesis: hypothesis[0]))

    def beats(self, attainable: float) -> bool:
        """Whether no running beam can enter any more."""
        return len(self.best) == self.size and min(score for score, _ in self.best) >= attainable


class BeamSearch:
    """Beam search over B images at once, `num_beams` rows each."""

    def __init__(self, num_beams, prompt_length, max_length, eos_token_id, length_penalty, length_norm):
        self.num_beams, self.max_length, self.eos_token_id = num_beams, max_length, eos_token_id
        self.length_penalty = length_penalty
        self.generated = length_norm == "generated"
        self.prompt_length = prompt_length

    def normalise(self, log_prob: float, length: int) -> float:
        """`length` counts the prompt and not the end token."""
        return log_prob / (length - self.prompt_length if self.generated else length) ** self.length_penalty

    def run(self, step: Step, prompt: Tensor, pad_token_id: int) -> Tensor:
        B, k = len(prompt), self.num_beams
        device = prompt.device
        ids = prompt.repeat_interleave(k, 0)
        scores = torch.full((B, k), -1e9, device=device)
        scores[:, 0] = 0.0  # the first step takes all its candidates from one beam
        images = torch.arange(B, device=device)[:, None] * k
        finished = [Hypotheses(k) for _ in range(B)]
        done = [False] * B
        while True:
            log_probs = step(ids)
            V = log_probs.shape[-1]
            candidates = (log_probs.view(B, k, V) + scores[..., None]).view(B, k * V)
            best, index = candidates.topk(2 * k)
            scores, beams, tokens = self.select(best, index // V, index % V, ids, finished, done)
            rows = (images + beams.to(device)).flatten()
            ids = torch.cat([ids[rows], tokens.to(device).flatten()[:, None]], 1)
            scores = scores.to(device)
            if all(done) or ids.shape[1] >= self.max_length:
                break
            step.reorder(rows)
        for b, (rows, values) in enumerate(zip(ids.view(B, k, -1).tolist(), scores.tolist())):
            if not done[b]:
                for sequence, value in zip(rows, values):
                    finished[b].add(self.normalise(value, len(sequence)), sequence)
        return self.collect(finished, pad_token_id, device)

    def select(self, best, beams, tokens, ids, finished, done) -> tuple[Tensor, Tensor, Tensor]:
        """Move ended candidates to `finished` and take the best `num_beams` others: scores, beams, tokens [B, k]."""
        k, length = self.num_beams, ids.shape[1]
        chosen = []
        for b, row in enumerate(zip(best.tolist(), beams.tolist(), tokens.tolist())):
            if done[b]:
                chosen.append([(0.0, 0, 0)] * k)
                continue
            running = []
            for rank, (score, beam, token) in enumerate(zip(*row)):
                if token != self.eos_token_id:
                    running.append((score, beam, token))
                elif rank < k:
                    sequence = ids[b * k + beam].tolist()
                    finished[b].add(self.normalise(score, length + self.generated), sequence)
                if len(running) == k:
                    break
            chosen.append(running)
            # transformers 4.15 compares with the best candidate, ended or not; today's with the best running beam
            bound = running[0][0] if self.generated else row[0][0]
            done[b] = finished[b].beats(self.normalise(bound, length + self.generated))
        table = [[[candidate[i] for candidate in running] for running in chosen] for i in range(3)]
        return torch.tensor(table[0]), torch.tensor(table[1]), torch.tensor(table[2])

    def collect(self, finished: list[Hypotheses], pad_token_id: int, device) -> Tensor:
        best = [max(hypotheses.best, key=lambda hypothesis: hypothesis[0])[1] for hypotheses in finished]
        ended = [ids + [self.eos_token_id] if len(ids) < self.max_length else ids for ids in best]
        width = max(map(len, ended))
        return torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in ended], device=device)
