"""Text generation from the MED decoder: greedy, beam search, nucleus sampling, as official BLIP defines them.

The rules are those of transformers 4.15, which official BLIP ran on: log-softmax, then the repetition penalty over
all tokens so far (prompt included), then no end before `min_length`, then the beam's score; a finished beam counts
only if it ranks among the best `num_beams`. Lengths count the prompt.

Images come and go: one that has all its texts leaves, and the next that waits takes its place. What an image's texts
are does not depend on its neighbours. On a GPU a step is recorded once and then replayed, also by later calls (see
`recorded`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from . import recorded
from .decoding import Decoding, text_rows
from .image_memory import image_memory
from .med import BertConfig, BertLMHeadModel
from .out_of_memory import ERRORS, is_out_of_memory
from .packed import check_finite
from .token_search import BeamSearch, Draws

ROWS = 384  # of texts at a time on a GPU, whose step for so many takes hardly longer than one for few
FEWEST = 8  # images at a time on a CPU, which takes three times as long for one alone
TOP_K = 50  # official sampling also keeps only the 50 likeliest tokens (transformers' default)


@dataclass(frozen=True)
class Rules:
    """How texts are made. Lengths are in tokens and count the prompt.

    length_norm: a beam's score is divided by its length "with_prompt" (official) or by the "generated" tokens
    (transformers >= 4.36), to the power length_penalty. num_return: texts an image, the n best beams or n samples.
    """

    eos_token_id: int
    pad_token_id: int
    max_length: int = 30
    min_length: int = 10
    num_beams: int = 1
    sample: bool = False
    top_p: float = 0.9
    top_k: int = TOP_K
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    length_norm: str = "with_prompt"
    num_return: int = 1

    @classmethod
    def of(cls, prompt_length: int, *, max_new_tokens: int | None = None, **rules) -> Rules:
        """Rules for a prompt of so many tokens. max_new_tokens sets max_length without the prompt.

        min_length is 10 unless given (or None), and not beyond max_length then.
        """
        if max_new_tokens is not None:
            rules["max_length"] = prompt_length + max_new_tokens
        if rules.get("min_length") is None:
            rules["min_length"] = min(cls.min_length, rules.get("max_length", cls.max_length))
        return cls(**rules)

    def check(self, prompt_length: int, config: BertConfig) -> None:
        """Raises ValueError for rules that cannot be met."""
        vocab_size = config.vocab_size
        for name in ("max_length", "min_length", "num_beams", "top_k", "num_return"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
        if self.max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length {self.max_length} exceeds the model's {config.max_position_embeddings} positions."
            )
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} exceeds max_length {self.max_length}.")
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no room after a prompt of {prompt_length} tokens."
            )
        if not 1 <= self.num_beams or 2 * self.num_beams > vocab_size - 1:
            raise ValueError(
                f"num_beams must be between 1 and half of the {vocab_size - 1} tokens that go on, got {self.num_beams}."
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}.")
        if self.length_norm not in ("with_prompt", "generated"):
            raise ValueError(f'length_norm must be "with_prompt" or "generated", got {self.length_norm!r}.')
        most = self.num_return if self.sample else self.num_beams
        if not 1 <= self.num_return <= most:
            raise ValueError(
                f"num_return must be between 1 and num_beams, here {most} (or any number when sampling), "
                f"got {self.num_return}."
            )


@torch.no_grad()
def generate(
    decoder: BertLMHeadModel,
    prompt: Tensor,
    image_embeds: Tensor,
    *,
    image_mask: Tensor | None = None,
    batch_size: int | None = None,
    **rules,
) -> Tensor:
    """Token ids [B * num_return, L <= max_length], prompt first, padded after the end token.

    prompt [T], the same for all; image_embeds [B, N, D_v] (any states to cross-attend to; image_mask [B, N]).
    batch_size: images decoded at a time, all unless given; halved as often as memory runs out, with the same result.
    rules: as of `Rules.of`. Raises ValueError for rules that cannot be met, for image states that are not finite, and
    for none.
    """
    rules = Rules.of(len(prompt), **rules)
    if not len(image_embeds):
        raise ValueError("There are no images to write texts for.")
    batch_size = len(image_embeds) if batch_size is None else batch_size
    texts = dict(stream(decoder, prompt, [(image_embeds, image_mask)], rules, batch_size))
    rows = [ids for i in range(len(image_embeds)) for ids in texts[i]]
    width = max(map(len, rows))
    padded = [ids + [rules.pad_token_id] * (width - len(ids)) for ids in rows]
    return torch.tensor(padded, device=image_embeds.device)


@torch.no_grad()
def stream(
    decoder: BertLMHeadModel,
    prompt: Tensor,
    batches: Iterable[tuple],
    rules: Rules,
    batch_size: int | None = None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """(number of the image, its texts' token ids), in the order in which they are finished.

    batches: (image_embeds [B, N, D_v], image_mask [B, N] or None), taken when a place is free. batch_size: images
    decoded at a time, of as many batches as it takes; fewer where memory does not suffice. Unless given, see `places`.
    """
    rules.check(len(prompt), decoder.config)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    waiting = Waiting(iter(batches), rules)
    while waiting.more():
        batch_size = batch_size or places(decoder, prompt, waiting.queue[0].embeds, rules)
        enough = True
        try:
            yield from decode(decoder, prompt, waiting, rules, batch_size)
        except ERRORS as error:
            if not is_out_of_memory(error) or batch_size == 1 or error is waiting.failure:
                raise
            enough = False
        if not enough:  # only now is free what the error's traceback held
            recorded.forget(decoder)
            # a graph's memory is not free before, nor cached memory to a recording
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            batch_size = max(1, min(batch_size, waiting.largest) // 2)
            waiting.put_back()


def places(decoder: BertLMHeadModel, prompt: Tensor, embeds: Tensor, rules: Rules) -> int:
    """How many images to decode at a time, which come in batches like `embeds`.

    On a CPU one batch, but not fewer than 8. On a GPU as many as have `ROWS` texts, 128 of 3 beams, if keys and values
    of theirs take no more than a quarter of the memory that is free.
    """
    if not embeds.is_cuda:
        return max(len(embeds), FEWEST)
    config, rows = decoder.config, search_of(rules).rows(rules)
    tokens = embeds.shape[1] + text_rows(rows, len(prompt), rules.max_length)
    each = 2 * config.num_hidden_layers * config.hidden_size * tokens * embeds.element_size()
    free, _ = torch.cuda.mem_get_info(embeds.device)
    return max(len(embeds), min(ROWS // rows, free // (4 * each)))


def search_of(rules: Rules) -> type[BeamSearch] | type[Draws]:
    return BeamSearch if rules.num_beams > 1 and not rules.sample else Draws


def decode(
    decoder: BertLMHeadModel, prompt: Tensor, waiting: Waiting, rules: Rules, most: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """Decode until nothing waits, at most so many images at a time."""
    kind = search_of(rules)
    sizes = (kind.rows(rules), len(prompt), rules.max_length)
    search: Draws | BeamSearch | None = None
    like = None
    while waiting.more() or search.active:
        free = search.room if search else most
        if free and waiting.more():
            chosen = waiting.take(free)
            if search is None:
                # before there are keys and values of these images: what is not taken up again is freed
                like = recorded.likeness(kind, rules, prompt, decoder, chosen.embeds, chosen.mask)
                search = recorded.take(decoder, like, prompt)
            images = image_memory(decoder.bert.encoder, chosen.embeds, chosen.mask, text_rows(*sizes))
            if search is None:
                search = kind(rules, prompt.clone(), Decoding(decoder, images, *sizes))
            search.admit(chosen.numbers, images, chosen.draws)
        for number, texts in search.advance():
            waiting.finished(number)
            yield number, texts
    recorded.leave(decoder, like, search)


@dataclass
class Chosen:
    """Images to be decoded next: their numbers, embeds [B, N, D_v], mask, and uniform numbers [B, ...] for sampling."""

    numbers: list[int]
    embeds: Tensor
    mask: Tensor | None
    draws: Tensor | None

    def part(self, here: slice) -> Chosen:
        tensors = (self.embeds, self.mask, self.draws)
        return Chosen(self.numbers[here], *(None if x is None else x[here] for x in tensors))

    @staticmethod
    def together(several: list[Chosen]) -> Chosen:
        if len(several) == 1:
            return several[0]
        columns = zip(*((one.embeds, one.mask, one.draws) for one in several))
        tensors = (None if column[0] is None else torch.cat(column) for column in columns)
        return Chosen([number for one in several for number in one.numbers], *tensors)


class Waiting:
    """Images that are not being decoded yet, and those that are, in case memory runs out."""

    def __init__(self, batches: Iterator[tuple], rules: Rules):
        self.batches, self.rules = batches, rules
        self.failure: Exception | None = None  # of who makes the batches, who cannot go on
        self.count = 0  # images seen so far
        self.kind: tuple | None = None  # shape of an image's states, and whether they have a mask
        self.largest = 0  # number of images taken at a time so far
        self.queue: list[Chosen] = []
        self.running: dict[int, Chosen] = {}

    def more(self) -> bool:
        """Whether an image waits; takes the next batch if none does.

        Where that fails, nothing waits any more, and the error is raised once nobody is being decoded.
        """
        try:
            while not self.queue and self.failure is None:
                embeds, mask = next(self.batches)
                if len(embeds):
                    self.add(embeds, mask)
        except StopIteration:
            pass
        except Exception as error:
            self.failure = error
        if self.failure is not None and not self.queue and not self.running:
            raise self.failure
        return bool(self.queue)

    def add(self, embeds: Tensor, mask: Tensor | None) -> None:
        """Let a batch wait. Raises ValueError for states that are not finite, and for others than before."""
        numbers = list(range(self.count, self.count + len(embeds)))
        check_finite(embeds, numbers)
        kind = (tuple(embeds.shape[1:]), mask is not None)
        self.kind = self.kind or kind
        if kind != self.kind:
            raise ValueError(
                f"Image {self.count} has states of shape {kind[0]}, those before have {self.kind[0]}; "
                "pictures of one size go together, all with a mask or none."
            )
        self.count += len(embeds)
        # drawn in the order of the images, so that texts do not depend on who is decoded with whom
        draws = None
        if self.rules.sample:
            draws = torch.rand(len(embeds), self.rules.num_return, self.rules.max_length).to(embeds.device)
        self.queue.append(Chosen(numbers, embeds, mask, draws))

    def take(self, most: int) -> Chosen:
        """Up to `most` images of those that wait longest, of as many batches as it takes."""
        taken: list[Chosen] = []
        while most and self.more():
            batch = self.queue.pop(0)
            taken.append(batch.part(slice(0, most)))
            rest = batch.part(slice(most, None))
            if rest.numbers:
                self.queue.insert(0, rest)
            most -= len(taken[-1].numbers)
            # before memory is asked for, so that nobody is forgotten
            self.running |= {
                number: taken[-1].part(slice(i, i + 1)) for i, number in enumerate(taken[-1].numbers)
            }
        self.largest = max(self.largest, sum(len(one.numbers) for one in taken))
        return Chosen.together(taken)

    def finished(self, number: int) -> None:
        del self.running[number]

    def put_back(self) -> None:
        """Everything that was being decoded waits again."""
        self.queue[:0] = self.running.values()
        self.running = {}
