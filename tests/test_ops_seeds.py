"""Seeds of dropout, drawn several at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blipfast.models.med import BertConfig, BertLMHeadModel
from blipfast.models.packed import image_states, language_loss, language_part, run
from blipfast.models.packing import Ragged
from blipfast.ops.seeds import TOGETHER, draw_seed, drawn_together


class Draws(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket.__name__ == "randint"
        return op(*args, **(kwargs or {}))


def test_seeds_differ_and_are_drawn_together_when_the_first_is_asked_for():
    like = torch.zeros(1)
    with Draws() as draws, drawn_together():
        assert not draws.count
        seeds = [draw_seed(like) for _ in range(TOGETHER + 1)]
        assert draws.count == 2
    assert len({int(seed[0]) for seed in seeds}) == TOGETHER + 1
    assert all(seed.dtype == torch.int64 and seed.data_ptr() % 16 == 0 for seed in seeds)
    with Draws() as draws:
        assert int(draw_seed(like)) != int(draw_seed(like)) and draws.count == 2


def test_the_same_state_of_the_generator_gives_the_same_seeds():
    def three():
        torch.manual_seed(3)
        with drawn_together():
            return [int(draw_seed(torch.zeros(1))[0]) for _ in range(3)]

    assert three() == three()


def test_each_device_has_its_own():
    with drawn_together():
        draw_seed(torch.zeros(1))
        assert draw_seed(torch.zeros(1, device="meta")).device.type == "meta"


@pytest.mark.parametrize("cross", [False, True])
def test_what_is_recomputed_in_backward_is_dropped_out_alike(cross, triton):
    config = BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        encoder_width=24, add_cross_attention=cross, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = BertLMHeadModel(config).train()
    text = Ragged.of([[5, 6, 7], [8, 9, 10, 11]], "cpu")
    embeds = torch.randn(2, 9, 24)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        config.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        part = language_part(decoder, text)
        images = image_states(decoder.bert.encoder, embeds) if cross else None
        loss = language_loss(decoder, part, run([part], images)[0])
        return [
            loss,
            *torch.autograd.grad(
                loss, [p for p in decoder.parameters() if p.requires_grad], allow_unused=True
            ),
        ]

    plain, again, other = gradients(False), gradients(True), gradients(False)
    for got, want, same in zip(again, plain, other, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert torch.equal(want, same)
