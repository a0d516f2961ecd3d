"""What backward keeps: counted, no clock and no allocator involved, so the same on every machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from blipfast import reference
from blipfast.models import packed
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.packed import image_states
from blipfast.ops.attention_torch import Dropped, plain, usual
from blipfast.ops.linear_cross_entropy import linear_cross_entropy
from blipfast.ops.mlp import mlp
from blipfast.reference import Text

# base's proportions, 197 image tokens, an eighth of its width and a sixth of its depth
VIT = {"width": 96, "depth": 2, "heads": 2, "patch_size": 16}
BERT = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 384}
SIZE = {"vit": VIT, "image_size": 224, "queue_size": 64}


def kept(run, known=()) -> list[Tensor]:
    """One tensor of every storage that `run` leaves to backward, those of `known` tensors left out."""
    storages = {x.untyped_storage().data_ptr() for x in known}
    found = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in storages:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()  # alive until the count is done, so that no storage is used twice
    found = list(found.values())
    del out
    return found


def size(tensors: list[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


def test_a_pretraining_step_keeps_less_than_half_of_what_the_reference_keeps():
    """14 tokens a caption, which the reference pads to 30 as official BLIP does; dropout acts in both."""
    torch.manual_seed(0)
    image, caption = torch.randn(4, 3, 224, 224), " ".join(["dog"] * 12)
    ours = blip_pretrain(med_config=BERT, **SIZE)
    slow = reference.BLIP_Pretrain(bert=BERT | {"vocab_size": len(ours.tokenizer)}, **SIZE)
    encoded = ours.tokenizer([caption] * 4, padding="max_length", max_length=30, return_tensors="pt")
    text = Text(encoded.input_ids, encoded.attention_mask)
    states = [[*model.parameters(), *model.buffers()] for model in (ours, slow)]
    mine = kept(lambda: ours(image, [caption] * 4, 0.4), states[0])
    theirs = kept(lambda: slow(image, text, 0.4), states[1])
    assert size(mine) < 0.5 * size(theirs)


def draws(function, *inputs: Tensor):
    """Output and gradients, the same random numbers for everybody."""
    torch.manual_seed(1)
    out = function(*inputs)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out, *torch.autograd.grad(out, inputs, given)


def queries_keys_values(B=2, N=7, S=11, H=3, d=8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, H, d, generator=generator).requires_grad_() for n in (N, S, S)]


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_attention_with_dropout_that_keeps_little_equals_the_formula(kind):
    mask = torch.rand(2, 1, 7, 11, generator=torch.Generator().manual_seed(3)) > 0.3
    mask = {"none": None, "bool": mask, "additive": mask.float().sub(1).mul(3)}[kind]
    inputs = queries_keys_values()
    got = draws(lambda q, k, v: Dropped.apply(q, k, v, mask, 0.4, 0.3), *inputs)
    want = draws(lambda q, k, v: plain(q, k, v, mask, 0.4, 0.3), *inputs)
    for a, b in zip(got, want):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got[0], plain(*inputs, mask, 0.0, 0.3))


def test_attention_with_dropout_keeps_one_table_of_probabilities_and_no_copies():
    q, k, v = queries_keys_values()
    (table,) = kept(lambda: usual(q, k, v, None, 0.1, 0.3), (q, k, v))
    assert table.shape == (2, 3, 7, 11) and table.dtype == torch.float32


def test_a_learned_mask_gets_its_gradient_with_dropout_as_well():
    mask = torch.zeros(2, 3, 7, 11, requires_grad=True)
    usual(*queries_keys_values(), mask, 0.1, 0.3).sum().backward()
    assert mask.grad.abs().sum() > 0


def test_a_feed_forward_keeps_its_input_and_what_came_before_gelu_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (12, 5), (12,), (5, 12), (5,)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    assert [x.shape for x in kept(lambda: mlp(*inputs), inputs)] == [(6, 12)]


def test_a_text_layers_feed_forward_keeps_one_wide_state_and_uses_a_replaced_linear(small):
    layer = blip_pretrain(**small, queue_size=8).text_encoder.encoder.layer[0].eval()
    states = torch.randn(5, 48, requires_grad=True)
    found = kept(lambda: layer.feed_forward(states), layer.parameters())
    assert sum(x.shape[-1] == 96 for x in found) == 1
    want = layer.feed_forward(states)
    layer.output.dense = torch.nn.Sequential(layer.output.dense)
    assert_close(layer.feed_forward(states), want)


def test_the_word_embeddings_gradient_from_the_vocabulary_is_no_view():
    """Autograd adds to no view in place: it would make a third matrix of 30,524 rows."""
    hidden, weight = torch.randn(4, 6), torch.randn(9, 6, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(9), torch.tensor([1, 2, 3, 4]))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert not gradient._is_view()


def test_keys_of_images_are_made_once_a_layer_and_are_those_of_inference(small, images, monkeypatch):
    model = blip_pretrain(**small, queue_size=8, mlm_probability=0.5)
    encoder, embeds = model.text_encoder.encoder, model.visual_encoder(images)
    with torch.no_grad():
        want = image_states(encoder, embeds)
    made = []
    original = packed.project
    monkeypatch.setattr(packed, "project", lambda *args: made.append(len(args[0])) or original(*args))
    got = image_states(encoder, embeds)
    assert got.shape == want.shape == (4, 17) and len(got.layers) == 2
    for mine, theirs in zip(got.layers, want.layers):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    made.clear()
    model(images, ["a dog", "a cat", "two red apples", "a"], 0.4, return_dict=True)  # ITM, LM and MLM
    assert made == [1, 1]


def test_checkpointed_text_layers_give_the_same_gradients(small, images):
    """Keys of images are made outside of what is recomputed, or their products would be computed twice."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = blip_pretrain(**small, queue_size=8)
        model.text_encoder.config.gradient_checkpointing = recompute
        torch.manual_seed(1)
        sum(model(images, ["a dog", "a cat", "two red apples", "a"], 0.4)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 50 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, msg=name)
