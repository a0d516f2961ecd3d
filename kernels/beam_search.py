"""One step of beam search: the best 2k continuations of an image's k beams, and all that follows from them.

    s_bv = score_b + x_bv - log sum_u exp x_bu        of all (b, v) the best 2k; then see ops/beam_search

Two launches. `_best` reads the logits: of each beam and chunk of the vocabulary the 2k largest, and what the sum takes.
`_step` has a program an image, which merges these, keeps the books of ended texts and lets the beams change places.
Shapes: logits x [n, live, V], live 1 (the first step) or k; the state as in `ops.beam_search.Beams`.
Bytes: the logits once; of the state a few hundred an image. Equal values go to the lower beam, then the lower token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import lookup
from .tiles import NEVER, cdiv, next_power_of_2

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _largest(x, free, place):
    """The largest of x [N] where it is free, and the first place where it stands; NOWHERE if none is free."""
    top = tl.max(tl.where(free, x, -float("inf")), 0)
    return top, tl.min(tl.where(free & (x == top), place, NOWHERE), 0)


# parts of a search begin anywhere, and its rules are any: neither is worth a kernel of its own
STATE = ["ids_ptr", "length_ptr", "score_ptr", "past_ptr", "done_ptr"]
STATE += ["ended_ids_ptr", "ended_length_ptr", "ended_score_ptr", "worth_ptr"]
RULES = ["eos", "min_length", "chunks", "L", "S"]


@triton.jit(do_not_specialize=RULES[:2], do_not_specialize_on_alignment=["x_ptr", "length_ptr"])
def _best(
    x_ptr, length_ptr, value_ptr, token_ptr, sum_ptr, V, eos, min_length,
    LIVE: tl.constexpr, BEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunk program_id(1) of beam program_id(0): its BEST largest logits, their tokens; maximum, and sum beside it."""
    beam, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    free = v < V
    x = tl.load(x_ptr + beam * V + v, mask=free, other=-float("inf")).to(tl.float32)
    top = tl.maximum(tl.max(x, 0), NEVER)
    here = beam * tl.num_programs(1) + chunk
    tl.store(sum_ptr + 2 * here, top)
    tl.store(sum_ptr + 2 * here + 1, tl.sum(tl.exp(x - top), 0))
    too_early = tl.load(length_ptr + beam // LIVE) < min_length
    x = tl.where((v == eos) & too_early, -float("inf"), x)
    for i in range(BEST):
        value, token = _largest(x, free, v)
        free = free & (v != token)
        tl.store(value_ptr + here * BEST + i, value)
        tl.store(token_ptr + here * BEST + i, tl.where(token < V, token, 0))


@triton.jit(do_not_specialize=RULES, do_not_specialize_on_alignment=STATE)
def _step(
    value_ptr, token_ptr, sum_ptr, worth_ptr, ids_ptr, length_ptr, score_ptr, past_ptr, done_ptr,
    ended_ids_ptr, ended_length_ptr, ended_score_ptr, chunks, eos, L, S,
    NORMALISE: tl.constexpr, RUNNING: tl.constexpr, LIVE: tl.constexpr, K: tl.constexpr,
    CANDIDATES: tl.constexpr, CHUNKS: tl.constexpr, RANKS: tl.constexpr, BEAMS: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Image program_id(0). CANDIDATES to BEAMS: powers of 2 that hold chunks * LIVE * 2K, chunks, 2K and K.

    TOKENS and SLOTS are moved at a time.
    """
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CANDIDATES)
    width = chunks * 2 * K
    beam = place // width
    free = place < LIVE * width
    value = tl.load(value_ptr + image * LIVE * width + place, mask=free, other=-float("inf"))
    token = tl.load(token_ptr + image * LIVE * width + place, mask=free, other=0)
    chunk = tl.arange(0, CHUNKS)
    for b in range(LIVE):
        if NORMALISE:
            at = sum_ptr + ((image * LIVE + b) * chunks + chunk) * 2
            tops = tl.load(at, mask=chunk < chunks, other=NEVER)
            top = tl.max(tops, 0)
            total = tl.load(at + 1, mask=chunk < chunks, other=0.0) * tl.exp(tops - top)
            value = tl.where(beam == b, value - (top + tl.log(tl.sum(total, 0))), value)
        if LIVE == K:
            value = tl.where(beam == b, value + tl.load(score_ptr + image * K + b), value)

    rank = tl.arange(0, RANKS)
    best = tl.full([RANKS], -float("inf"), tl.float32)
    beams = tl.zeros([RANKS], tl.int32)
    tokens = tl.zeros([RANKS], tl.int32)
    for i in range(2 * K):
        top, first = _largest(value, free, place)
        free = free & (place != first)
        best = tl.where(rank == i, top, best)
        beams = tl.where(rank == i, tl.sum(tl.where(place == first, beam, 0), 0), beams)
        tokens = tl.where(rank == i, tl.sum(tl.where(place == first, token, 0), 0), tokens)

    length, done = tl.load(length_ptr + image), tl.load(done_ptr + image)
    worth = tl.load(worth_ptr + length)
    ends = (tokens == eos) & (rank < 2 * K)
    new = tl.where(ends & (rank < K) & (done == 0), best / worth, -float("inf"))
    new_free = rank < K
    slot = tl.arange(0, BEAMS)
    old_free = slot < K
    old = tl.load(ended_score_ptr + image * K + slot, mask=old_free, other=-float("inf"))
    ended_score = old
    source = slot  # where a kept text was among the ended ones, or K + the beam that it ends
    for j in range(K):
        old_top, old_first = _largest(old, old_free, slot)
        new_top, new_first = _largest(new, new_free, rank)
        stays = old_top >= new_top
        old_free = old_free & (slot != tl.where(stays, old_first, NOWHERE))
        new_free = new_free & (rank != tl.where(stays, NOWHERE, new_first))
        ending = K + tl.sum(tl.where(rank == new_first, beams, 0), 0)
        ended_score = tl.where(slot == j, tl.where(stays, old_top, new_top), ended_score)
        source = tl.where(slot == j, tl.where(stays, old_first, ending), source)

    goes = (tokens != eos) & (rank < 2 * K)
    turn = tl.cumsum(goes.to(tl.int32), 0) - 1
    chosen = goes[None, :] & (turn[None, :] == slot[:, None])
    score = tl.sum(tl.where(chosen, best[None, :], 0.0), 1)
    parent = tl.sum(tl.where(chosen, beams[None, :], 0), 1)
    newest = tl.sum(tl.where(chosen, tokens[None, :], 0), 1)
    bound = tl.sum(tl.where(slot == 0, score, 0.0), 0) if RUNNING else tl.max(best, 0)
    worst = tl.min(tl.where(slot < K, ended_score, float("inf")), 0)
    done = tl.where((worst > -float("inf")) & (worst >= bound / worth), 1, done)

    # all beams' columns are read before any of them is overwritten
    kept, fresh = (source < K) & (slot < K), (source >= K) & (slot < K)
    ids = ids_ptr + image * K * L
    ended_ids = ended_ids_ptr + image * K * L
    for start in range(0, L, TOKENS):
        t = (start + tl.arange(0, TOKENS))[None, :]
        inside = (slot < K)[:, None] & (t < L)
        old_texts = tl.load(ended_ids + source[:, None] * L + t, mask=inside & kept[:, None], other=0)
        new_texts = tl.load(ids + (source - K)[:, None] * L + t, mask=inside & fresh[:, None], other=0)
        texts = tl.load(ids + parent[:, None] * L + t, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(
            ended_ids + slot[:, None] * L + t, tl.where(kept[:, None], old_texts, new_texts), mask=inside
        )
        texts = tl.where(t == length, newest[:, None].to(tl.int64), texts)
        tl.store(ids + slot[:, None] * L + t, texts, mask=inside)
    past = past_ptr + image * K * S
    for start in range(0, S, SLOTS):
        s = (start + tl.arange(0, SLOTS))[None, :]
        inside = (slot < K)[:, None] & (s < S)
        pasts = tl.load(past + parent[:, None] * S + s, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(past + slot[:, None] * S + s, pasts, mask=inside)
    lengths = tl.load(ended_length_ptr + image * K + source, mask=kept, other=0)
    tl.debug_barrier()
    tl.store(ended_length_ptr + image * K + slot, tl.where(kept, lengths, length), mask=slot < K)
    tl.store(ended_score_ptr + image * K + slot, ended_score, mask=slot < K)
    tl.store(score_ptr + image * K + slot, score, mask=slot < K)
    tl.store(length_ptr + image, length + 1)
    tl.store(done_ptr + image, done.to(tl.int8))


def step(
    x: Tensor,
    ids: Tensor,
    length: Tensor,
    score: Tensor,
    past: Tensor,
    done: Tensor,
    ended_ids: Tensor,
    ended_length: Tensor,
    ended_score: Tensor,
    worth: Tensor,
    eos: int,
    min_length: int,
    normalise: bool,
    running: bool,
    config: Mapping[str, Any],
) -> None:
    """All but x, worth and config are changed in place. config: BLOCK and num_warps of `_best`."""
    n, live, V = x.shape
    K, L, S = *ids.shape[1:], past.shape[-1]
    chunks = cdiv(V, config["BLOCK"])
    value = torch.empty(n, live, chunks, 2 * K, dtype=torch.float32, device=x.device)
    token = torch.empty(value.shape, dtype=torch.int32, device=x.device)
    sums = torch.empty(n, live, chunks, 2, dtype=torch.float32, device=x.device)
    _best[(n * live, chunks)](
        x, length, value, token, sums, V, eos, min_length,
        LIVE=live, BEST=2 * K, BLOCK=config["BLOCK"], num_warps=config["num_warps"],
    )  # fmt: skip
    sizes = _sizes(live, K, chunks, L, S)
    _step[(n,)](
        value, token, sums, worth, ids, length, score, past.view(torch.int8), done.view(torch.int8),
        ended_ids, ended_length, ended_score, chunks, eos, L, S,
        NORMALISE=normalise, RUNNING=running, **sizes, num_warps=_warps(sizes),
    )  # fmt: skip


def _sizes(live: int, K: int, chunks: int, L: int, S: int) -> dict[str, int]:
    counts = {"CANDIDATES": live * chunks * 2 * K, "CHUNKS": chunks, "RANKS": 2 * K}
    counts |= {"BEAMS": K, "TOKENS": min(L, 64), "SLOTS": min(S, 256)}
    return {"LIVE": live, "K": K} | {name: next_power_of_2(count) for name, count in counts.items()}


def _warps(sizes: dict[str, int]) -> int:
    """Of `_step`: one where it suffices, because its many small sums then need no shared memory."""
    texts, pasts = (sizes["BEAMS"] * sizes[name] for name in ("TOKENS", "SLOTS"))
    return min(8, max(1, max(sizes["CANDIDATES"], 4 * texts, pasts) // 512))


def aot_cases(arch: int) -> list[AotCase]:
    """3 beams and the most that are served."""
    config, found = lookup("beam_search", arch), []
    chunks = cdiv(30524, config["BLOCK"])
    for k, live, dtype in [(3, 3, "bf16"), (3, 1, "fp16"), (3, 3, "fp32"), (16, 16, "bf16")]:
        best = dict.fromkeys(("value_ptr", "sum_ptr"), "*fp32") | {"token_ptr": "*i32", "length_ptr": "*i64"}
        scalars = {"V": "i32", "eos": "i32", "min_length": "i32"}
        found.append(
            AotCase(
                f"best {dtype} {live} of {k} beams", _best, {"x_ptr": f"*{dtype}"} | best | scalars,
                {"LIVE": live, "BEST": 2 * k, "BLOCK": config["BLOCK"]}, config["num_warps"], 3,
            )
        )  # fmt: skip
    state = dict.fromkeys(("ids_ptr", "ended_ids_ptr", "ended_length_ptr", "length_ptr"), "*i64")
    state |= dict.fromkeys(("past_ptr", "done_ptr"), "*i8")
    state |= dict.fromkeys(("value_ptr", "sum_ptr", "worth_ptr", "score_ptr", "ended_score_ptr"), "*fp32")
    state |= {"token_ptr": "*i32"} | dict.fromkeys(("chunks", "eos", "L", "S"), "i32")
    for k, live, L in [(3, 3, 20), (3, 1, 20), (3, 3, 512), (10, 1, 40), (16, 16, 512), (16, 1, 512)]:
        sizes = _sizes(live, k, chunks, L, 4 + (L - 4) * k)
        found.append(
            AotCase(
                f"step {live} of {k} beams {L} tokens", _step, state, {"NORMALISE": True, "RUNNING": False} | sizes,
                _warps(sizes), 3,
            )
        )  # fmt: skip
    return found
