"""The image encoder: sizes, position embeddings, Grad-CAM hooks, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from blipfast.models import vit
from blipfast.models.vit import create_vit, interpolate_pos_embed

SMALL = dict(width=32, depth=3, heads=4, patch_size=8)


def test_a_vit_of_ones_own_starts_with_places_that_can_be_told_apart():
    encoder, width = create_vit(SMALL, 32)
    places = encoder.pos_embed[0, 1:].detach()
    assert width == 32 and places.shape == (16, 32)
    distances = torch.cdist(places, places) + 9 * torch.eye(16)
    assert distances.min() > 0.3
    neighbours, corners = distances[0, 1], distances[0, 15]
    assert neighbours < corners


def test_official_sizes_and_their_quirk():
    with torch.device("meta"):
        base, large = create_vit("base", 224)[0], create_vit("large", 384)[0]
    assert (base.embed_dim, len(base.blocks), base.pos_embed.shape[1]) == (768, 12, 197)
    assert (large.embed_dim, len(large.blocks), large.pos_embed.shape[1]) == (1024, 24, 577)
    assert large.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)  # always, officially
    assert isinstance(base.blocks[-1].drop_path, torch.nn.Identity)


@pytest.mark.parametrize(
    "sizes, size, message",
    [
        ("huge", 224, '"base", "large"'),
        ({"widht": 3}, 32, "widht"),
        (SMALL, 33, "multiple of the patch size 8"),
    ],
)
def test_impossible_encoders_are_refused(sizes, size, message):
    with pytest.raises(ValueError, match=message):
        create_vit(sizes, size)


def test_pictures_of_another_size_are_refused():
    encoder, _ = create_vit(SMALL, 32)
    with pytest.raises(ValueError, match=r"takes \[B, 3, 32, 32\] pictures, got \[2, 3, 40, 40\]"):
        encoder(torch.zeros(2, 3, 40, 40))


def test_position_embeddings_of_another_width_or_grid_are_refused():
    encoder, _ = create_vit(SMALL, 32)
    with pytest.raises(ValueError, match="width 48"):
        interpolate_pos_embed(torch.zeros(1, 17, 48), encoder)
    with pytest.raises(ValueError, match="no square grid"):
        interpolate_pos_embed(torch.zeros(1, 13, 32), encoder)


def test_the_attention_map_and_its_gradient_are_kept_for_the_block_asked_for():
    encoder, _ = create_vit(SMALL, 32)
    encoder.eval()
    picture = torch.randn(2, 3, 32, 32)
    hooked = encoder(picture, register_blk=1)
    torch.testing.assert_close(hooked, encoder(picture))
    hooked[:, 0].sum().backward()
    kept = encoder.blocks[1].attn
    assert kept.get_attention_map().shape == kept.get_attn_gradients().shape == (2, 4, 17, 17)
    torch.testing.assert_close(kept.get_attention_map().sum(-1), torch.ones(2, 4, 17))
    assert encoder.blocks[0].attn.get_attention_map() is None


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain, _ = create_vit(SMALL, 32)
    checkpointed, _ = create_vit(SMALL, 32, use_grad_checkpointing=True, ckpt_layer=2)
    checkpointed.load_state_dict(plain.state_dict())
    assert [block.use_grad_checkpointing for block in checkpointed.blocks] == [False, True, True]
    picture = torch.randn(2, 3, 32, 32)
    for encoder in (plain, checkpointed):
        encoder.train()(picture).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bf16_attention_on_cpu_is_as_exact_as_plain_torch():
    from blipfast.ops.attention import attention

    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    half = [x.bfloat16() for x in (q, k, v)]
    plain = (torch.nn.functional.scaled_dot_product_attention(*half).float() - exact).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(*half)
    assert ours.dtype == torch.bfloat16 and (ours.float() - exact).abs().max() <= 2 * plain


@pytest.mark.parametrize("class_only", [False, True])
def test_many_pictures_are_encoded_in_parts_on_a_cpu(class_only, monkeypatch):
    encoder, _ = create_vit(SMALL, 32)
    images, encoded = torch.randn(7, 3, 32, 32), []
    expected = encoder(images, class_only=class_only)
    encode = encoder.encode
    monkeypatch.setattr(vit, "ROWS", 2 * encoder.pos_embed.shape[1])
    monkeypatch.setattr(
        encoder, "encode", lambda x, *args, **how: encoded.append(len(x)) or encode(x, *args, **how)
    )
    with torch.no_grad():
        assert_close(encoder(images, class_only=class_only), expected)
        assert encoded == [2, 2, 2, 1]
        encoder(images, register_blk=0)
        encoder(images[:2])
    encoder(images)
    assert encoded[4:] == [7, 2, 7], "whole for attention maps, if few, and with gradients"
