"""One step of beam search for many images at once, on the device.

The rules are those of transformers 4.15, on which official BLIP ran: of all continuations of an image's k beams the
best 2k by the sum of log-probabilities; one that ends, and is among the best k, is a finished text, of which the best k
are kept by score / worth(length); the best k that do not end go on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import backends
from .checks import check_dtype, check_same_device, check_shape
from .launch import tuned
from .library import register

OP = "beam_search"
MOST = 16  # beams that the kernel takes

_INTERPRETED = {"BLOCK": 64, "num_warps": 4}
_table_says = backends.triton_serves(OP)
backends.register(OP, triton=_table_says, torch=backends.always)


@dataclass
class Beams:
    """n images with k beams each, of texts of up to L tokens; each beam sees some of S slots of a cache.

    ids [n, k, L] and length [n, 1] int64: the tokens, and how many they are; score [n, k] fp32: sum of their
    log-probabilities; past [n, k, S] bool: the slots of a beam's tokens; done [n] bool: no text can become better.
    ended_ids [n, k, L], ended_length [n, k] (without the end token), ended_score [n, k] fp32, best first: the ended
    texts; -inf where there are fewer.
    """

    ids: Tensor
    length: Tensor
    score: Tensor
    past: Tensor
    done: Tensor
    ended_ids: Tensor
    ended_length: Tensor
    ended_score: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def at(self, here: slice | Tensor) -> Beams:
        """Some of the images: of a slice, changing them changes these; of numbers [m], copies."""
        return Beams(*(tensor[here] for tensor in self.tensors()))


def beam_step(
    logits: Tensor,
    beams: Beams,
    worth: Tensor,
    *,
    eos: int,
    min_length: int = 0,
    log_probs: bool = False,
    running: bool = False,
) -> None:
    """Add a token to the beams, in place.

    logits [n, k, V], or at the first step, when an image's beams are still one, [n, 1, V]; fp32, fp16 or bf16. With
    `log_probs` they are log-probabilities, and count as they are. worth [L + 1 or more] fp32: by what the score of a
    text of some length (without the end token) is divided. No text ends before it has `min_length` tokens. An image is
    done when its k-th best ended text is as good as the best candidate would be if it ended now, or with `running`, as
    the best of those that go on. k >= 2, V > 2k. Raises ValueError for wrong shapes, dtypes, devices and eos.
    Served by: triton (CUDA, k <= 16), torch.
    """
    _check(logits, beams, worth, eos)
    if len(logits) and beams.ids.shape[1] <= MOST and backends.choose(OP, logits) == "triton":
        _op(
            logits.contiguous(), *beams.tensors(), worth.contiguous(), eos, min_length, not log_probs, running
        )
        return
    scores = logits.to(torch.float32, copy=True) if log_probs else logits.float().log_softmax(-1)
    _torch(scores, beams, worth, eos, min_length, running)


def keep_best(beams: Beams, score: Tensor, of: Tensor, length: Tensor) -> None:
    """Keep the best k of the ended texts and c new ones: the texts of the beams `of` [n, c], length [n, 1].

    score [n, c]: divided already; -inf is none.
    """
    k, L = beams.ids.shape[1:]
    every = torch.cat([beams.ended_score, score], 1).sort(dim=1, descending=True, stable=True)
    beams.ended_score.copy_(every.values[:, :k])
    order = every.indices[:, :k]
    ids = torch.cat([beams.ended_ids, beams.ids.gather(1, of[..., None].expand(-1, -1, L))], 1)
    beams.ended_ids.copy_(ids.gather(1, order[..., None].expand(-1, -1, L)))
    lengths = torch.cat([beams.ended_length, length.expand_as(score)], 1)
    beams.ended_length.copy_(lengths.gather(1, order))


def _torch(scores: Tensor, beams: Beams, worth: Tensor, eos: int, min_length: int, running: bool) -> None:
    k, length = beams.ids.shape[1], beams.length.clone()
    scores[..., eos] = scores[..., eos].masked_fill(length < min_length, -torch.inf)
    if scores.shape[1] == k:
        scores = scores + beams.score[:, :, None]
    best, index = scores.flatten(1).topk(2 * k)
    of, tokens = index // scores.shape[-1], index % scores.shape[-1]
    worth = worth[length]

    ends = tokens == eos
    among_best = torch.arange(2 * k, device=scores.device) < k
    ended = (best / worth).masked_fill(~(ends & among_best) | beams.done[:, None], -torch.inf)
    keep_best(beams, ended[:, :k], of[:, :k], length)

    onward = ends.to(torch.int8).sort(dim=1, stable=True).indices[:, :k]  # those that do not end, best first
    score = best.gather(1, onward)
    bound = (score if running else best)[:, :1] / worth
    worst = beams.ended_score.amin(1)
    beams.done |= (worst > -torch.inf) & (worst >= bound.squeeze(1))
    parents = of.gather(1, onward)[..., None]
    beams.score.copy_(score)
    for state in (beams.ids, beams.past):
        state.copy_(state.gather(1, parents.expand_as(state)))
    beams.ids.scatter_(2, length[..., None].expand(-1, k, 1), tokens.gather(1, onward)[..., None])
    beams.length += 1


def _check(logits: Tensor, beams: Beams, worth: Tensor, eos: int) -> None:
    check_shape(OP, "ids", beams.ids, (None, None, None))
    n, k, L = beams.ids.shape
    shapes = {"length": (n, 1), "score": (n, k), "past": (n, k, None), "done": (n,)}
    shapes |= {"ended_ids": (n, k, L), "ended_length": (n, k), "ended_score": (n, k)}
    dtypes = {"score": torch.float32, "past": torch.bool, "done": torch.bool, "ended_score": torch.float32}
    for name, shape in shapes.items():
        check_shape(OP, name, getattr(beams, name), shape)
    for field in fields(beams):
        state = {field.name: getattr(beams, field.name)}
        check_dtype(OP, (dtypes.get(field.name, torch.int64),), **state)
        check_same_device(OP, logits=logits, **state)
        if not state[field.name].is_contiguous():
            raise ValueError(f"{OP}: {field.name} must be contiguous; it is updated in place")
    live = logits.shape[1] if logits.ndim == 3 else None
    check_shape(OP, "logits", logits, (n, 1 if live == 1 else k, None))
    check_dtype(OP, backends.FLOATS, logits=logits)
    check_dtype(OP, (torch.float32,), worth=worth)
    check_same_device(OP, logits=logits, worth=worth)
    if k < 2 or logits.shape[-1] <= 2 * k:
        raise ValueError(
            f"{OP}: needs at least 2 beams and more than {2 * k} tokens, got {k} and {logits.shape[-1]}"
        )
    if not 0 <= eos < logits.shape[-1]:
        raise ValueError(f"{OP}: eos must be one of {logits.shape[-1]} tokens, got {eos}")
    if worth.ndim != 1 or len(worth) <= L:
        raise ValueError(f"{OP}: worth needs a number for each length up to {L}, got {list(worth.shape)}")


def _kernel(logits, ids, length, score, past, done, ended_ids, ended_length, ended_score, worth, *rules):
    from ..kernels.beam_search import step

    state = (ids, length, score, past, done, ended_ids, ended_length, ended_score)
    step(logits, *state, worth, *rules, tuned(OP, "default", logits, _INTERPRETED))


def _fake(logits, *state_and_rules):
    return None


_state = ", ".join(f"Tensor({letter}!) {field.name}" for letter, field in zip("abcdefgh", fields(Beams)))
_op = register(
    f"beam_step(Tensor logits, {_state}, Tensor worth, int eos, int min_length, bool normalise, bool running) -> ()",
    _kernel,
    _fake,
)
