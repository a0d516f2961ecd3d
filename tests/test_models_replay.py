"""Decoding as a GPU does it: every step the same for all places, without the host, recorded as a CUDA graph."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blipfast import backends
from blipfast.models import recorded, token_search
from blipfast.models.blip import blip_decoder
from blipfast.models.generation import generate
from blipfast.models.replay import Replay
from blipfast.text import train_tokenizer

TOKENIZER = train_tokenizer(["a picture of a dog", "two red apples"], vocab_size=270)
EOS = TOKENIZER.sep_token_id
RULES = dict(eos_token_id=EOS, pad_token_id=TOKENIZER.pad_token_id, max_length=12, min_length=5)
WAYS = [
    {"num_beams": 3, "num_return": 2, "repetition_penalty": 1.3},
    {"num_beams": 3, "length_norm": "generated"},
    {"num_beams": 1},
    {"sample": True, "num_return": 2},
]


class Host(AssertionError):
    """A step asked the host for something, or told it something."""


class DeviceOnly(TorchDispatchMode):
    """What a CUDA graph cannot hold is an error: numbers read on the host or uploaded by it, shapes made of numbers."""

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        indices = [x for x in args[1] if x is not None] if name in ("index", "index_put_") else []
        if name in self.FORBIDDEN or any(x.dtype == torch.bool for x in indices):
            raise Host(str(op))
        return op(*args, **(kwargs or {}))


class Repeat:
    """Replay without a GPU: calls the function, and sees that it could be recorded."""

    calls = 0

    def __init__(self, function, device):
        self.function = function

    def __call__(self):
        Repeat.calls += 1
        with DeviceOnly():
            self.function()


def talkative(small):
    """What it says depends on the picture, and its texts end at different lengths."""
    torch.manual_seed(0)
    small["med_config"]["initializer_range"] = 0.3
    model = blip_decoder(tokenizer=TOKENIZER, **small).eval()
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[EOS] += 4.0
    return model


@pytest.fixture
def model(small):
    return talkative(small)


def texts(model, how, device="cpu", prompt=(20, 21), **more):
    generator = torch.Generator().manual_seed(3)
    prompt = torch.tensor([TOKENIZER.bos_token_id, *prompt], device=device)
    embeds = model.visual_encoder(torch.randn(11, 3, 32, 32, generator=generator).to(device))
    torch.manual_seed(5)
    return generate(model.text_decoder, prompt, embeds, **RULES, **how, **more)


@pytest.mark.parametrize("batch_size", [11, 4, 1])
@pytest.mark.parametrize("how", WAYS, ids=str)
@torch.no_grad()
def test_steps_of_all_places_without_the_host_give_the_same_texts(model, how, batch_size, monkeypatch):
    expected = texts(model, how)
    assert len(set((expected != RULES["pad_token_id"]).sum(1).tolist())) > 1, (
        "texts of different lengths needed"
    )
    monkeypatch.setattr(token_search, "replays", lambda device: True)
    monkeypatch.setattr(token_search, "Replay", Repeat)
    Repeat.calls = 0
    assert torch.equal(texts(model, how, batch_size=batch_size), expected)
    assert Repeat.calls


@pytest.mark.parametrize("batch_size", [11, 4])
@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_beams": 5}, {"sample": True, "num_return": 5}], ids=str
)
@torch.no_grad()
def test_places_left_empty_do_no_harm_with_more_texts_than_prompt_tokens(model, how, batch_size, monkeypatch):
    expected = texts(model, how, prompt=())
    monkeypatch.setattr(token_search, "replays", lambda device: True)
    monkeypatch.setattr(token_search, "Replay", Repeat)
    assert torch.equal(texts(model, how, prompt=(), batch_size=batch_size), expected)


@pytest.mark.parametrize("how", WAYS, ids=str)
@torch.no_grad()
def test_the_kernels_of_decoding_give_the_same_texts(small, how, triton, monkeypatch):
    small["med_config"] |= {"hidden_size": 64, "num_attention_heads": 2}  # of a size that they have
    model = talkative(small)
    with backends.use("torch"):
        expected = texts(model, how)
    monkeypatch.setattr(token_search, "replays", lambda device: True)
    monkeypatch.setattr(token_search, "Replay", Repeat)
    with backends.use("torch", cached_attention="triton", beam_search="triton"):
        assert torch.equal(texts(model, how, batch_size=4), expected)


@pytest.mark.parametrize("how", WAYS, ids=str)
@torch.no_grad()
def test_a_call_like_the_last_one_replays_its_record(model, how, monkeypatch):
    expected = texts(model, how)
    monkeypatch.setattr(token_search, "replays", lambda device: True)
    made = []
    monkeypatch.setattr(token_search, "Replay", lambda *args: made.append(1) or Repeat(*args))
    other = how | {"repetition_penalty": 1.1}
    for rules, records in ((how, 2), (how, 2), (other, 4), (how, 6)):
        got = texts(model, rules)
        assert len(made) == records
        if rules is how:
            assert torch.equal(got, expected)
    with backends.use("torch"):
        assert torch.equal(texts(model, how), expected) and len(made) == 8
    with torch.autocast("cpu", torch.bfloat16):
        texts(model, how)
    assert len(made) == 10
    model.text_decoder.train()  # dropout would be recorded
    texts(model, how)
    assert len(made) == 12
    model.eval()
    assert torch.equal(texts(model, how), expected) and len(made) == 14
    model.text_decoder.float().cls.predictions.bias = torch.nn.Parameter(torch.zeros(len(TOKENIZER)))
    texts(model, how)
    assert len(made) == 16, "recorded with other weights"
    kept = weakref.ref(recorded._idle[model.text_decoder][1])
    gc.disable()
    model.train()
    gone = kept() is None
    gc.enable()
    assert gone, "its memory is free at once"
    model.eval()
    texts(model, how)
    assert len(made) == 18


@torch.no_grad()
def test_a_record_does_not_keep_its_decoder_alive(model, monkeypatch):
    monkeypatch.setattr(token_search, "replays", lambda device: True)
    monkeypatch.setattr(token_search, "Replay", Repeat)
    alone = copy.deepcopy(model)
    texts(alone, {"num_beams": 3})
    assert alone.text_decoder in recorded._idle
    copy.deepcopy(alone)  # the record is no part of the model
    gone = weakref.ref(alone.text_decoder)
    del alone
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_waiting_images_come_in_when_half_of_the_places_are_free(model, monkeypatch):
    """Each admission costs a GPU a step that is not replayed, while an empty place costs it nothing."""
    admitted = []
    admit = token_search.Search.admit
    monkeypatch.setattr(
        token_search.Search,
        "admit",
        lambda self, numbers, *rest: (admitted.append(len(numbers)), admit(self, numbers, *rest)),
    )
    monkeypatch.setattr(token_search, "replays", lambda device: True)
    monkeypatch.setattr(token_search, "Replay", Repeat)
    texts(model, {"num_beams": 3}, batch_size=4)
    assert admitted[0] == 4 and sum(admitted) == 11
    assert min(admitted[1:-1]) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
@torch.no_grad()
def test_a_cuda_graph_gives_the_texts_of_steps_run_one_by_one(small, how, dtype, monkeypatch):
    small["med_config"] |= {"hidden_size": 64, "num_attention_heads": 2}  # of a size that the kernels have
    model = talkative(small).to("cuda", dtype)
    monkeypatch.setattr(
        model.visual_encoder, "forward", lambda x, f=model.visual_encoder.forward: f(x.to(dtype))
    )
    recorded = {batch_size: texts(model, how, "cuda", batch_size=batch_size) for batch_size in (11, 4)}
    monkeypatch.setattr(token_search, "Replay", lambda function, device: function)
    for batch_size, ours in recorded.items():
        assert torch.equal(ours, texts(model, how, "cuda", batch_size=batch_size))
    if dtype == torch.float32:
        with backends.use("torch"):
            assert torch.equal(recorded[11], texts(model, how, "cuda"))


@pytest.mark.gpu
def test_a_function_is_run_once_then_recorded_then_replayed():
    calls, x = [], torch.zeros(3, device="cuda")

    def function():
        calls.append(1)
        x.add_(1)

    replay = Replay(function, x.device)
    for _ in range(5):
        replay()
    assert len(calls) == 2 and x.tolist() == [5.0] * 3
