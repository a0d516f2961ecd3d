"""What is chosen at each step of generation: beam search, greedy search, sampling. All of it on the device.

n images with k rows each (beams, or independent samples). Images may be at different lengths; the host knows each
length, since every step adds one token to every text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decoding import Decoding
from .image_memory import ImageMemory


class Search:
    """State of up to C images of which the first `active` run; a subclass says how tokens are chosen."""

    def __init__(self, rules, prompt: Tensor, decoding: Decoding):
        self.rules, self.prompt, self.decoding = rules, prompt, decoding
        C, k, device = len(decoding.images), decoding.beams, prompt.device
        self.ids = prompt.new_empty(C, k, rules.max_length)
        self.done = torch.empty(C, dtype=torch.bool, device=device)
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        self.draws = torch.empty(C, k, rules.max_length, device=device) if rules.sample else None

    @property
    def active(self) -> int:
        return len(self.numbers)

    def admit(self, numbers: list[int], images: ImageMemory, draws: Tensor | None) -> None:
        """Take images in, and choose the first token of their texts."""
        first, last = self.active, self.active + len(numbers)
        if images is not self.decoding.images:
            for i in range(len(numbers)):
                self.decoding.put(first + i, images, i)
        self.numbers += numbers
        self.lengths += [len(self.prompt)] * len(numbers)
        if draws is not None:
            self.draws[first:last] = draws
        self.reset(first, last)
        logits = self.decoding.read_prompt(first, last, self.prompt)
        self.choose(first, last, logits.float())

    def reset(self, first: int, last: int) -> None:
        """Let images first ... last - 1 begin with the prompt."""
        self.ids[first:last] = self.prompt[0]  # unwritten places too: the repetition penalty counts it anyway
        self.ids[first:last, :, : len(self.prompt)] = self.prompt
        self.done[first:last] = False

    def advance(self) -> list[tuple[int, list[list[int]]]]:
        """Retire the images that have all their texts, then add a token to the others' texts."""
        ended = self.retire()
        if n := self.active:
            last = torch.tensor(self.lengths, device=self.ids.device)[:, None, None] - 1
            tokens = self.ids[:n].gather(2, last.expand(n, self.ids.shape[1], 1)).squeeze(2)
            self.choose(0, n, self.decoding.read_tokens(tokens, self.lengths).float())
        return ended

    def retire(self) -> list[tuple[int, list[list[int]]]]:
        ended = []
        done = self.done[: self.active].tolist()
        for place in reversed(range(self.active)):
            if not done[place] and self.lengths[place] < self.rules.max_length:
                continue
            ended.append((self.numbers[place], self.texts(place, done[place])))
            last = self.active - 1
            if place < last:
                self.move(last, place)
            self.numbers[place], self.lengths[place] = self.numbers[last], self.lengths[last]
            self.numbers.pop(), self.lengths.pop()
        return ended

    def move(self, place: int, to: int) -> None:
        self.decoding.move(place, to)
        for state in self.states():
            state[to] = state[place]

    def states(self) -> list[Tensor]:
        """What is kept of each image, [C, ...]."""
        return [self.ids, self.done] + ([] if self.draws is None else [self.draws])

    def penalise(self, first: int, last: int, scores: Tensor) -> Tensor:
        """Scores [n, k, V] after the repetition penalty and the ban on ending too early."""
        penalty = self.rules.repetition_penalty
        lengths = self.lengths[first:last]
        if penalty != 1.0:
            ids = self.ids[first:last, : scores.shape[1], : max(lengths)]
            seen = scores.gather(2, ids)
            scores = scores.scatter(2, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        if min(lengths) < self.rules.min_length:
            short = torch.tensor([length < self.rules.min_length for length in lengths], device=scores.device)
            eos = self.rules.eos_token_id
            scores[..., eos] = scores[..., eos].masked_fill(short[:, None], -torch.inf)
        return scores

    def write(self, first: int, last: int, tokens: Tensor) -> None:
        """Append tokens [n, k] to the texts of images first ... last - 1."""
        place = torch.tensor(self.lengths[first:last], device=tokens.device)[:, None, None]
        self.ids[first:last].scatter_(2, place.expand(*tokens.shape, 1), tokens[..., None])
        self.lengths[first:last] = [length + 1 for length in self.lengths[first:last]]

    def choose(self, first: int, last: int, logits: Tensor) -> None:
        """Add a token to each text of images first ... last - 1 from logits [n, 1 or k, V]."""
        raise NotImplementedError

    def texts(self, place: int, done: bool) -> list[list[int]]:
        """Token ids of an image's texts, the end token included where there is one."""
        raise NotImplementedError


class Draws(Search):
    """Greedy search, or independent samples from the nucleus. A text that has ended is filled with padding."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ended = torch.empty(self.ids.shape[:2], dtype=torch.bool, device=self.ids.device)

    @staticmethod
    def rows(rules) -> int:
        return rules.num_return

    def reset(self, first: int, last: int) -> None:
        super().reset(first, last)
        self.ended[first:last] = False

    def states(self) -> list[Tensor]:
        return [*super().states(), self.ended]

    def choose(self, first: int, last: int, logits: Tensor) -> None:
        rules, k = self.rules, self.ids.shape[1]
        scores = self.penalise(first, last, logits.expand(-1, k, -1).contiguous())
        if rules.sample:
            place = torch.tensor(self.lengths[first:last], device=scores.device)[:, None, None]
            draw = self.draws[first:last].gather(2, place.expand(len(scores), k, 1))
            tokens = sample(nucleus(scores, rules.top_p, rules.top_k).softmax(-1), draw)
        else:
            tokens = scores.argmax(-1)
        ended = self.ended[first:last]
        tokens = tokens.masked_fill(ended, rules.pad_token_id)
        ended |= tokens == rules.eos_token_id
        self.done[first:last] = ended.all(1)
        self.write(first, last, tokens)

    def texts(self, place: int, done: bool) -> list[list[int]]:
        return self.ids[place, :, : self.lengths[place]].tolist()


def sample(probability: Tensor, draw: Tensor) -> Tensor:
    """Tokens [n, k] drawn from probability [n, k, V] by uniform numbers [n, k, 1] in [0, 1)."""
    total = probability.cumsum(-1)
    token = torch.searchsorted(total, draw * total[..., -1:], right=True).squeeze(-1)
    likely = (probability > 0) * torch.arange(1, probability.shape[-1] + 1, device=probability.device)
    return torch.minimum(token, likely.amax(-1) - 1)  # rounding must not pass the last token that is possible


def nucleus(scores: Tensor, top_p: float, top_k: int) -> Tensor:
    """Keep the `top_k` best scores a row and of them the fewest whose probability reaches `top_p`; others -inf."""
    best, columns = scores.topk(min(top_k, scores.shape[-1]))
    probability = best.softmax(-1)
    before = probability.cumsum(-1) - probability
    best = best.masked_fill(before > top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(-1, columns, best)


class BeamSearch(Search):
    """The best k running beams of each image, and its best k ended ones."""

    def __init__(self, *args):
        super().__init__(*args)
        C, k = self.ids.shape[:2]
        self.score = torch.empty(C, k, device=self.ids.device)
        self.ended_score = torch.empty_like(self.score)  # -inf where none has ended
        self.ended_ids = torch.empty_like(self.ids)
        self.ended_length = torch.zeros_like(self.score, dtype=torch.long)

    @staticmethod
    def rows(rules) -> int:
        return rules.num_beams

    def reset(self, first: int, last: int) -> None:
        super().reset(first, last)
        self.ended_score[first:last] = -torch.inf

    def states(self) -> list[Tensor]:
        return [*super().states(), self.score, self.ended_score, self.ended_ids, self.ended_length]

    def choose(self, first: int, last: int, logits: Tensor) -> None:
        k, here = self.ids.shape[1], slice(first, last)
        scores = self.penalise(first, last, logits.log_softmax(-1))
        n, live, V = scores.shape  # the first step takes all its candidates from one beam
        if live == k:
            scores = scores + self.score[here, :, None]
        best, index = scores.flatten(1).topk(2 * k)
        beams, tokens = index // V, index % V
        length = torch.tensor(self.lengths[here], device=scores.device)[:, None]

        ends = tokens == self.rules.eos_token_id
        among_best = torch.arange(2 * k, device=scores.device) < k
        ended = self.normalise(best, length + self.generated)
        ended = ended.masked_fill(~(ends & among_best) | self.done[here, None], -torch.inf)
        self.add(here, ended[:, :k], beams[:, :k], length)

        running = (
            ends.to(torch.int8).sort(dim=1, stable=True).indices[:, :k]
        )  # those that do not end, best first
        score = best.gather(1, running)
        self.finish(here, score[:, :1] if self.generated else best[:, :1], length)
        parents = beams.gather(1, running)
        self.score[here] = score
        self.ids[here] = self.ids[here].gather(1, parents[..., None].expand(-1, -1, self.ids.shape[2]))
        self.decoding.reorder(first, last, parents)
        self.write(first, last, tokens.gather(1, running))

    @property
    def generated(self) -> bool:
        return self.rules.length_norm == "generated"

    def normalise(self, log_prob: Tensor, length: Tensor) -> Tensor:
        """`length` counts the prompt and not the end token."""
        counted = length - len(self.prompt) if self.generated else length
        return log_prob / counted.clamp_min(1) ** self.rules.length_penalty

    def add(self, here: slice, score: Tensor, beams: Tensor, length: Tensor) -> None:
        """Keep the best k of the ended texts and new ones: texts `beams` [n, c] of `length` [n, 1]; -inf is none."""
        k, L = self.ids.shape[1:]
        everything = torch.cat([self.ended_score[here], score], 1)
        self.ended_score[here], order = (
            x[:, :k] for x in everything.sort(dim=1, descending=True, stable=True)
        )
        ids = self.ids[here].gather(1, beams[..., None].expand(-1, -1, L))
        ids = torch.cat([self.ended_ids[here], ids], 1)
        self.ended_ids[here] = ids.gather(1, order[..., None].expand(-1, -1, L))
        lengths = torch.cat([self.ended_length[here], length.expand_as(score)], 1)
        self.ended_length[here] = lengths.gather(1, order)

    def finish(self, here: slice, bound: Tensor, length: Tensor) -> None:
        """An image is done when no running beam can beat its worst ended one any more.

        transformers 4.15 compares with the best candidate, ended or not; today's with the best running beam.
        """
        attainable = self.normalise(bound, length + self.generated).squeeze(1)
        worst = self.ended_score[here].amin(1)
        self.done[here] |= worst.isfinite() & (worst >= attainable)

    def texts(self, place: int, done: bool) -> list[list[int]]:
        here = slice(place, place + 1)
        if not done:
            every = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
            length = torch.tensor([[self.lengths[place]]], device=self.ids.device)
            self.add(here, self.normalise(self.score[here], length), every, length)
        count = min(self.rules.num_return, self.ids.shape[1])
        rows = zip(self.ended_ids[place, :count].tolist(), self.ended_length[place, :count].tolist())
        texts = [ids[:length] for ids, length in rows]
        return [ids + [self.rules.eos_token_id] if len(ids) < self.rules.max_length else ids for ids in texts]
