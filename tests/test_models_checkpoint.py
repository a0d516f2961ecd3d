"""Weights in and out: what fits is loaded, what does not is named, nothing is damaged."""

from __future__ import annotations

import argparse
import http.server
import shutil
import socket
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from blipfast.models.blip import blip_decoder, blip_feature_extractor
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.checkpoint import (
    kind_of,
    load_bert,
    load_checkpoint,
    load_vit,
    load_weights,
    read_state_dict,
    save_weights,
)
from blipfast.models.download import RELEASED, download, is_hub_name, is_hugging_face
from blipfast.models.huggingface import to_hugging_face


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
    pretrained.queue_ptr[0] = 7
    path = save_weights(pretrained.state_dict(), tmp_path / "w.pth")
    model, report = load_checkpoint(
        blip_pretrain(queue_size=12, embed_dim=8, **small), path, allow_missing=False
    )
    assert sorted(key.split(":")[0] for key in report.mismatched_keys) == ["image_queue", "text_queue"]
    assert sorted(report.missing_keys) == ["image_queue", "queue_ptr", "text_queue"]
    assert model.queue_ptr.item() == 0, "an empty queue is written from its start"


def test_another_queue_size_empties_the_ids_of_a_retrieval_queue_too(small):
    torch.manual_seed(1)
    donor = blip_retrieval(queue_size=8, embed_dim=8, **small)
    donor.idx_queue.fill_(5)
    model = blip_retrieval(queue_size=12, embed_dim=8, **small)
    load_weights(model, donor.state_dict(), allow_missing=False)
    assert (model.idx_queue == -100).all() and torch.equal(model.temp, donor.temp)


def test_a_model_never_stays_random_in_silence(small, tmp_path):
    path = save_weights(blip_itm(**small).state_dict(), tmp_path / "itm.pth")
    said = r"itm.pth: holds an itm model; BLIP_Decoder needs 63 more tensors \(text_decoder 63\)"
    with pytest.raises(ValueError, match=said):
        blip_decoder(pretrained=str(path), **small)
    assert blip_decoder(pretrained=str(path), allow_random=["text_decoder"], **small)
    for build in (blip_vqa, blip_retrieval, blip_nlvr):
        with pytest.raises(ValueError, match="needs .* more tensors"):
            build(
                pretrained=str(save_weights(blip_decoder(**small).state_dict(), tmp_path / "c.pth")), **small
            )
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


def test_what_is_no_checkpoint_is_said_in_our_words(pretrained, tmp_path):
    (tmp_path / "page.pth").write_text("<html>sign in</html>")
    with pytest.raises(ValueError, match="not a readable checkpoint") as caught:
        read_state_dict(tmp_path / "page.pth")
    assert "weights_only" not in str(caught.value)
    for text in ("{}", "[]", "no JSON"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="no index of weights"):
            read_state_dict(tmp_path / "model.safetensors.index.json")


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run!",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth: its pickle names builtins.print, which is not run"):
        read_state_dict(tmp_path / "evil.pth")


def test_settings_pickled_beside_the_weights_are_skipped_without_their_classes(tmp_path, monkeypatch):
    """argparse and OmegaConf objects, as training scripts store them; OmegaConf need not be installed."""
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    config = module.DictConfig()
    config.__dict__.update(lr=1e-5, _content={"a": [1, 2]})
    args = argparse.Namespace(lr=1e-5, output=Path("x"), best=np.float64(0.5), names={"a"})
    content = {"model": {"visual_encoder.x": torch.ones(2)}, "config": config, "args": args, "epoch": 3}
    torch.save(content, tmp_path / "zip.pth")
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert read_state_dict(tmp_path / "zip.pth")["visual_encoder.x"].tolist() == [1, 1]
    content = {"model": {"visual_encoder.x": torch.ones(2)}, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "old.pth")["visual_encoder.x"].tolist() == [1, 1]


def test_lavis_weights_load_and_momentum_encoders_start_as_copies(pretrained, small, tmp_path):
    """LAVIS leaves out what has no gradient, and calls the pointer of a retrieval queue queue_ptr."""
    torch.manual_seed(2)
    donor = blip_retrieval(queue_size=8, embed_dim=8, **small)
    donor.idx_queue.fill_(5)
    donor.ptr_queue[0] = 3
    state = {key: value for key, value in donor.state_dict().items() if not key.split(".")[0].endswith("_m")}
    state["queue_ptr"] = state.pop("ptr_queue")
    path = tmp_path / "checkpoint_best.pth"
    torch.save(
        {"model": state, "optimizer": {}, "config": {"run": {"lr": 1e-5}}, "scaler": None, "epoch": 1}, path
    )
    model, report = load_checkpoint(
        blip_retrieval(queue_size=8, embed_dim=8, **small), path, allow_missing=False
    )
    assert model.ptr_queue.item() == 3 and model.idx_queue[0, 0] == 5
    for online, momentum in model.momentum_pairs():
        assert torch.equal(online, momentum)
    assert "visual_encoder_m.cls_token" in report.copied_keys and not report.missing_keys


@pytest.mark.parametrize(
    "nests, prefix",
    [
        (["model"], "module."),
        (["module"], ""),
        (["state_dict"], "_orig_mod.module."),
        (["state_dict"], "model."),  # Lightning
        (["model", "state_dict"], "module."),
    ],
)
def test_wrappers_of_trainers_are_taken_off(pretrained, small, tmp_path, nests, prefix):
    state = {prefix + key: value for key, value in pretrained.state_dict().items()}
    for nest in nests:
        state = {nest: state}
    torch.save(state, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth").keys() == pretrained.state_dict().keys()


def test_allow_random_takes_parts_patterns_or_everything(small):
    small["vit"]["width"] = 48  # a decoder that reads pictures and one that reads questions are then alike
    pretrained = blip_pretrain(queue_size=8, **small)
    state = {
        key: value
        for key, value in pretrained.state_dict().items()
        if "layer.1.crossattention.self" not in key
    }

    def load(**options):
        return load_weights(blip_vqa(**small), state, "w.pth", allow_missing=False, **options)

    before = blip_vqa(**small)
    kept = {key: value.clone() for key, value in before.state_dict().items()}
    with pytest.raises(ValueError, match="needs 12 more tensors") as refused:
        load_weights(before, state, "w.pth", allow_missing=False)
    assert "model.allow_random: [text_decoder, text_encoder]" in str(refused.value)
    assert all(torch.equal(value, kept[key]) for key, value in before.state_dict().items()), "left untouched"
    with pytest.raises(ValueError, match="needs 6 more tensors"):
        load(allow_random="text_decoder")
    for allowed in (True, ("text_decoder", "text_encoder"), "*.layer.1.crossattention.self.*"):
        assert len(load(allow_random=allowed).missing_keys) == 12


def test_a_vqa_decoder_of_another_width_is_named_not_left_random_in_silence(small):
    """As with ViT-L: a pre-trained decoder reads pictures, that of VQA the question."""
    donor = blip_pretrain(queue_size=8, **small)
    with pytest.raises(
        ValueError, match=r"crossattention.self.key.weight: \[48, 32\] there, \[48, 48\] in the model"
    ):
        load_weights(blip_vqa(**small), donor.state_dict(), "w.pth", allow_missing=False)


def test_the_report_says_everything_once(pretrained, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("blipfast.models.checkpoint.log.hasHandlers", lambda: False)
    state = dict(pretrained.state_dict())
    del state["text_decoder.cls.predictions.transform.dense.weight"]
    model = blip_decoder(**small | {"image_size": 64})
    report = load_weights(model, state, "w.pth")
    out, err = capsys.readouterr()
    assert out == "" and err == f"{report}\n"
    lines = err.splitlines()
    assert lines[0].startswith("w.pth: ") and lines[0].endswith(" tensors loaded")
    assert lines[1] == "  resized to this picture size: 1 (visual_encoder 1)"
    assert lines[2] == "  missing, left as initialised: 1 (text_decoder 1)"
    assert lines[3].startswith("  in the file, not used: ") and "queue_ptr" in lines[3]
    assert len(lines) == 4


def test_what_a_checkpoint_holds_is_told_from_its_keys(pretrained, small):
    kinds = {
        "caption": blip_decoder(**small),
        "features": blip_feature_extractor(**small),
        "itm": blip_itm(**small),
        "vqa": blip_vqa(**small),
        "nlvr": blip_nlvr(**small),
        "retrieval": blip_retrieval(queue_size=8, **small),
        "pretrain": pretrained,
    }
    assert {kind: kind_of(model.state_dict()) for kind, model in kinds.items()} == {
        kind: kind for kind in kinds
    }
    assert kind_of({"visual.proj": torch.ones(1)}) == ""


@pytest.fixture
def server(tmp_path):
    """The address of a small web server that serves the folder `web`, what it was asked for, and with what tokens."""
    (tmp_path / "web").mkdir()
    asked, tokens = [], []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *_):
            asked.append(self.path)
            tokens.append(self.headers.get("Authorization"))

        def end_headers(self):
            for name in ("Content-Length",) if "short" in self.path else ():
                self._headers_buffer = [line for line in self._headers_buffer if name.encode() not in line]
                self.send_header(name, "1000")
            super().end_headers()

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked, tokens
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache / "hub"))
    return cache


def test_a_url_is_fetched_once(pretrained, small, tmp_path, server, own_cache):
    address, asked, _ = server
    save_weights(pretrained.state_dict(), tmp_path / "web" / "w.pth")
    for _ in range(2):
        model = blip_decoder(pretrained=f"{address}/w.pth", **small)
    assert torch.equal(model.visual_encoder.cls_token, pretrained.visual_encoder.cls_token)
    assert asked == ["/w.pth"]
    assert [path.name for path in (own_cache / "torch" / "checkpoints").glob("**/*.*")] == ["w.pth"]


def test_files_of_one_name_at_two_addresses_are_two(tmp_path, server):
    address, *_ = server
    for owner in "ab":
        (tmp_path / "web" / owner).mkdir()
        save_weights(
            {"one": torch.full((1,), float(ord(owner)))}, tmp_path / "web" / owner / "model.safetensors"
        )
    for owner in "ab":
        assert read_state_dict(f"{address}/{owner}/model.safetensors")["one"] == ord(owner)


def test_what_official_blip_has_fetched_is_found(own_cache):
    save_weights({"one": torch.ones(1)}, own_cache / "torch" / "checkpoints" / "model_base.pth")
    for address in RELEASED:
        assert read_state_dict(address + "some/model_base.pth")["one"] == 1


def test_the_token_goes_to_hugging_face_only(tmp_path, server, monkeypatch):
    address, _, tokens = server
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "web" / "a.pth").write_bytes(b"x")
    download(f"{address}/a.pth", tmp_path / "to" / "a.pth")
    monkeypatch.setenv("HF_ENDPOINT", address)
    download(f"{address}/a.pth", tmp_path / "to" / "b.pth")
    assert tokens == [None, "Bearer secret"]
    monkeypatch.delenv("HF_ENDPOINT")
    hosts = ("huggingface.co", "cdn.huggingface.co", "huggingface.example.org", "nothuggingface.co")
    assert [is_hugging_face(f"https://{host}/a.pth") for host in hosts] == [True, True, False, False]


def test_a_date_in_a_name_is_no_hash(tmp_path, server):
    (tmp_path / "web" / "blip-20230415.pth").write_bytes(b"x")
    assert download(f"{server[0]}/blip-20230415.pth", tmp_path / "blip.pth").is_file()
    assert download(f"{server[0]}/blip-20230415.pth", tmp_path / "blip-20230415.pth").is_file()


def test_a_name_on_hugging_face_is_fetched_once_and_found_in_its_cache(
    pretrained, small, tmp_path, server, own_cache, monkeypatch
):
    address, asked, _ = server
    monkeypatch.setenv("HF_ENDPOINT", address)
    folder = tmp_path / "web" / "owner" / "blip" / "resolve" / "main"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "vocab.txt").write_text("")
    state = {to_hugging_face(key): value for key, value in blip_decoder(**small).state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    for _ in range(2):
        assert kind_of(read_state_dict("owner/blip")) == "caption"
    weights = [path.rsplit("/")[-1] for path in asked].count("pytorch_model.bin")
    assert weights == 1
    with pytest.raises(
        ValueError, match=r"owner/none: no such file or folder here, and no such model on Hugging Face"
    ):
        read_state_dict("owner/none")
    snapshot = own_cache / "hub" / "models--me--mine" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    before = len(asked)
    assert kind_of(read_state_dict("me/mine")) == "caption"
    assert len(asked) == before


def test_a_broken_download_leaves_nothing(tmp_path, server):
    address, *_ = server
    (tmp_path / "web" / "short.pth").write_bytes(b"x" * 10)
    (tmp_path / "web" / "w-0000000a.pth").write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match="broke after 10 of 1000 bytes|cannot be reached"):
        download(f"{address}/short.pth", tmp_path / "to" / "short.pth")
    with pytest.raises(ValueError, match="its SHA-256 is .*, expected 0000000a"):
        download(f"{address}/w-0000000a.pth", tmp_path / "to" / "w-0000000a.pth")
    with pytest.raises(ValueError, match="there is no such file"):
        download(f"{address}/none.pth", tmp_path / "to" / "none.pth")
    assert not list((tmp_path / "to").iterdir())


def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match="cannot be reached .* fetch the file elsewhere and pass its path"):
        read_state_dict(f"{address}/w.pth")
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(
        ValueError, match="owner/blip: no such file or folder here. On Hugging Face: .*cannot be reached"
    ):
        read_state_dict("owner/blip")


def test_only_owner_slash_name_is_looked_up_on_hugging_face():
    assert is_hub_name("Salesforce/blip-vqa-base")
    for path in ("runs/emoji/", "a/b/c", "w.pth", "runs/w.pth", "./runs", "../runs", "/tmp"):
        assert not is_hub_name(path)


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
