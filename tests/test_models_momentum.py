"""Momentum encoders, queues and hard negatives: what holds for any batch."""

from __future__ import annotations

import pytest
import torch

import blipfast.models.blip_pretrain as pretrain_module
from blipfast.models.blip_pretrain import BLIP_Pretrain, blip_pretrain, caption_ids
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.momentum import MatchingPairs, hard_negatives
from blipfast.transfer import ToHost

CAPTIONS = ["a cat", "a small dog", "two birds", "the sea"]


def test_the_queue_is_a_ring_that_takes_any_batch_size(small):
    model = blip_pretrain(queue_size=7, embed_dim=4, **small)
    features = torch.arange(1, 18).float()[:, None].expand(-1, 4)
    model._dequeue_and_enqueue(features[:3], features[:3], torch.arange(3))
    model._dequeue_and_enqueue(features[3:8], features[3:8], torch.arange(3, 8))
    assert model.queue_ptr.item() == 1
    assert model.image_queue[0].tolist() == [8, 2, 3, 4, 5, 6, 7]
    assert model.idx_queue[0].tolist() == [7, 1, 2, 3, 4, 5, 6]
    model._dequeue_and_enqueue(features[8:], features[8:], torch.arange(8, 17))  # more than the queue holds
    assert sorted(model.text_queue[0].tolist()) == [11, 12, 13, 14, 15, 16, 17]
    assert model.queue_ptr.item() == (1 + 9) % 7
    oldest_first = model.text_queue[0].roll(-model.queue_ptr.item())
    assert oldest_first.tolist() == [11, 12, 13, 14, 15, 16, 17]


def test_hard_negatives_are_drawn_in_proportion_and_never_from_the_positives():
    torch.manual_seed(0)
    weights = torch.tensor([[9.0, 1.0, 3.0]]).expand(4000, -1)
    forbidden = torch.tensor([[True, False, False]]).expand(4000, -1)
    index, exists = hard_negatives(weights, forbidden)
    assert exists.all() and (index != 0).all()
    assert (index == 2).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_hard_negatives_survive_underflow_and_rows_without_candidates():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    forbidden = torch.tensor([[True, False, False], [True, True, True], [False, False, True]])
    index, exists = hard_negatives(weights, forbidden)
    assert exists.tolist() == [True, False, True]
    assert index[0] in (1, 2) and index[2] in (0, 1)


def test_pairs_are_the_batch_then_the_negatives_that_were_sent(small):
    model = blip_pretrain(queue_size=5, **small)
    text = torch.tensor([2, 0, 1]), torch.tensor([True, True, False])
    image = torch.tensor([1, 2, 0]), torch.tensor([False, True, True])
    pairs = model.matching_pairs(model.send_negatives(text, image))
    assert pairs.texts == [0, 1, 2, 2, 0, 1, 0, 1, 2] and pairs.images == [0, 1, 2, 0, 1, 2, 1, 2, 0]
    assert pairs.labels == [1] * 3 + [0] * 6
    assert pairs.counts == [True] * 3 + [True, True, False] + [False, True, True]


@pytest.mark.gpu
def test_what_was_sent_to_the_host_is_what_it_was_then():
    x = torch.arange(1000, device="cuda")
    sent = ToHost(x)
    x.zero_()
    assert sent.read().tolist() == list(range(1000))


def test_matching_loss_leaves_out_pairs_that_do_not_count(small):
    model = blip_pretrain(queue_size=5, **small)
    states, labels = torch.randn(3, 48), [0, 1, 1]
    pairs = MatchingPairs([0, 1, 2], [0, 1, 2], labels, [True, True, False])
    loss, accuracy = model.matching_loss(states, pairs)
    logits = model.itm_head(states[:2])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[:2]))
    assert loss.item() == pytest.approx(expected.item())
    assert accuracy.item() == (logits.argmax(1) == torch.tensor(labels[:2])).float().mean().item()


@pytest.mark.parametrize("captions", [["a cat"], ["a cat"] * 4], ids=["batch of one", "all duplicates"])
def test_pretraining_takes_batches_without_negatives(small, images, captions):
    model = blip_pretrain(queue_size=5, embed_dim=8, duplicates="positive", **small)
    losses = model(images[: len(captions)], captions, 0.4)
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_equal_captions_are_positives_when_asked(small, images, monkeypatch):
    model = blip_pretrain(queue_size=6, embed_dim=8, duplicates="positive", **small)
    captions = ["a cat", "a small dog", "a cat", "the sea"]
    ids = caption_ids(model.tokenizer(captions).input_ids)
    assert ids[0] == ids[2] and len(set(ids.tolist())) == 3
    seen = []

    def spy(weights, forbidden):
        seen.append(forbidden)
        return hard_negatives(weights, forbidden)

    monkeypatch.setattr(pretrain_module, "hard_negatives", spy)
    model(images, captions, 0.0)
    assert seen[0][0].tolist() == [True, False, True, False]


def test_forward_moves_the_momentum_encoders_and_a_trainer_may_do_it_instead(small, images):
    model = blip_pretrain(queue_size=8, embed_dim=8, momentum=0.9, **small)
    with torch.no_grad():
        model.vision_proj.weight.add_(1.0)
    before = model.vision_proj_m.weight.clone()
    model(images, CAPTIONS, 0.4)
    torch.testing.assert_close(model.vision_proj_m.weight, before + 0.1)
    assert model.queue_ptr.item() == 4
    model.self_updating = False
    before = model.vision_proj_m.weight.clone()
    model(images, CAPTIONS, 0.4)
    model(images, CAPTIONS, 0.4)
    assert torch.equal(model.vision_proj_m.weight, before) and model.queue_ptr.item() == 4
    model.end_step()
    assert model.queue_ptr.item() == (4 + 8) % 8


def test_encoders_that_were_replaced_are_averaged(small):
    model = blip_pretrain(queue_size=8, **small)
    model._momentum_update()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # other parameters in the place of the first ones
    with torch.no_grad():
        for weight in model.text_encoder.parameters():
            weight.add_(1.0)
    before = [weight.clone() for weight in model.text_encoder_m.parameters()]
    model._momentum_update()
    moved = [not torch.equal(a, b) for a, b in zip(model.text_encoder_m.parameters(), before, strict=True)]
    assert sum(moved) == len(
        [n for n, _ in model.text_encoder_m.named_parameters() if ".crossattention." not in n]
    )


def test_momentum_dropout_can_be_switched_off(small):
    model = blip_pretrain(queue_size=8, **small)
    assert model.train().text_encoder_m.training
    model.momentum_dropout = False
    assert not model.train().text_encoder_m.training and model.text_encoder.training


def test_everything_but_self_attention_is_shared_between_encoder_and_decoder(small):
    model = blip_pretrain(queue_size=8, **small)
    encoder, decoder = (
        dict(model.text_encoder.named_parameters()),
        dict(model.text_decoder.bert.named_parameters()),
    )
    for name, parameter in encoder.items():
        assert (parameter is decoder[name]) == (".attention." not in name), name


def test_ids_of_the_pretraining_queue_stay_out_of_checkpoints(small):
    model = BLIP_Pretrain(queue_size=8, **small)
    assert "idx_queue" not in model.state_dict() and "idx_queue" in dict(model.named_buffers())
    assert "idx_queue" in blip_retrieval(queue_size=8, **small).state_dict()


def test_mlm_is_a_fourth_loss(small, images):
    torch.manual_seed(0)
    model = blip_pretrain(queue_size=8, mlm_probability=0.9, **small)
    losses = model(images, CAPTIONS, 0.4, return_dict=True)
    assert losses["loss_mlm"].item() > 5  # about log(30524) at the start
    losses["loss_mlm"].backward()
    assert model.text_decoder.cls.predictions.transform.dense.weight.grad.abs().sum() > 0
    model.mlm_probability = 1e-9
    assert model(images, CAPTIONS, 0.4, return_dict=True)["loss_mlm"].item() == 0.0  # nothing masked, no NaN


def test_the_queue_serves_as_keys_only_after_its_warmup(small, images):
    model = blip_pretrain(queue_size=6, embed_dim=8, queue_warmup=8, momentum=1.0, **small).eval()
    alone = model(images, CAPTIONS, 0.4)[0]
    model.image_queue.normal_(), model.text_queue.normal_()
    torch.testing.assert_close(model(images, CAPTIONS, 0.4)[0], alone)  # whatever the queue holds
    assert model.queued.item() == 8
    assert (model(images, CAPTIONS, 0.4)[0] - alone).abs() > 0.1


def test_captions_and_pictures_must_be_as_many(small, images):
    with pytest.raises(ValueError, match="4 pictures need 4 captions, got 3"):
        blip_pretrain(queue_size=6, **small)(images, CAPTIONS[:3], 0.4)
