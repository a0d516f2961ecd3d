"""Weights in and out: what fits is loaded, what does not is named, nothing is damaged."""

from __future__ import annotations

import pytest
import torch

from blipfast.models.blip import blip_decoder, blip_feature_extractor
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.checkpoint import load_bert, load_checkpoint, load_vit, read_state_dict, save_weights


@pytest.fixture
def pretrained(small):
    torch.manual_seed(1)
    return blip_pretrain(queue_size=8, embed_dim=8, **small)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_come_back_bit_for_bit_and_tied_ones_are_stored_once(pretrained, tmp_path, name):
    path = save_weights(pretrained.state_dict(), tmp_path / name)
    state = pretrained.state_dict()
    again = read_state_dict(path)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    # the 30,524 x 48 word embeddings: the tied pair, the momentum encoder's, and little else
    assert path.stat().st_size < 2.5 * 30524 * 48 * 4
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_pretrained_checkpoint_starts_every_task(pretrained, small, tmp_path):
    path = str(save_weights(pretrained.state_dict(), tmp_path / "w.pth"))
    for build in (blip_decoder, blip_feature_extractor):
        model = build(pretrained=path, **small)
        assert torch.equal(model.visual_encoder.cls_token, pretrained.visual_encoder.cls_token)
    assert torch.equal(
        blip_itm(pretrained=path, embed_dim=8, **small).itm_head.weight, pretrained.itm_head.weight
    )
    retrieval = blip_retrieval(pretrained=path, queue_size=8, embed_dim=8, **small)
    assert torch.equal(retrieval.image_queue, pretrained.image_queue)
    nlvr = blip_nlvr(pretrained=path, **small).state_dict()
    key = "text_encoder.encoder.layer.1.crossattention.self{}.query.weight"
    original = pretrained.state_dict()[key.format("")]
    assert torch.equal(nlvr[key.format(0)], original) and torch.equal(nlvr[key.format(1)], original)


def test_position_embeddings_are_resampled_to_the_picture_size(pretrained, small, tmp_path):
    path = save_weights(pretrained.state_dict(), tmp_path / "w.pth")
    model, report = load_checkpoint(blip_decoder(**small | {"image_size": 64}), path)
    assert (
        report.resized_keys == ["visual_encoder.pos_embed"] and model.visual_encoder.pos_embed.shape[1] == 65
    )
    assert torch.equal(model.visual_encoder.pos_embed[:, 0], pretrained.visual_encoder.pos_embed[:, 0])


def test_position_ids_may_be_absent(pretrained, small, tmp_path):
    state = {key: value for key, value in pretrained.state_dict().items() if not key.endswith("position_ids")}
    blip_decoder(pretrained=str(save_weights(state, tmp_path / "w.pth")), **small)
    assert not pretrained.load_state_dict(state).missing_keys


def test_another_queue_size_is_reported_and_everything_else_loads(pretrained, small, tmp_path):
    path = save_weights(pretrained.state_dict(), tmp_path / "w.pth")
    _, report = load_checkpoint(blip_pretrain(queue_size=12, embed_dim=8, **small), path)
    assert sorted(key.split(":")[0] for key in report.mismatched_keys) == ["image_queue", "text_queue"]
    assert report.missing_keys == ["image_queue", "text_queue"]


def test_a_model_never_stays_random_in_silence(small, tmp_path):
    path = save_weights(blip_itm(**small).state_dict(), tmp_path / "itm.pth")
    with pytest.raises(ValueError, match=r"itm.pth: BLIP_Decoder needs 63 tensors .*text_decoder"):
        blip_decoder(pretrained=str(path), **small)
    with pytest.raises(ValueError, match="none of its 1 tensors fits"):
        load_checkpoint(blip_itm(**small), save_weights({"x": torch.ones(2)}, tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_and_missing_files_are_named(pretrained, tmp_path, name):
    path = save_weights(pretrained.state_dict(), tmp_path / name)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{name}: not a readable checkpoint"):
        read_state_dict(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_state_dict(tmp_path / "nothing.pth")


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run!",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_state_dict(tmp_path / "evil.pth")


def test_a_failed_save_leaves_the_old_file(pretrained, tmp_path, monkeypatch):
    path = save_weights({"x": torch.ones(2)}, tmp_path / "w.pth")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_weights(pretrained.state_dict(), path)
    assert read_state_dict(path)["x"].tolist() == [1, 1]


def test_vit_and_bert_weights_start_a_pretraining(small, tmp_path):
    donor = blip_pretrain(queue_size=8, **small)
    vit = donor.visual_encoder.state_dict() | {"head.weight": torch.ones(3, 32)}
    bert = {
        f"bert.{key}": value[:30522] if "word_embeddings" in key else value
        for key, value in donor.text_encoder.state_dict().items()
        if "crossattention" not in key
    }
    vit_file, bert_file = (
        save_weights(vit, tmp_path / "vit.pth"),
        save_weights(bert, tmp_path / "bert.safetensors"),
    )
    model = blip_pretrain(queue_size=8, vit_init=str(vit_file), bert_init=str(bert_file), **small)
    assert torch.equal(model.visual_encoder_m.pos_embed, donor.visual_encoder.pos_embed)
    name = "encoder.layer.0.attention.self.query.weight"
    for text_model in (model.text_encoder, model.text_decoder.bert, model.text_encoder_m):
        assert torch.equal(text_model.state_dict()[name], donor.text_encoder.state_dict()[name])
    words = model.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(words[:30522], donor.text_encoder.embeddings.word_embeddings.weight[:30522])
    with pytest.raises(ValueError, match="not BERT weights"):
        load_bert(model.text_encoder, str(vit_file))
    with pytest.raises(ValueError, match="VisionTransformer"):
        load_vit(model.visual_encoder, str(bert_file))
