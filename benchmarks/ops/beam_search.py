"""A step of beam search over BERT's vocabulary: the kernels beside PyTorch's sorts and gathers, our other path."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, modes, ours, size
from blipfast.ops.beam_search import Beams, beam_step

OP = "beam_search"
V, L = 30524, 20
ON_GPU = [(32, 3, 0), (128, 3, 0), (32, 10, 1)]  # images, beams, rank


def cases(device: str) -> list[Case]:
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else ([(4, 3, 0)], torch.float32)
    found = []
    for n, k, rank in shapes:
        make = partial(_make, device, n, k, dtype)
        found += modes(OP, f"n{n} k{k} V{V}", dtype, make, forward=(0, n * k * V * size(dtype)), rank=rank)
    return found


def _make(device, n, k, dtype):
    score = torch.randn(n, k, device=device)
    state = Beams(
        ids=torch.zeros(n, k, L, dtype=torch.long, device=device),
        length=torch.full((n, 1), L // 2, device=device),
        score=score,
        past=torch.ones(n, k, 4 + (L - 4) * k, dtype=torch.bool, device=device),
        done=torch.zeros(n, dtype=torch.bool, device=device),
        ended_ids=torch.zeros(n, k, L, dtype=torch.long, device=device),
        ended_length=torch.full((n, k), 5, device=device),
        ended_score=torch.full_like(score, -torch.inf),
    )
    begin = [score.clone(), state.length.clone()]

    def step(logits, worth):
        """The same scores every time: they and the lengths are put back; the work depends on nothing else."""
        torch._foreach_copy_([state.score, state.length], begin)
        beam_step(logits, state, worth, eos=102)
        return state.score

    logits = torch.randn(n, k, V, device=device).to(dtype)
    return ours(OP, device, step), (logits, torch.ones(L + 1, device=device))
