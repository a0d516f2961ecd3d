"""What is chosen at each step of generation: beam search, greedy search, sampling. All of it on the device.

n images with k rows each (beams, or independent samples). Images may be at different lengths; the host knows each
length, since every step adds one token to every text.
"""

from __future__ import annotations

from weakref import proxy

import torch
from torch import Tensor

from blipfast.ops.beam_search import Beams, beam_step, keep_best

from .decoding import Decoding
from .image_memory import ImageMemory
from .replay import Replay, replays


class Search:
    """State of up to C images of which the first `active` run; a subclass says how tokens are chosen.

    `start` and `grow` do a step without the host. On a GPU they are replayed for all C places; those that are not
    active compute, too, and are not read.
    """

    def __init__(self, rules, prompt: Tensor, decoding: Decoding):
        self.rules, self.prompt, self.decoding = rules, prompt, decoding
        C, k, device = len(decoding.images), decoding.beams, prompt.device
        self.ids = prompt.new_empty(C, k, rules.max_length)
        self.length = prompt.new_empty(C, 1)  # of each image's texts
        self.done = torch.empty(C, dtype=torch.bool, device=device)
        self.numbers: list[int] = []
        self.lengths: list[int] = []  # `length` of the active ones, on the host
        self.draws = torch.empty(C, k, rules.max_length, device=device) if rules.sample else None
        self.replay = self.replay_start = None
        if replays(device):
            me = proxy(self)  # a cycle would hold the caches until the garbage collector comes
            self.replay = Replay(lambda: me.grow(C, rules.max_length), device)
            self.replay_start = Replay(lambda: me.start(slice(0, C)), device)

    @property
    def active(self) -> int:
        return len(self.numbers)

    @property
    def room(self) -> int:
        """How many images to take in now. Where steps are replayed, and empty places cost nothing, in fewer goes."""
        C = len(self.ids)
        free = C - self.active
        return free if self.replay is None or 2 * free >= C else 0

    def admit(self, numbers: list[int], images: ImageMemory, draws: Tensor | None) -> None:
        """Take images in, and start their texts."""
        first, last = self.active, self.active + len(numbers)
        if images is not self.decoding.images:
            self.decoding.put(first, images)
        self.numbers += numbers
        self.lengths += [len(self.prompt) + 1] * len(numbers)
        if draws is not None:
            self.draws[first:last] = draws
        if self.replay_start is not None and len(numbers) == len(self.ids):
            self.replay_start()
        else:
            self.start(slice(first, last))

    def start(self, here: slice) -> None:
        """Choose the first token of the images' texts."""
        self.reset(here)
        self.choose(here, self.decoding.read_prompt(here, self.prompt))

    def reset(self, here: slice) -> None:
        """Let images begin with the prompt."""
        self.ids[here] = self.prompt[0]  # unwritten places too: the repetition penalty counts it anyway
        self.ids[here, :, : len(self.prompt)] = self.prompt
        self.length[here].fill_(len(self.prompt))
        self.done[here].fill_(False)

    def advance(self) -> list[tuple[int, list[list[int]]]]:
        """Retire the images that have all their texts, then add a token to the others' texts."""
        ended = self.retire()
        if self.active:
            if self.replay is None:
                self.grow(self.active, max(self.lengths))
            else:
                self.replay()
            self.lengths = [length + 1 for length in self.lengths]
        return ended

    def grow(self, n: int, longest: int) -> None:
        """Add a token to the texts of the first n images, none of which is longer than `longest`."""
        position = self.length[:n] - 1
        tokens = self.ids[:n].gather(2, position[..., None].expand(n, self.ids.shape[1], 1)).squeeze(2)
        self.choose(slice(0, n), self.decoding.read_tokens(tokens, position, longest))

    def retire(self) -> list[tuple[int, list[list[int]]]]:
        if max(self.lengths) <= self.rules.min_length and max(self.lengths) < self.rules.max_length:
            return []  # nothing can have ended, and the host does not wait for the device
        done = self.done[: self.active].tolist()
        leaving = [i for i, length in enumerate(self.lengths) if done[i] or length == self.rules.max_length]
        if not leaving:
            return []
        texts = self.texts(leaving, [i for i in leaving if not done[i]])
        ended = [(self.numbers[i], each) for i, each in zip(leaving, texts, strict=True)]
        stay = self.active - len(leaving)
        free = [i for i in leaving if i < stay]
        if free:
            self.move(sorted(set(range(stay, self.active)).difference(leaving)), free)
        self.numbers, self.lengths = self.numbers[:stay], self.lengths[:stay]
        # what is not read must not grow beyond the texts' room, nor begin in slots before the beams' first
        self.length[stay:] = len(self.prompt) + 1
        return ended

    def move(self, places: list[int], to: list[int]) -> None:
        """Let images take the places of others, which have ended."""
        for mine in (self.numbers, self.lengths):
            for i, j in zip(places, to, strict=True):
                mine[j] = mine[i]
        places, to = self.index(places), self.index(to)
        self.decoding.move(places, to)
        for state in self.states():
            state[to] = state[places]

    def index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, device=self.ids.device)

    def states(self) -> list[Tensor]:
        """What is kept of each image, [C, ...]."""
        return [self.ids, self.length, self.done] + ([] if self.draws is None else [self.draws])

    def penalise(self, here: slice, scores: Tensor) -> Tensor:
        """Scores [n, k, V] after the repetition penalty and the ban on ending too early."""
        penalty = self.rules.repetition_penalty
        if penalty != 1.0:
            ids = self.ids[here, : scores.shape[1]]
            seen = scores.gather(2, ids)
            scores = scores.scatter(2, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        eos = self.rules.eos_token_id
        scores[..., eos] = scores[..., eos].masked_fill(self.length[here] < self.rules.min_length, -torch.inf)
        return scores

    def choose(self, here: slice, logits: Tensor) -> None:
        """Add a token to each text of images from logits [n, 1 or k, V]."""
        raise NotImplementedError

    def texts(self, places: list[int], cut: list[int]) -> list[list[list[int]]]:
        """Token ids of images' texts, the end token included where there is one. cut: images that ran out of room."""
        raise NotImplementedError


class Draws(Search):
    """Greedy search, or independent samples from the nucleus. A text that has ended is filled with padding."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ended = torch.empty(self.ids.shape[:2], dtype=torch.bool, device=self.ids.device)

    @staticmethod
    def rows(rules) -> int:
        return rules.num_return

    def reset(self, here: slice) -> None:
        super().reset(here)
        self.ended[here].fill_(False)

    def states(self) -> list[Tensor]:
        return [*super().states(), self.ended]

    def choose(self, here: slice, logits: Tensor) -> None:
        rules, k = self.rules, self.ids.shape[1]
        scores = self.penalise(here, logits.float().expand(-1, k, -1).contiguous())
        if rules.sample:
            draw = self.draws[here].gather(2, self.length[here, :, None].expand(len(scores), k, 1))
            tokens = sample(nucleus(scores, rules.top_p, rules.top_k).softmax(-1), draw)
        else:
            tokens = scores.argmax(-1)
        ended = self.ended[here]
        tokens = tokens.masked_fill(ended, rules.pad_token_id)
        ended |= tokens == rules.eos_token_id
        self.done[here] = ended.all(1)
        self.write(here, tokens)

    def write(self, here: slice, tokens: Tensor) -> None:
        """Append tokens [n, k] to the texts of images."""
        self.ids[here].scatter_(2, self.length[here, :, None].expand(*tokens.shape, 1), tokens[..., None])
        self.length[here] += 1

    def texts(self, places: list[int], cut: list[int]) -> list[list[list[int]]]:
        found = self.ids[self.index(places)].tolist()
        return [[ids[: self.lengths[i]] for ids in each] for i, each in zip(places, found, strict=True)]


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
        C, k, L = self.ids.shape
        score = torch.empty(C, k, device=self.ids.device)
        self.beams = Beams(
            ids=self.ids,
            length=self.length,
            score=score,
            past=self.decoding.past,
            done=self.done,
            ended_ids=torch.empty_like(self.ids),
            ended_length=torch.zeros_like(score, dtype=torch.long),
            ended_score=torch.empty_like(score),
        )
        # transformers 4.15 counts the prompt, later ones the tokens made, the end token too
        self.generated = self.rules.length_norm == "generated"
        counted = torch.arange(L + 2, device=score.device) - (len(self.prompt) if self.generated else 0)
        self.worth = counted.clamp_min(1).float() ** self.rules.length_penalty  # of a text by its tokens

    @staticmethod
    def rows(rules) -> int:
        return rules.num_beams

    def reset(self, here: slice) -> None:
        super().reset(here)
        self.beams.ended_score[here].fill_(-torch.inf)

    def states(self) -> list[Tensor]:
        own = ("score", "ended_score", "ended_ids", "ended_length")
        return [*super().states(), *(getattr(self.beams, name) for name in own)]

    def choose(self, here: slice, logits: Tensor) -> None:
        penalised = self.rules.repetition_penalty != 1.0
        beam_step(
            self.penalise(here, logits.float().log_softmax(-1)) if penalised else logits,
            self.beams.at(here),
            self.worth[int(self.generated) :],
            eos=self.rules.eos_token_id,
            min_length=self.rules.min_length,
            log_probs=penalised,
            running=self.generated,
        )

    def texts(self, places: list[int], cut: list[int]) -> list[list[list[int]]]:
        if cut:
            here = self.index(cut)
            beams = self.beams.at(here)
            every = torch.arange(beams.ids.shape[1], device=here.device).expand(len(cut), -1)
            keep_best(beams, beams.score / self.worth[beams.length], every, beams.length)
            for all_of_it, changed in zip(self.beams.tensors(), beams.tensors(), strict=True):
                all_of_it[here] = changed
        here, best, L = self.index(places), slice(self.rules.num_return), self.rules.max_length
        ended_ids, lengths = (x[here, best].tolist() for x in (self.beams.ended_ids, self.beams.ended_length))
        found = zip(ended_ids, lengths, strict=True)
        texts = [[ids[:length] for ids, length in zip(*each, strict=True)] for each in found]
        return [[ids + [self.rules.eos_token_id] if len(ids) < L else ids for ids in each] for each in texts]
