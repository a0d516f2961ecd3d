"""A step of beam search: against a plain loop over lists, by PyTorch and by the kernels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from blipfast import backends
from blipfast.ops.beam_search import Beams, beam_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS, PROMPT = 3, 2


def beams(n: int, k: int, L: int, S: int, length: int) -> Beams:
    """In the middle of a search: some texts have ended, and some images are done."""
    g = torch.Generator().manual_seed(n + k + L)
    ended = torch.randn(n, k, generator=g).sort(1, descending=True).values - 1
    state = Beams(
        ids=torch.randint(4, 9, (n, k, L), generator=g),
        length=torch.full((n, 1), length),
        score=torch.randn(n, k, generator=g).sort(1, descending=True).values - 3,
        past=torch.rand(n, k, S, generator=g) > 0.5,
        done=torch.arange(n) % 4 == 3,
        ended_ids=torch.randint(4, 9, (n, k, L), generator=g),
        ended_length=torch.randint(1, L, (n, k), generator=g),
        ended_score=ended.masked_fill(torch.arange(k) >= (torch.arange(n) % (k + 1))[:, None], -torch.inf),
    )
    return Beams(*(x.to(DEVICE) for x in state.tensors()))


def logits(n: int, live: int, V: int, dtype=torch.float32) -> Tensor:
    """Distinct in every dtype, so that there is one right order; of some beams the end is likely."""
    g = torch.Generator().manual_seed(V)
    x = torch.stack([torch.randperm(V, generator=g) for _ in range(n * live)]).view(n, live, V) / 64 - 2.0
    x[..., EOS] = torch.where(torch.rand(n, live, generator=g) > 0.4, x.amax(-1) + 0.25, x[..., EOS])
    return x.to(DEVICE, dtype)


def by_hand(
    x: Tensor, state: Beams, worth: list[float], min_length: int, log_probs: bool, running: bool
) -> list[dict]:
    """What the step should make of each image, with Python's lists and fp64."""
    found = []
    n, k, L = state.ids.shape
    x = x.cpu().double()
    for i in range(n):
        length, done = int(state.length[i]), bool(state.done[i])
        ids, past = state.ids[i].tolist(), state.past[i].tolist()
        candidates = []
        for b in range(x.shape[1]):
            norm = 0.0 if log_probs else float(x[i, b].logsumexp(0))
            start = float(state.score[i, b]) if x.shape[1] == k else 0.0
            for v, logit in enumerate(x[i, b].tolist()):
                if v != EOS or length >= min_length:
                    candidates.append((start + logit - norm, b, v))
        candidates.sort(key=lambda c: -c[0])
        best = candidates[: 2 * k]
        ended = [
            (float(s), t[: int(z)])
            for s, t, z in zip(state.ended_score[i], state.ended_ids[i].tolist(), state.ended_length[i])
            if s > -math.inf
        ]
        if not done:
            ended += [(s / worth[length], ids[b][:length]) for s, b, v in best[:k] if v == EOS]
        ended = sorted(ended, key=lambda e: -e[0])[:k]
        onward = [c for c in best if c[2] != EOS][:k]
        bound = (onward if running else best)[0][0] / worth[length]
        found.append(
            {
                "ended": ended,
                "score": [s for s, _, _ in onward],
                "ids": [ids[b][:length] + [v] for _, b, v in onward],
                "past": [past[b] for _, b, _ in onward],
                "done": done or (len(ended) == k and ended[-1][0] >= bound),
            }
        )
    return found


def check_same(state: Beams, want: list[dict], length: int) -> None:
    for i, image in enumerate(want):
        ended = [
            (float(s), t[: int(z)])
            for s, t, z in zip(state.ended_score[i], state.ended_ids[i].tolist(), state.ended_length[i])
            if s > -math.inf
        ]
        assert [text for _, text in ended] == [text for _, text in image["ended"]]
        assert [s for s, _ in ended] == pytest.approx([s for s, _ in image["ended"]], abs=1e-5)
        assert state.score[i].tolist() == pytest.approx(image["score"], abs=1e-5)
        assert state.ids[i, :, : length + 1].tolist() == image["ids"]
        assert state.past[i].tolist() == image["past"]
        assert bool(state.done[i]) == image["done"]
        assert int(state.length[i]) == length + 1


@pytest.mark.parametrize("log_probs, running", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# images, beams, live ones, tokens, slots, vocabulary; a vocabulary of several chunks, of which the last is nearly empty
@pytest.mark.parametrize(
    "n, k, live, L, S, V",
    [
        (9, 3, 3, 8, 14, 130),
        (5, 3, 1, 8, 14, 65),
        (6, 2, 2, 5, 3, 11),
        (2, 5, 5, 9, 33, 200),
        (2, 3, 3, 70, 300, 40),
    ],
)
def test_a_step_is_that_of_a_plain_loop(n, k, live, L, S, V, dtype, log_probs, running, backend):
    length, state, x = 4, beams(n, k, L, S, 4), logits(n, live, V, dtype)
    if log_probs:
        x = x - 3
    worth = [0.7 + 0.3 * i for i in range(L + 1)]
    want = by_hand(x, state, worth, 0, log_probs, running)
    before = x.clone()
    beam_step(x, state, torch.tensor(worth, device=DEVICE), eos=EOS, log_probs=log_probs, running=running)
    check_same(state, want, length)
    assert torch.equal(x, before), "the caller's"
    assert {image["done"] for image in want} == {True, False} or n < 5


def test_strided_worths_are_read_right(backend):
    worth = torch.linspace(1, 3, 9, device=DEVICE)
    apart = torch.stack([worth, worth * 99], 1)[:, 0]
    found = [beams(3, 3, 8, 5, 4) for _ in range(2)]
    for state, one in zip(found, (worth, apart)):
        beam_step(logits(3, 3, 70), state, one, eos=EOS)
    assert all(torch.equal(a, b) for a, b in zip(*(state.tensors() for state in found)))


def test_no_text_ends_before_its_length(backend):
    state, x, worth = beams(4, 3, 8, 5, 4), logits(4, 3, 100), [1.0] * 9
    for min_length in (4, 5):
        ours = copy.deepcopy(state)
        beam_step(x, ours, torch.tensor(worth, device=DEVICE), eos=EOS, min_length=min_length)
        check_same(ours, by_hand(x, state, worth, min_length, False, False), 4)


def test_more_beams_than_the_kernel_takes_are_served_by_pytorch(backend):
    state, x, worth = beams(2, 17, 6, 5, 4), logits(2, 17, 300), [1.0] * 7
    want = by_hand(x, state, worth, 0, False, False)
    beam_step(x, state, torch.tensor(worth, device=DEVICE), eos=EOS)
    check_same(state, want, 4)


def test_changing_some_of_the_images_leaves_the_others(backend):
    state, x, worth = beams(5, 3, 8, 5, 4), logits(5, 3, 100), [1.0] * 9
    before, some = copy.deepcopy(state), slice(1, 4)
    want = by_hand(x[some], state.at(some), worth, 0, False, False)
    beam_step(x[some], state.at(some), torch.tensor(worth, device=DEVICE), eos=EOS)
    check_same(state.at(some), want, 4)
    for ours, theirs in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[4], theirs[4])


def test_logits_that_are_no_numbers_touch_nothing_else(backend):
    state = beams(3, 3, 8, 5, 4)
    x = logits(3, 3, 100)
    want = by_hand(x, state, [1.0] * 9, 0, False, False)
    x[1] = torch.nan
    beam_step(x, state, torch.ones(9, device=DEVICE), eos=EOS)
    for i in (0, 2):
        check_same(state.at(slice(i, i + 1)), want[i : i + 1], 4)
    assert (state.ids[1] < 100).all() and (state.ids[1] >= 0).all()


def test_no_images_are_no_work(backend):
    state = beams(1, 3, 8, 5, 4)
    before = copy.deepcopy(state)
    beam_step(logits(1, 3, 50)[:0], state.at(slice(0, 0)), torch.ones(9, device=DEVICE), eos=EOS)
    assert all(map(torch.equal, state.tensors(), before.tensors()))


def test_the_operator_passes_pytorchs_own_check(triton):
    arguments = (
        logits(2, 3, 70),
        *beams(2, 3, 8, 5, 4).tensors(),
        torch.ones(9, device=DEVICE),
        EOS,
        0,
        True,
        False,
    )
    torch.library.opcheck(torch.ops.blipfast.beam_step.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(score=torch.zeros(2, 4)), "score must have shape"),
        (dict(past=torch.zeros(2, 3, 5)), "past must be one of"),
        (
            dict(ended_ids=torch.zeros(3, 8, 2, dtype=torch.long).permute(2, 0, 1)),
            "ended_ids must be contiguous",
        ),
        (dict(logits=torch.zeros(2, 2, 70)), "logits must have shape"),
        (dict(logits=torch.zeros(2, 3, 6)), "more than 6 tokens"),
        (dict(worth=torch.zeros(8)), "a number for each length"),
        (dict(eos=70), "eos must be one of 70 tokens, got 70"),
        (dict(done=torch.zeros(2, dtype=torch.bool, device="meta")), "done is on meta"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, message):
    state = beams(2, 3, 8, 5, 4)
    given = {"logits": torch.zeros(2, 3, 70), "worth": torch.ones(9), "eos": EOS}
    for name, value in change.items():
        if name in given:
            given[name] = value
        else:
            setattr(state, name, value)
    with pytest.raises(ValueError, match=f"beam_search: .*{message}"):
        beam_step(given["logits"], state, given["worth"], eos=given["eos"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [2, 3, 10, 16])
def test_on_a_gpu_the_kernels_do_what_pytorch_does_every_time(k, dtype):
    """At BLIP's sizes. Logits that differ enough in bf16 for one right order of those that count."""
    n, L, V = 33, 24, 30524
    state, g = beams(n, k, L, 4 + 20 * k, 7), torch.Generator().manual_seed(k)
    x = torch.randn(n, k, V, generator=g).to(DEVICE)
    places = torch.stack([torch.randperm(V, generator=g)[: 4 * k] for _ in range(n * k)]).view(n, k, -1)
    x.scatter_(2, places.to(DEVICE), torch.linspace(5, 9, 4 * k).expand(n, k, -1).to(DEVICE))
    x[::2, 0, EOS] = 9.5
    x, worth = x.to(dtype), torch.linspace(1, 2, L + 1, device=DEVICE)
    found = []
    for backend in ("torch", *["triton"] * 50):
        ours = copy.deepcopy(state)
        with backends.use(backend):
            beam_step(x, ours, worth, eos=EOS)
        found.append(ours.tensors())
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for again in found[2:]:
        assert all(map(torch.equal, again, found[1]))
