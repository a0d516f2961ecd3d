"""What contrastive pre-training keeps beside the weights: momentum encoders, feature queues, hard negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.transfer import ToHost

from . import gather
from .packed import first_states
from .packing import Ragged


@dataclass
class MatchingPairs:
    """ITM's pairs, lists of R: which text reads which image of this rank, 1 if they belong together, does it count."""

    texts: list[int]
    images: list[int]
    labels: list[int]
    counts: list[bool]


class MomentumModel(nn.Module):
    """Base of BLIP_Retrieval and BLIP_Pretrain.

    As in official BLIP, `forward` clamps the temperature, moves the momentum encoders and writes the queues itself.
    A trainer that accumulates gradients or shards weights sets `self_updating = False`, and after every optimizer
    step clamps (`clamped`), averages (`momentum_pairs`) and calls `end_step`, so that all three follow optimizer
    steps and not micro-batches.
    """

    momentum: float
    momentum_dropout = True  # official quirk: dropout and drop-path stay active in the momentum encoders
    self_updating = True
    negative_all_rank = False
    temperature_limits = (0.001, 0.5)
    # the first parameters of the encoders when `momentum_pairs` was asked last, and what it said
    _averaged: tuple[list[nn.Parameter], ...] = ([], [], [])

    def add_queues(self, embed_dim: int, queue_size: int, pointer: str) -> None:
        """Queues of normalised features [embed_dim, Q], random at first, and the buffer `pointer` where to write."""
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {queue_size}.")
        self.queue_size, self.pointer = queue_size, pointer
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        # Which caption or image each entry belongs to; -100: none, the random ones of the start.
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100), persistent=self.saves_ids)
        self.register_buffer(pointer, torch.zeros(1, dtype=torch.long))
        # how many samples were written so far
        self.register_buffer("queued", torch.zeros(1, dtype=torch.long), persistent=False)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    saves_ids = True

    @property
    def model_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (self.visual_encoder, self.visual_encoder_m),
            (self.vision_proj, self.vision_proj_m),
            (self.text_encoder, self.text_encoder_m),
            (self.text_proj, self.text_proj_m),
        ]

    def momentum_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(online, momentum) parameters that are averaged: all but cross-attention, which momentum texts never use."""
        return [
            (online, momentum)
            for online_model, momentum_model in self.model_pairs
            for (name, online), momentum in zip(online_model.named_parameters(), momentum_model.parameters())
            if ".crossattention." not in name
        ]

    def clamped(self) -> list[tuple[nn.Parameter, float, float]]:
        return [(self.temp, *self.temperature_limits)]

    @torch.no_grad()
    def copy_params(self) -> None:
        """Start the momentum encoders as copies that get no gradient."""
        for online_model, momentum_model in self.model_pairs:
            for online, momentum in zip(online_model.parameters(), momentum_model.parameters()):
                momentum.copy_(online)
                momentum.requires_grad_(False)

    @torch.no_grad()
    def _momentum_update(self) -> None:
        # finding all pairs takes longer than averaging them
        firsts = [next(module.parameters()) for pair in self.model_pairs for module in pair]
        if list(map(id, firsts)) != list(map(id, self._averaged[0])):
            self._averaged = firsts, *map(list, zip(*self.momentum_pairs()))
        _, online, momentum = self._averaged
        torch._foreach_lerp_(momentum, online, 1.0 - self.momentum)

    def train(self, mode: bool = True) -> MomentumModel:
        super().train(mode)
        if not self.momentum_dropout:
            for _, momentum in self.model_pairs:
                momentum.eval()
        return self

    @staticmethod
    def text_features(encoder: nn.Module, projection: nn.Module, text: Ragged) -> Tensor:
        """Projected, normalised features [B, E] of packed texts."""
        return F.normalize(projection(first_states(encoder, text)), dim=-1)

    def candidates(self, texts: list[list[int]], longest: int, device) -> Callable[[], list[list[int]]]:
        """A function that returns the texts that negatives are drawn from, the batch's or those of all ranks."""
        if self.negative_all_rank and gather.world_size() > 1:
            return gather.gather_texts(texts, longest, device)
        return lambda: texts

    def send_negatives(
        self, text_negative: tuple[Tensor, Tensor], image_negative: tuple[Tensor, Tensor]
    ) -> ToHost:
        """Send the host a hard text for every image and a hard image for every text, as `hard_negatives` gives them.

        They are among this rank's B samples or among those of all ranks; then it gets the images of all ranks' texts.
        """
        text, image = torch.stack(text_negative, 1), torch.stack(image_negative, 1)
        return ToHost(torch.cat([text, gather.concat_all_gather(image) if self.negative_all_rank else image]))

    def matching_pairs(self, negatives: ToHost) -> MatchingPairs:
        """ITM's pairs: the batch's own, and the negatives that were sent.

        The one time in a step that the host waits for the device, because packed texts need their lengths there: call
        it late. A text whose hard image lies on another rank is scored there, so that no image travels.
        """
        drawn = negatives.read()
        B = len(drawn) // (1 + (gather.world_size() if self.negative_all_rank else 1))
        offset = gather.rank() * B if self.negative_all_rank else 0
        (text, has_text), (image, has_image) = drawn[:B].t().tolist(), drawn[B:].t().tolist()
        here = [i for i, chosen in enumerate(image) if offset <= chosen < offset + B]
        own = list(range(offset, offset + B))
        return MatchingPairs(
            texts=own + text + here,
            images=[*range(B), *range(B), *(image[i] - offset for i in here)],
            labels=[1] * B + [0] * (B + len(here)),
            counts=[*[True] * B, *map(bool, has_text), *(bool(has_image[i]) for i in here)],
        )

    def matching_loss(self, states: Tensor, pairs: MatchingPairs) -> tuple[Tensor, Tensor]:
        """ITM loss and accuracy from the [ENC] states of the pairs [R, D]: means over the pairs that count.

        With negatives of all ranks, a rank holds more or fewer of them; its loss is such that the mean over ranks is
        the mean over all pairs.
        """
        logits = self.itm_head(states).float()
        labels = torch.tensor(pairs.labels).to(logits.device, non_blocking=True)
        counts = torch.tensor(pairs.counts, dtype=torch.float32).to(logits.device, non_blocking=True)
        total = counts.sum()
        if self.negative_all_rank:
            total = gather.concat_all_gather(total[None]).mean()
        total = total.clamp_min(1)
        loss = (F.cross_entropy(logits, labels, reduction="none") * counts).sum() / total
        accuracy = ((logits.argmax(1) == labels).float() * counts).sum() / total
        return loss, accuracy.detach()

    @torch.no_grad()
    def begin_forward(self) -> None:
        if self.self_updating:
            for parameter, low, high in self.clamped():
                parameter.clamp_(low, high)
            self._momentum_update()

    @torch.no_grad()
    def end_forward(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> None:
        self.waiting.append((image_feat.float(), text_feat.float(), idx))
        if self.self_updating:
            self.end_step()

    @torch.no_grad()
    def end_step(self) -> None:
        """Write the features of the step into the queues, in the order of the global micro-batches."""
        for image_feat, text_feat, idx in self.waiting:
            self._dequeue_and_enqueue(image_feat, text_feat, idx)
        self.waiting.clear()

    @torch.no_grad()
    def _dequeue_and_enqueue(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> None:
        """Write [B, embed_dim] features of all ranks over the oldest entries, wrapping at the end.

        Any batch size fits: of a batch larger than the queue the last entries stay.
        """
        image_feat, text_feat, idx = (
            gather.concat_all_gather(x) for x in (image_feat, text_feat, idx.view(-1))
        )
        pointer = getattr(self, self.pointer)
        kept = min(len(idx), self.queue_size)
        skipped = len(idx) - kept
        columns = (pointer + skipped + torch.arange(kept, device=pointer.device)) % self.queue_size
        self.image_queue[:, columns] = image_feat[skipped:].t().to(self.image_queue.dtype)
        self.text_queue[:, columns] = text_feat[skipped:].t().to(self.text_queue.dtype)
        self.idx_queue[0, columns] = idx[skipped:]
        pointer.copy_((pointer + len(idx)) % self.queue_size)
        self.queued += len(idx)


def sample_negatives(weights: Tensor) -> Tensor:
    """One column a row of `weights` [B, K] >= 0, drawn in proportion, in one call on the device: [B] int64."""
    # what torch.multinomial does for one draw, without its twenty launches that check the weights
    return (weights / torch.empty_like(weights).exponential_()).argmax(1)


def hard_negatives(weights: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hard negatives that never fail: column indices [B], and whether each row has one [B].

    weights [B, K] are the softmaxed similarities, forbidden [B, K] marks a row's own positives. A row whose
    candidates all underflowed to zero draws among them evenly; a row without candidates (a batch of one, or all
    duplicates) gets an arbitrary column and False.
    """
    candidates = ~forbidden
    weights = weights.detach().float() * candidates
    usable = weights.sum(1, keepdim=True) > 0
    weights = torch.where(usable, weights, candidates.float())
    exists = candidates.any(1)
    return sample_negatives(torch.where(exists[:, None], weights, torch.ones_like(weights))), exists
