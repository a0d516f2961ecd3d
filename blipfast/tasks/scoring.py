"""Two-stage retrieval over a test collection: ITC for all pairs, ITM for the candidates it finds.

Source: official `train_retrieval.py`. Score of a candidate = ITM logit of class 1 + ITC cosine; other pairs: -100.
Unlike there, a picture's keys and values are projected once for all texts that want it, a pair that both directions
want is scored once, and every rank works on its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from blipfast.models import gather
from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.momentum import hard_negatives

from .sharing import my_share

UNSCORED = -100.0
PAIRS = 512  # scored in one pass of the text encoder
MEMORY = (
    4e9  # bytes of picture states kept; those of further pictures are computed again when they are needed
)


@dataclass
class Scores:
    """similarity [I, T]: ITC cosines. i2t [I, T] and t2i [T, I]: scores after reranking. All on the CPU."""

    similarity: Tensor
    i2t: Tensor
    t2i: Tensor


class Collection:
    """The encoded pictures (this rank's share) and texts of a test set.

    Memory: 12 bytes a (picture, text) pair for the scores, `memory` bytes of picture states, one pass of `pairs`.
    Where a device has not enough for a pass, the pass is halved, with the same results.
    """

    def __init__(
        self,
        model: BLIP_ITM,
        load: Callable[[list[int]], Tensor],
        images: int,
        texts: list[str],
        device,
        batch_size: int = 64,
        *,
        memory: float = MEMORY,
        pairs: int = PAIRS,
        progress: bool = False,
    ):
        """load(indices): those of the `images` pictures, [B, 3, S, S]. Raises ValueError without pictures or texts."""
        if not images or not texts:
            raise ValueError(f"Retrieval needs pictures and texts; there are {images} and {len(texts)}.")
        self.model, self.load, self.device = model, load, device
        self.batch_size, self.pairs, self.progress = batch_size, pairs, progress
        self.images, self.share = images, list(my_share(images))
        self.states: dict[int, Tensor] = {}
        features = []
        for indices in self.bar(list(chunks(self.share, batch_size)), "encoding pictures"):
            states = self.encode(indices)
            features.append(model.image_features(states).float())
            size = states[0].numel() * states.element_size()
            for index, state in zip(indices, states):
                if (len(self.states) + 1) * size <= memory:
                    self.states[index] = state.cpu()
        self.texts = model.encode_text(texts)
        text_features = torch.cat(
            [model.text_features(part).float() for part in chunks(self.texts, batch_size)]
        )
        width = text_features.shape[1]
        own = torch.cat(features) if features else text_features.new_zeros(0, width)
        self.similarity = all_rows(own @ text_features.t(), images)

    def encode(self, indices: list[int]) -> Tensor:
        return self.model.visual_encoder(self.load(indices).to(self.device))

    def states_of(self, indices: list[int]) -> Tensor:
        """Picture states [B, N, D_v] on the device, from memory or from the pictures."""
        missing = [index for index in indices if index not in self.states]
        fresh = dict(zip(missing, self.encode(missing))) if missing else {}
        return torch.stack([fresh.get(i, self.states.get(i)).to(self.device) for i in indices])

    def match(self, wanted: dict[int, list[int]]) -> dict[int, Tensor]:
        """ITM logits [K, 2] on the CPU of each of this rank's pictures against the texts wanted of it."""
        found = {image: torch.zeros(len(texts), 2) for image, texts in wanted.items()}
        todo = [(image, place) for image, texts in wanted.items() for place in range(len(texts))]
        bar = self.bar(None, "reranking", total=len(todo))
        start, pairs = 0, self.pairs
        while start < len(todo):
            batch = todo[start : start + pairs]
            try:
                logits = self.score(batch, wanted)
            except torch.OutOfMemoryError:
                if pairs == 1:
                    raise
                pairs = max(1, pairs // 2)
                continue
            for (image, place), row in zip(batch, logits):
                found[image][place] = row
            start += len(batch)
            bar.update(len(batch))
        bar.close()
        return found

    def score(self, batch: list[tuple[int, int]], wanted: dict[int, list[int]]) -> Tensor:
        """ITM logits [B, 2] of pairs (picture, place among the texts wanted of it)."""
        images = list(dict.fromkeys(image for image, _ in batch))
        order = {image: i for i, image in enumerate(images)}
        states = self.model.image_states(self.states_of(images))
        texts = [self.texts[wanted[image][place]] for image, place in batch]
        return self.model.match(states, texts, [order[image] for image, _ in batch]).float().cpu()

    def rerank(self, k: int, score: str = "itm+itc") -> Scores:
        """Scores on each picture's and text's `k` nearest (at most all): by "itm+itc" (official), "itm" or "itc"."""
        if score == "itc":
            return Scores(self.similarity, self.similarity, self.similarity.t())
        for_image, for_text = nearest(self.similarity, k), nearest(self.similarity.t(), k)
        wanted = {
            image: (for_image[image] | for_text[:, image]).nonzero().squeeze(1).tolist()
            for image in self.share
        }
        own = torch.full((len(self.share), len(self.texts)), UNSCORED)
        for row, (image, logits) in enumerate(self.match(wanted).items()):
            own[row, wanted[image]] = logits[:, 1]
        scores = all_rows(own.to(self.device), self.images)
        if score == "itm+itc":
            scores += self.similarity
        return Scores(
            self.similarity,
            scores.masked_fill(~for_image, UNSCORED),
            scores.t().masked_fill(~for_text, UNSCORED),
        )

    def itm_accuracy(self, img2txt: list[list[int]], temperature: float = 0.07, seed: int = 0) -> float:
        """ITM accuracy on pairs made as in training: each true pair, a hard text and a hard picture for it.

        Always answering "no match" gives 2 / 3.
        """
        truth = torch.zeros_like(self.similarity, dtype=torch.bool)
        for image, texts in enumerate(img2txt):
            truth[image, texts] = True
        own = torch.tensor([texts[0] for texts in img2txt])
        sharp = self.similarity / temperature
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hard_text, has_text = hard_negatives(sharp.softmax(1), truth)
            hard_image, has_image = hard_negatives(sharp.softmax(0).t()[own], truth.t()[own])
        pairs: dict[int, list[tuple[int, int]]] = {image: [] for image in self.share}
        for image in range(self.images):
            made = [(image, own[image], 1, True), (image, hard_text[image], 0, has_text[image])]
            made.append((int(hard_image[image]), own[image], 0, has_image[image]))
            for picture, text, label, counts in made:
                if counts and picture in pairs:
                    pairs[picture].append((int(text), label))
        logits = self.match({image: [text for text, _ in found] for image, found in pairs.items()})
        right = [(logits[i].argmax(1) == torch.tensor([y for _, y in pairs[i]])) for i in pairs if pairs[i]]
        count = torch.tensor([sum(int(r.sum()) for r in right), sum(map(len, right))], device=self.device)
        total = gather.concat_all_gather(count[None]).sum(0).tolist()
        return total[0] / total[1]

    def bar(self, items: Iterable | None, name: str, total: int | None = None) -> tqdm:
        hidden = not self.progress or gather.rank() > 0 or None  # None: where there is no terminal
        return tqdm(items, desc=name, total=total, disable=hidden, leave=False)


def chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def nearest(similarity: Tensor, k: int) -> Tensor:
    """The k best (at most all) columns of each row of [R, C], as a mask."""
    best = similarity.topk(min(k, similarity.shape[1]), 1).indices
    return torch.zeros(similarity.shape, dtype=torch.bool).scatter_(1, best, True)


def all_rows(own: Tensor, count: int) -> Tensor:
    """The rows of `my_share` on every rank -> all `count` rows in order, on every rank's CPU."""
    world = gather.world_size()
    if world == 1:
        return own.cpu()
    padded = own.new_zeros(-(-count // world), own.shape[1])
    padded[: len(own)] = own
    rows = gather.concat_all_gather(padded).cpu()
    return rows.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:count]
