"""One direction of ITC against batch and queue, beside the whole similarity matrix."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from benchmarks.targets import Target
from blipfast import reference
from blipfast.ops.contrastive import contrastive_loss

ALPHA = 0.4
# batch, queue, rank: a GPU's share of BLIP's batch of 2880 on 32, and a large batch; whether pairs bear ids
ON_GPU = [(512, 57600, False, 0), (75, 57600, False, 1), (64, 57600, True, 1), (2048, 57600, False, 2)]
TARGETS = (
    Target("speed", 5.0, ("eager",)),
    Target("speed", 2.0, ("compiled",)),
    Target("memory", 0.05, ("eager",)),
)


def cases(device: str) -> list[Case]:
    """E = 256. Features in the dtype of a model under autocast, the queue in fp32."""
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else ([(16, 4096, False, 0)], torch.float32)
    found = []
    for B, Q, with_ids, rank in shapes:
        product, keys = 2 * B * (B + Q) * 256, (B + Q) * 256 * size(torch.float32)
        found += modes(
            "contrastive", f"B{B} Q{Q} E256{' ids' if with_ids else ''}", dtype,
            partial(_make, device, B, Q, with_ids, dtype),
            forward=(2 * product, keys), full=(3 * product, keys), rank=rank,
            targets=() if rank else TARGETS,
        )  # fmt: skip
    return found


def _make(device, B, Q, with_ids, dtype):
    def features(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, 256, device=device), dim=-1)

    query = features(B).to(dtype).requires_grad_()
    teacher, keys, queue = features(B), features(B), features(Q).t().contiguous()
    temp = torch.full((), 0.07, device=device, requires_grad=True)
    own = torch.arange(B, device=device)
    ids, queue_ids = (torch.randint(30_000, (n,), device=device) for n in (B, Q))
    form = dict(query_ids=ids, key_ids=ids, queue_ids=queue_ids) if with_ids else dict(own=own)

    def ours_with(query, temp):
        return contrastive_loss(query, teacher, keys, queue, temp, ALPHA, **form)[0]

    def whole_matrix(query, temp):
        if with_ids:
            positives = ids[:, None] == torch.cat([ids, queue_ids])
        else:
            positives = F.one_hot(own, B + Q)
        all_keys = torch.cat([keys.t(), queue], 1)
        targets = reference.itc_targets(teacher, all_keys, positives.float(), temp.detach(), ALPHA)
        return reference.itc_loss(query.float(), all_keys, targets, temp)

    contenders = ours("contrastive", device, ours_with) | {"eager": whole_matrix}
    return contenders | compiled(device, whole_matrix), (query, temp)
