"""NLVR2 from the official files to figures: two pictures a statement, swapped in training only, each judged once."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from blipfast.config import save_config, to_dict
from blipfast.data.loader import TrainLoader
from blipfast.data.nlvr import NLVRDataset, other_side
from blipfast.data.transforms import eval_transform
from blipfast.models.blip_nlvr import BLIP_NLVR
from blipfast.models.blip_pretrain import BLIP_Pretrain
from blipfast.models.checkpoint import read_state_dict, save_weights
from blipfast.tasks.finetune import evaluate_checkpoint
from blipfast.tasks.nlvr import NLVRTask
from blipfast.text import load_tokenizer, train_tokenizer
from blipfast.train import main
from tests import small_tasks
from tests.ranks import on_ranks
from tests.small_tasks import COLOURS, changed, evaluate, evaluate_splits, random_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NLVR2 in official BLIP's schema: eleven statements about pictures of one colour; nine to test on."""
    folder = tmp_path_factory.mktemp("nlvr")
    (folder / "images").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(folder / "images" / f"{colour}.png")
    entries = []
    for i in range(11):
        left, right = COLOURS[i % 5], COLOURS[(i * i + 1) % 5]
        said = (left, right)[i % 3 > 0]
        entries.append(
            {
                "images": [f"images/{left}.png", f"images/{right}.png"],
                "sentence": f"The left image is {said}.",
                "label": str(said == left),
                "identifier": f"dev-{i}-0",
            }
        )
    for name, kept in {"nlvr_train": entries, "nlvr_dev": entries[:5], "nlvr_test": entries[2:]}.items():
        (folder / f"{name}.json").write_text(json.dumps(kept, indent=1))
    train_tokenizer([entry["sentence"] + " right" for entry in entries], 300).save(folder / "tokenizer.json")
    return folder


def settings(folder, output, **changes):
    """A config of a tiny model on the fixture; changes like evaluate_official_quirks=True."""
    data = {
        "train": [str(folder / "nlvr_train.json")],
        "val": str(folder / "nlvr_dev.json"),
        "test": str(folder / "nlvr_test.json"),
    }
    return small_tasks.settings("nlvr", folder, output, data, **changes)


@pytest.fixture(scope="module")
def weights(folder, tmp_path_factory):
    """Judgements differ from statement to statement."""
    path = tmp_path_factory.mktemp("weights") / "nlvr.safetensors"
    return random_weights(settings(folder, "unused"), path, seed=1, spread=0.2)


def result(output):
    return json.loads((Path(output) / "nlvr_result.json").read_text())


def test_statements_come_with_two_pictures_and_a_label(folder):
    statements = NLVRDataset(str(folder / "nlvr_train.json"))
    assert len(statements) == 11 and statements.pictures == 5
    sample = statements[1]
    assert sample["sentence"] == "the left image is blue" and sample["label"] == 0
    assert [picture[:, 0, 0].tolist() for picture in sample["image"]] == [[0, 128, 0], [0, 0, 255]]
    assert statements.labels.tolist().count(1) == sum(
        entry["label"] == "True" for entry in json.loads((folder / "nlvr_train.json").read_text())
    )
    assert statements.identifier(3) == "dev-3-0"


def test_labels_are_read_however_they_are_written(folder, tmp_path):
    entries = json.loads((folder / "nlvr_train.json").read_text())[:5]
    for entry, label in zip(entries, ["true", True, "TRUE", "false", False]):
        entry["label"] = label
    (tmp_path / "labels.json").write_text(json.dumps(entries))
    assert NLVRDataset(str(tmp_path / "labels.json"), str(folder)).labels.tolist() == [1, 1, 1, 0, 0]


def test_statements_whose_labels_are_hidden_are_judged_without_figures(folder, weights, tmp_path):
    entries = json.loads((folder / "nlvr_test.json").read_text())
    for entry in entries:
        del entry["label"]
    (folder / "hidden.json").write_text(json.dumps(entries))
    config = settings(folder, "unused")
    config.data.test = str(folder / "hidden.json")
    found = evaluate_checkpoint(NLVRTask, config, weights, "test", tmp_path, torch.device("cpu"))
    assert found == {"statements": len(entries)} and len(result(tmp_path)) == len(entries)


def test_a_batch_holds_all_first_pictures_then_all_second_ones(folder):
    statements = NLVRDataset(str(folder / "nlvr_train.json"), swap=0.0)
    for cache in (False, True):
        loader = TrainLoader(statements, eval_transform(32), 4, seed=1, cache_images=cache)
        batch = next(iter(loader.iterate(0)))
        assert batch["image"].shape == (8, 3, 32, 32) and batch["label"].dtype == torch.int64
        for row, i in enumerate(batch["index"].tolist()):
            first, second = (eval_transform(32)(picture) for picture in statements[i]["image"])
            assert torch.equal(batch["image"][row], first) and torch.equal(batch["image"][4 + row], second)
            assert batch["sentence"][row] == statements.sentence(i)
            assert batch["label"][row] == statements.labels[i]


def test_training_swaps_half_of_the_pairs_and_left_with_right(folder):
    statements = NLVRDataset(str(folder / "nlvr_train.json"))
    sample = statements[1]
    swapped = [statements.vary(sample, Random(seed)) for seed in range(400)]
    seen = [(s["image"][0] is sample["image"][1], s["sentence"]) for s in swapped]
    assert set(seen) == {(True, "the right image is blue"), (False, "the left image is blue")}
    assert 160 < sum(exchanged for exchanged, _ in seen) < 240
    assert other_side("left of the right leftover") == "right of the left leftover"
    both = [next(iter(TrainLoader(statements, eval_transform(32), 11, seed=s).iterate(0))) for s in (1, 1, 2)]
    assert both[0]["sentence"] == both[1]["sentence"] and any("right" in s for s in both[0]["sentence"])


def test_training_ends_with_judgements_of_every_test_statement(folder, tmp_path):
    config = settings(folder, tmp_path / "run", train_evaluate_every=1, train_epochs=2)
    save_config(config, tmp_path / "nlvr.yaml")
    assert main(["--config", str(tmp_path / "nlvr.yaml"), "--traceback"]) == 0
    judged = result(tmp_path / "run" / "result" / "test")
    assert [row["identifier"] for row in judged] == [f"dev-{i}-0" for i in range(2, 11)]
    assert all(row["label"] == str(row["probability"] > 0.5) for row in judged)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val"]["statements"] == 5 and metrics["test"]["statements"] == 9
    assert 0 <= metrics["test"]["accuracy"] <= 100
    truths = [entry["label"] for entry in json.loads((folder / "nlvr_test.json").read_text())]
    right = sum(row["label"] == truth for row, truth in zip(judged, truths))
    assert metrics["test"]["accuracy"] == pytest.approx(100 * right / 9)
    assert metrics["test"]["prior"] == pytest.approx(
        100 * max(truths.count("True"), truths.count("False")) / 9
    )


def test_evaluation_judges_the_pictures_as_they_stand_and_the_official_quirk_swaps_some(
    folder, weights, tmp_path
):
    config = settings(folder, "unused")
    model = NLVRTask.load_model(config, weights, torch.device("cpu"))
    statements = NLVRDataset(str(folder / "nlvr_test.json"))

    def alone(i, swap):
        pair = [eval_transform(32)(picture) for picture in statements[i]["image"]]
        sentence = statements.sentence(i)
        image = torch.stack(pair[::-1] if swap else pair)
        sentence = other_side(sentence) if swap else sentence
        return BLIP_NLVR.forward(model, image, [sentence], None, train=False).softmax(1)[0, 1].item()

    straight = [alone(i, False) for i in range(len(statements))]
    for size in (1, 4):
        config.evaluate.batch_size = size
        evaluate(config, weights, tmp_path)
        assert [row["probability"] for row in result(tmp_path)] == pytest.approx(straight, abs=1e-6)
    config.evaluate.official_quirks = True
    evaluate(config, weights, tmp_path)
    found = [row["probability"] for row in result(tmp_path)]
    swapped = [abs(p - s) > 1e-6 for p, s in zip(found, straight)]
    assert 0 < sum(swapped) < len(swapped)
    assert found == pytest.approx([alone(i, swap) for i, swap in enumerate(swapped)], abs=1e-6)


def test_a_pair_that_several_statements_are_about_is_encoded_once(folder, weights, tmp_path, monkeypatch):
    config, encoded, judged = settings(folder, "unused"), [], []
    config.evaluate.batch_size = 4
    forward = BLIP_NLVR.forward

    def counted(self, image, text, *rest, **how):
        encoded.append(len(image))
        judged.append(len(text))
        return forward(self, image, text, *rest, **how)

    monkeypatch.setattr(BLIP_NLVR, "forward", counted)
    evaluate(config, weights, tmp_path)
    pairs = {tuple(entry["images"]) for entry in json.loads((folder / "nlvr_test.json").read_text())}
    assert sum(judged) == 9 and sum(encoded) == 2 * len(pairs) == 10
    assert max(judged) <= 4


def test_two_ranks_give_the_figures_and_files_of_one(folder, weights, tmp_path):
    values = to_dict(settings(folder, "unused"))
    alone = evaluate_splits(values, weights, tmp_path / "one")
    both = on_ranks(2, evaluate_splits, values, weights, str(tmp_path / "two"))
    assert both[0] == both[1] == alone and [m["statements"] for m in alone] == [9, 5]
    for split in ("test", "val"):
        one, two = result(tmp_path / "one" / split), result(tmp_path / "two" / split)
        assert [row["label"] for row in one] == [row["label"] for row in two]
        assert [row["probability"] for row in one] == pytest.approx(
            [row["probability"] for row in two], abs=1e-6
        )


def test_a_pre_trained_model_starts_both_cross_attentions_and_only_the_head_is_random(folder, tmp_path):
    config = settings(folder, tmp_path)
    model = config.model
    pretrained = BLIP_Pretrain(
        med_config=model.med_config,
        image_size=32,
        vit=model.vit,
        queue_size=8,
        tokenizer=load_tokenizer(model.tokenizer),
    )
    source = save_weights(pretrained.state_dict(), tmp_path / "pretrained.pth")
    config.model.init_from = str(source)
    state, start = NLVRTask(config).model.state_dict(), read_state_dict(source)
    for side in "01":
        for there, here in (("self.key", f"self{side}.key"), ("output.dense", f"dense{side}")):
            name = "text_encoder.encoder.layer.0.crossattention."
            here = here if "self" in here else f"output.{here}"
            assert torch.equal(state[f"{name}{here}.weight"], start[f"{name}{there}.weight"])
    assert torch.equal(state["visual_encoder.cls_token"], start["visual_encoder.cls_token"])
    del start["text_encoder.encoder.layer.0.output.dense.weight"]
    config.model.init_from = str(save_weights(start, tmp_path / "less.pth"))
    with pytest.raises(ValueError, match="less.pth.*text_encoder"):
        NLVRTask(config)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"images": None}, r':3: "images" is missing'),
        ({"images": ["images/red.png"]}, r':3: "images" should be'),
        ({"sentence": " "}, r':3: "sentence" holds an empty text'),
        ({"label": "perhaps"}, r':3: "label" should be "True" or "False"'),
        ({"label": None}, r':3: "label" is missing'),
    ],
)
def test_a_malformed_statement_is_named_by_file_line_and_key(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        NLVRDataset(changed(folder / "nlvr_train.json", 1, keys))


def test_missing_pictures_name_the_folder_setting(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.image_root is"):
        NLVRDataset(str(folder / "nlvr_train.json"), str(tmp_path))
