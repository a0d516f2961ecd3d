"""Two-stage retrieval over a test collection: ITC for all pairs, ITM for the candidates it finds.

Source: official `train_retrieval.py`. Score of a candidate = ITM logit of class 1 + ITC cosine; other pairs: -100.
Unlike there, a picture's keys and values are projected once for all texts that want it, a text's first self-attention
is done once for all pictures, a pair that both directions want is scored once, and every rank has its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from blipfast.metrics import check_truths
from blipfast.models import gather
from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.momentum import hard_negatives
from blipfast.models.out_of_memory import ERRORS, in_halves, is_out_of_memory
from blipfast.models.packed import begin, check_finite

from .sharing import my_share

UNSCORED = -100.0
# scored in one pass of the text encoder; the host of an H200 takes 20 to 50 ms to launch it, the GPU 7 for 1,000 pairs
PAIRS = {"cpu": 512, "cuda": 16384}
MEMORY = 4e9  # bytes kept of texts and pictures; what does not fit is computed again whenever it is needed


@dataclass
class Scores:
    """similarity [I, T]: ITC cosines. i2t [I, T] and t2i [T, I]: scores after reranking. All on the CPU."""

    similarity: Tensor
    i2t: Tensor
    t2i: Tensor


class Collection:
    """The encoded pictures (this rank's share) and texts of a test set.

    Memory: 18 bytes a (picture, text) pair for the scores, one pass of `pairs` that meet up to `batch_size` pictures,
    and `memory` bytes of states: those of texts on the device if all fit (COCO's 25,010: 0.5 GB in bf16), then those of
    pictures on the CPU. Where there is not enough for a batch or a pass, it is halved, with the same results.
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
        pairs: int | None = None,
        progress: bool = False,
    ):
        """load(indices): those of the `images` pictures, [B, 3, S, S].

        Raises ValueError without pictures or texts, and for a picture that gives numbers that are not finite.
        """
        if not images or not texts:
            raise ValueError(f"Retrieval needs pictures and texts; there are {images} and {len(texts)}.")
        self.model, self.load, self.device = model, load, device
        self.batch_size, self.progress = batch_size, progress
        self.pairs = pairs or PAIRS[torch.device(device).type]
        self.images, self.share = images, list(my_share(images))
        ids, head = model.encode_text(texts), model.itm_head.weight
        self.texts = model.pack(ids)
        needed = len(self.texts.ids) * head.shape[1] * head.element_size()
        if needed <= memory:  # texts first: a byte of them saves more work than one of pictures
            self.texts = begin(model.text_encoder, self.texts)
            memory -= needed
        self.states: dict[int, Tensor] = {}
        features = []
        for indices in self.bar(list(chunks(self.share, batch_size)), "encoding pictures"):
            states = self.encode(indices)
            features.append(model.image_features(states).float())
            check_finite(features[-1], indices)
            size = states[0].numel() * states.element_size()
            kept = max(0, int(memory // size) - len(self.states))
            self.states |= zip(indices[:kept], states[:kept].cpu())
        parts = chunks(ids, max(1, self.pairs // 4))
        text_features = torch.cat([in_halves(model.text_features, part).float() for part in parts])
        width = text_features.shape[1]
        own = torch.cat(features) if features else text_features.new_zeros(0, width)
        self.similarity = all_rows(own @ text_features.t(), images)

    def encode(self, indices: list[int]) -> Tensor:
        return in_halves(lambda some: self.model.visual_encoder(some.to(self.device)), self.load(indices))

    def states_of(self, indices: list[int]) -> Tensor:
        """Picture states [B, N, D_v] on the device, from memory or from the pictures."""
        missing = [index for index in indices if index not in self.states]
        if not missing:
            return torch.stack([self.states[i] for i in indices]).to(self.device)
        fresh = dict(zip(missing, self.encode(missing)))
        return torch.stack([fresh.get(i, self.states.get(i)).to(self.device) for i in indices])

    def match(self, wanted: dict[int, list[int]]) -> dict[int, Tensor]:
        """ITM logits [K, 2] on the CPU of each of this rank's pictures against the texts wanted of it."""
        counts = [len(texts) for texts in wanted.values()]
        image = np.repeat(np.fromiter(wanted, np.int64, len(wanted)), counts)
        text = np.concatenate([np.asarray(texts, np.int64) for texts in (*wanted.values(), [])])
        ends = np.cumsum(counts)  # of each picture's pairs
        logits = torch.empty(
            len(text), 2, device=self.device
        )  # brought to the CPU at the end: passes do not wait
        bar = self.bar(None, "reranking", total=len(text))
        start, pairs = 0, self.pairs
        while start < len(text):
            last = min(np.searchsorted(ends, start, side="right") + self.batch_size, len(ends)) - 1
            end = min(start + pairs, int(ends[last]))
            here = slice(start, end)
            try:
                logits[here] = self.score(image[here], text[here])
            except ERRORS as error:
                if end - start == 1 or not is_out_of_memory(error):
                    raise
                pairs = max(1, (end - start) // 2)
                continue
            bar.update(end - start)
            start = end
        bar.close()
        return dict(zip(wanted, logits.cpu().split(counts), strict=True))

    def score(self, image: np.ndarray, text: np.ndarray) -> Tensor:
        """ITM logits [B, 2] of pairs of a picture and a text."""
        images, order = np.unique(image, return_inverse=True)
        states = self.model.image_states(self.states_of(images.tolist()))
        return self.model.match(states, self.texts.pick(text), order.tolist())

    def rerank(self, k: int, score: str = "itm+itc") -> Scores:
        """Scores on each picture's and text's `k` nearest (at most all): by "itm+itc" (official), "itm" or "itc".

        Raises ValueError for k below 1 and another score.
        """
        if k < 1 or score not in ("itm+itc", "itm", "itc"):
            raise ValueError(
                f'rerank: k must be 1 or more, score "itm+itc", "itm" or "itc"; got {k}, {score!r}.'
            )
        if score == "itc":
            return Scores(self.similarity, self.similarity, self.similarity.t())
        for_image, for_text = nearest(self.similarity, k), nearest(self.similarity.t(), k)
        wanted = {
            image: (for_image[image] | for_text[:, image]).nonzero().squeeze(1).tolist()
            for image in self.share
        }
        own = torch.full((len(self.share), self.similarity.shape[1]), UNSCORED)
        for row, (image, logits) in enumerate(self.match(wanted).items()):
            own[row, wanted[image]] = logits[:, 1]
        scores = all_rows(own.to(self.device), self.images)
        if score == "itm+itc":
            scores += self.similarity
        t2i = scores.t().masked_fill(~for_text, UNSCORED)
        return Scores(self.similarity, scores.masked_fill_(~for_image, UNSCORED), t2i)

    def itm_accuracy(self, img2txt: list[list[int]], temperature: float = 0.07, seed: int = 0) -> float:
        """ITM accuracy on pairs made as in training: each true pair, a hard text and a hard picture for it.

        Always answering "no match" gives 2 / 3. Raises ValueError for a picture without texts.
        """
        check_truths(img2txt)
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
