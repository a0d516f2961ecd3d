"""Captioning from official annotation files to official result files: training, the best epoch, scores, bad input."""

from __future__ import annotations

import json

import pytest
import torch

from blipfast.caption_metrics import caption_metrics
from blipfast.config import load_config, save_config
from blipfast.models.blip import blip_decoder
from blipfast.tasks.caption import CaptionTask, open_view
from blipfast.tasks.finetune import evaluate_checkpoint
from blipfast.train import main
from tests import caption_sets, launch
from tests.launch import TESTS, records

TRAIN = TESTS.parent / "blipfast" / "train.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return caption_sets.nocaps(caption_sets.coco(tmp_path_factory.mktemp("sets")))


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A captioner that has begun to see what is on the few pictures: 120 steps, seconds."""
    output = tmp_path_factory.mktemp("runs") / "caption"
    config = caption_sets.config(sets, output)
    assert (
        main(["--config", str(config), "--set", "train.epochs=30", "train.evaluate_every=15", "--traceback"])
        == 0
    )
    return output


def read(path):
    return json.loads(path.read_text())


def test_training_learns_and_leaves_official_result_files(run, sets):
    metrics = read(run / "metrics.json")
    assert metrics["test"]["CIDEr"] > 2, "one caption for all pictures scores below 1"
    rows = read(run / "result" / "test" / "test.json")
    assert [row.keys() for row in rows] == [{"image_id", "caption"}] * 7
    assert [row["image_id"] for row in rows] == list(range(16, 23)), "the numbers in COCO's file names"
    assert not any("picture" in row["caption"] for row in rows), "the prompt is taken off"
    truth = {
        row["image_id"]: e["caption"]
        for row, e in zip(rows, read(sets / "annotations/coco_karpathy_test.json"))
    }
    expected = caption_metrics({row["image_id"]: row["caption"] for row in rows}, truth)
    assert {name: metrics["test"][name] for name in expected} == expected
    assert read(run / "result" / "val_epoch_15" / "metrics.json")["split"] == "val"
    assert "<html" in (run / "result" / "test" / "gallery.html").read_text()
    for name in ("model.safetensors", "tokenizer.json", "config.yaml", "curves.png"):
        assert (run / name).stat().st_size > 0


def test_the_best_epoch_is_chosen_by_cider_and_bleu_4(run):
    evaluations = [record for record in records(run) if record.get("event") == "evaluate"]
    assert [record["epoch"] for record in evaluations] == [15, 30]
    rule = [record["CIDEr"] + record["Bleu_4"] for record in evaluations]
    assert [record["selected"] for record in evaluations] == pytest.approx(rule)
    assert read(run / "best.json")["best_epoch"] == evaluations[rule.index(max(rule))]["epoch"]


def test_two_ranks_train_validate_and_choose_as_one_rank_does(sets, tmp_path):
    """Under the deepspeed launcher and ZeRO-1; one rank takes the same batches by accumulation. Val: 4 + 3 pictures."""
    pytest.importorskip("deepspeed")
    config = str(caption_sets.config(sets, tmp_path / "any"))
    common = ["train.epochs=3", "train.batch_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["--config", config, "--set", *common, f"output={one}", "train.accumulation=2"]) == 0
    zero = "deepspeed={zero_optimization: {stage: 1}}"
    launch.run(TRAIN, "--config", config, "--set", *common, f"output={two}", zero, "--traceback", ranks=2)
    best = [read(run / "best.json") for run in (one, two)]
    assert best[0]["best_epoch"] == best[1]["best_epoch"] and len(best[0]["history"]) == 3
    assert best[0]["history"] == pytest.approx(best[1]["history"], rel=1e-6)
    for name in ("val_epoch_01/val.json", "val_epoch_03/val.json", "test/test.json"):
        assert read(one / "result" / name) == read(two / "result" / name)


def test_the_run_folder_is_a_captioner_for_the_official_factory(run, sets):
    config = load_config(run / "config.yaml")
    model = CaptionTask.load_model(config, run, CPU)
    official = blip_decoder(
        str(run / "model.safetensors"),
        vit=config.model.vit,
        image_size=32,
        med_config=config.model.med_config,
        tokenizer=model.tokenizer,
    ).eval()
    assert official.state_dict().keys() == model.state_dict().keys()
    picture = torch.randn(1, 3, 32, 32)
    assert official.generate(picture, max_length=12, min_length=5) == model.generate(
        picture, max_length=12, min_length=5
    )


def test_the_config_for_own_captions_trains_on_a_list_and_on_a_folder(tmp_path):
    for number, (colour, shape) in enumerate(caption_sets.THINGS):
        caption_sets.draw(tmp_path / "photos" / f"{number}.png", colour, shape)
        (tmp_path / "photos" / f"{number}.txt").write_text(caption_sets.caption(colour, shape))
    pairs = [{"image": f"photos/{i}.png", "caption": "A thing."} for i in range(4)]
    caption_sets.write(tmp_path / "val.json", pairs)
    small = load_config(caption_sets.config(caption_sets.coco(tmp_path / "coco"), tmp_path)).model
    for source in (tmp_path / "photos", tmp_path / "val.json"):
        config = load_config(
            TESTS.parent / "configs" / "caption_own.yaml",
            [f"data.train=[{source}]", f"data.val={tmp_path / 'val.json'}", "data.workers=0"],
        )
        config.model, config.output = small, str(tmp_path / "run" / source.name)
        config.train.epochs, config.train.batch_size, config.evaluate.max_length = 2, 2, 12
        save_config(config, tmp_path / "own.yaml")
        assert main(["--config", str(tmp_path / "own.yaml"), "--traceback"]) == 0
        assert len(read(tmp_path / "run" / source.name / "best.json")["history"]) == 2


def test_the_prompt_carries_no_loss(sets, tmp_path):
    model = CaptionTask.build_model(load_config(caption_sets.config(sets, tmp_path))).eval()
    image, captions = torch.randn(2, 3, 32, 32), ["a picture of a red square", "a picture of one circle"]
    ids = model.tokenizer(captions, padding="longest", return_tensors="pt").input_ids
    assert model.prompt_length == len(model.tokenizer("a picture of ").input_ids) - 1
    labels = ids.masked_fill(ids == model.tokenizer.pad_token_id, -100)
    labels[:, : model.prompt_length] = -100
    ids[:, 0] = model.tokenizer.bos_token_id
    with torch.no_grad():
        loss = model({"image": image, "caption": captions}, alpha=0.0)["loss"]
        scores = model.text_decoder(
            ids,
            attention_mask=ids != model.tokenizer.pad_token_id,
            encoder_hidden_states=model.visual_encoder(image),
        ).logits
    expected = torch.nn.functional.cross_entropy(
        scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_references_are_the_raw_captions_not_the_cleaned_ones(sets, tmp_path):
    view = open_view(load_config(caption_sets.config(sets, tmp_path)), "test")
    assert view.references[16] == ["A red square on a white table.", "There's a red square"]


def test_nocaps_gives_a_submission_for_the_server_and_scores_by_domain_where_captions_are_known(
    run, sets, tmp_path
):
    settings = [
        "data.format=nocaps",
        f"data.val={sets / 'annotations' / 'nocaps_val_captions.json'}",
        f"data.image_root={sets / 'nocaps'}",
        "evaluate.repetition_penalty=1.1",
    ]
    config = load_config(run / "config.yaml", settings)
    assert evaluate_checkpoint(CaptionTask, config, run, "test", tmp_path / "test", CPU) == {"images": 5}
    assert [sorted(row) for row in read(tmp_path / "test" / "test.json")] == [["caption", "image_id"]] * 5
    metrics = evaluate_checkpoint(CaptionTask, config, run, "val", tmp_path / "val", CPU)
    rows = {row["image_id"]: row["caption"] for row in read(tmp_path / "val" / "val.json")}
    assert list(rows) == list(range(5))
    truth = {i: open_view(config, "val").references[i] for i in (0, 3)}
    near = caption_metrics({i: rows[i] for i in truth}, truth)
    assert {f"in_{name}": value for name, value in near.items()}.items() <= metrics.items()
    assert {"near_CIDEr", "out_CIDEr", "CIDEr"} <= metrics.keys()


def test_the_repetition_penalty_and_the_lengths_of_the_config_reach_the_search(run, tmp_path, monkeypatch):
    seen = {}
    generate = CaptionTask.build_model(load_config(run / "config.yaml")).__class__.generate_stream
    monkeypatch.setattr(
        "blipfast.tasks.caption.CaptionModel.generate_stream",
        lambda self, batches, **settings: seen.update(settings) or generate(self, batches, **settings),
    )
    settings = ["evaluate.repetition_penalty=1.1", "evaluate.max_length=9", "evaluate.num_beams=4"]
    config = load_config(run / "config.yaml", settings)
    evaluate_checkpoint(CaptionTask, config, run, "test", tmp_path, CPU)
    assert seen == {"num_beams": 4, "max_length": 9, "min_length": 5, "repetition_penalty": 1.1}


def test_ones_own_jsonl_and_folder_serve_as_test_sets_and_results_name_the_pictures(run, tmp_path):
    for name, (colour, shape) in {
        "b": ("red", "circle"),
        "a": ("blue", "square"),
        "c": ("green", "circle"),
    }.items():
        caption_sets.draw(tmp_path / "own" / f"{name}.png", colour, shape)
        (tmp_path / "own" / f"{name}.txt").write_text(f"a {colour} {shape}")
    lines = [json.dumps({"image": f"own/{name}.png", "caption": [f"a {name}", "a circle"]}) for name in "bc"]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    for source, names in ((tmp_path / "own", "abc"), (tmp_path / "own.jsonl", "bc")):
        config = load_config(
            run / "config.yaml", ["data.format=auto", "data.image_root=", f"data.test={source}"]
        )
        metrics = evaluate_checkpoint(CaptionTask, config, run, "test", tmp_path / "out", CPU)
        rows = read(tmp_path / "out" / "test.json")
        assert [row["image"][-5:] for row in rows] == [f"{name}.png" for name in names]
        assert metrics["images"] == len(names) and 0 < metrics["Bleu_1"] <= 1


def test_a_picture_that_cannot_be_read_is_named_and_counts_as_a_miss(run, sets, tmp_path, caplog):
    caption_sets.nocaps(tmp_path)
    broken = tmp_path / "nocaps" / "test" / f"{1:016x}.jpg"
    broken.write_bytes(b"no picture")
    settings = [
        "data.format=nocaps",
        f"data.test={tmp_path / 'annotations'}",
        f"data.image_root={tmp_path / 'nocaps'}",
    ]
    config = load_config(run / "config.yaml", settings)
    assert evaluate_checkpoint(CaptionTask, config, run, "test", tmp_path / "out", CPU)["images"] == 5
    assert str(broken) in caplog.text


@pytest.mark.parametrize(
    "entries, message",
    [
        ([{"image": "val/0.jpg"}], 'nocaps_val.json:1: "img_id" is missing'),
        ([{"image": "val/0.jpg", "img_id": 0}, {"img_id": 1}], 'nocaps_val.json:1: "image" is missing'),
        ([{"image": "val/0.jpg", "img_id": 0}, {"image": "val/1.jpg", "img_id": 0}], "comes twice"),
        ([{"image": "val/0.jpg", "img_id": 0}], "none of 1 pictures looked up exists"),
        ([], "there are no pictures"),
        ({"images": [{"id": 3}]}, "KeyError 'file_name'"),
        (
            {"images": [{"id": 3, "file_name": "a"}, {"id": 4, "file_name": "b"}],
             "annotations": [{"image_id": 3, "caption": "x"}]},
            "the picture number 4 has no caption",
        ),
    ],
)  # fmt: skip
def test_a_malformed_nocaps_file_is_named_with_what_is_wrong(sets, tmp_path, entries, message):
    caption_sets.write(tmp_path / "nocaps_val.json", entries)
    settings = ["data.format=nocaps", f"data.val={tmp_path}", "data.image_root="]
    config = load_config(caption_sets.config(sets, tmp_path), settings)
    with pytest.raises((ValueError, FileNotFoundError), match="nocaps_val.json") as caught:
        open_view(config, "val")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["data.test=nothing.jsonl", "data.val="], "nothing.jsonl"),
        (["train.select=CIDER"], "'CIDER' is not a figure of this evaluation"),
        (["train.patience=2", "data.val="], "train.patience needs data.val"),
        (
            ["train.patience=2", "train.evaluate_every=0"],
            "train.patience needs data.val and train.evaluate_every",
        ),
        (["model.init_from=nothing.pth"], "nothing.pth"),
        (["evaluate.max_length=900"], "max_length 900 exceeds the model's"),
        (["evaluate.max_length=2", "evaluate.min_length=1"], "leaves no room after a prompt"),
        (["evaluate.num_beams=100000"], "num_beams must be between 1 and half"),
    ],
)
def test_a_mistake_is_one_message(sets, tmp_path, settings, message, capsys):
    config = caption_sets.config(sets, tmp_path / "run")
    assert main(["--config", str(config), "--set", "train.max_steps=1", *settings]) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_weights_of_another_model_are_refused_unless_told(sets, run, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    state = {k: v for k, v in load_file(run / "model.safetensors").items() if k.startswith("visual_encoder.")}
    save_file(state, tmp_path / "vit.safetensors")
    config = caption_sets.config(sets, tmp_path / "run")
    start = [
        "--config",
        str(config),
        "--set",
        "train.max_steps=1",
        f"model.init_from={tmp_path / 'vit.safetensors'}",
    ]
    assert main(start) == 1
    assert "vit.safetensors" in capsys.readouterr().err
    assert main([*start, "model.allow_random=[text_decoder]"]) == 0
