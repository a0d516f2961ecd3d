"""Two-stage retrieval over a test collection: ITC for all pairs, ITM for the candidates it finds.

Source: official `train_retrieval.py`. Score of a candidate = ITM logit of class 1 + ITC cosine; other pairs: -100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.momentum import hard_negatives

UNSCORED = -100.0


@dataclass
class Scores:
    """similarity [I, T]: ITC cosines. i2t [I, T] and t2i [T, I]: scores after reranking."""

    similarity: Tensor
    i2t: Tensor
    t2i: Tensor


class Collection:
    """Encoded pictures and texts of a test set: image states kept on the CPU, texts as token ids."""

    def __init__(
        self, model: BLIP_ITM, batches, texts: list[str], device, batch_size: int, progress: bool = False
    ):
        """`batches` yields pictures [B, 3, S, S] in order."""
        self.model, self.device = model, device
        embeds, features = [], []
        for batch in tqdm(batches, desc="encoding pictures", disable=not progress, leave=False):
            states = model.visual_encoder(batch.to(device))
            features.append(model.image_features(states).float())
            embeds.append(states.cpu())
        self.image_embeds, image_features = torch.cat(embeds), torch.cat(features)
        self.text = model.encode_text(texts, device)
        ids, mask = self.text.input_ids, self.text.attention_mask
        chunks = [
            Texts(ids[i : i + batch_size], mask[i : i + batch_size]) for i in range(0, len(ids), batch_size)
        ]
        text_features = torch.cat([model.text_features(chunk).float() for chunk in chunks])
        self.similarity = (image_features @ text_features.t()).cpu()

    def match(self, image: int, texts: Tensor, batch_size: int = 256) -> Tensor:
        """ITM logits [K, 2] of one picture against the texts [K] (indices)."""
        states = self.image_embeds[image : image + 1].to(self.device)
        logits = []
        for chosen in texts.split(batch_size):
            mask = self.text.attention_mask[chosen]
            longest = int(mask.sum(1).max())
            text = Texts(self.text.input_ids[chosen, :longest], mask[:, :longest])
            logits.append(self.model.match(states, text).float().cpu())
        return torch.cat(logits)

    def rerank(self, k: int, progress: bool = False) -> Scores:
        """Scores after ITM on each picture's and each text's `k` nearest (at most all)."""
        images, texts = self.similarity.shape
        for_image, for_text = (
            torch.zeros(images, texts, dtype=torch.bool),
            torch.zeros(texts, images, dtype=torch.bool),
        )
        for_image.scatter_(1, self.similarity.topk(min(k, texts), 1).indices, True)
        for_text.scatter_(1, self.similarity.t().topk(min(k, images), 1).indices, True)
        score = torch.full_like(self.similarity, UNSCORED)
        for image in tqdm(range(images), desc="reranking", disable=not progress, leave=False):
            chosen = (for_image[image] | for_text[:, image]).nonzero().squeeze(1)
            score[image, chosen] = self.match(image, chosen)[:, 1] + self.similarity[image, chosen]
        return Scores(
            self.similarity,
            score.masked_fill(~for_image, UNSCORED),
            score.t().masked_fill(~for_text, UNSCORED),
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
        right = 0
        by_image: list[list[tuple[int, int]]] = [[] for _ in img2txt]
        for image in range(len(img2txt)):
            by_image[image].append((int(own[image]), 1))
            if has_text[image]:
                by_image[image].append((int(hard_text[image]), 0))
            if has_image[image]:
                by_image[int(hard_image[image])].append((int(own[image]), 0))
        for image, pairs in enumerate(by_image):
            texts, labels = map(torch.tensor, zip(*pairs))
            right += int((self.match(image, texts).argmax(1) == labels).sum())
        return right / sum(map(len, by_image))


@dataclass
class Texts:
    """A slice of a tokenised batch."""

    input_ids: Tensor
    attention_mask: Tensor
