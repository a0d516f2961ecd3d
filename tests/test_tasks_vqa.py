"""VQA from the official files to the official result file; every question once, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from blipfast.config import load_config, save_config, to_dict
from blipfast.data.loader import TrainLoader
from blipfast.data.transforms import eval_transform, train_transform
from blipfast.data.vqa import VQADataset, common_answers, read_answers
from blipfast.models import gather
from blipfast.models.blip import BLIP_Decoder
from blipfast.models.blip_pretrain import BLIP_Pretrain
from blipfast.models.blip_vqa import BLIP_VQA
from blipfast.models.checkpoint import read_state_dict, save_weights
from blipfast.tasks.vqa import VQAModel, VQATask, question_batches
from blipfast.text import load_tokenizer, train_tokenizer
from blipfast.train import main
from tests import small_tasks
from tests.ranks import on_ranks
from tests.small_tasks import COLOURS, changed, evaluate, evaluate_splits, random_weights

CONFIGS = Path(__file__).parent.parent / "configs"
ANSWERS = ["yes", "no", *COLOURS, "light blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """VQA v2 and Visual Genome in official BLIP's schema: five pictures of one colour, two of them Visual Genome's."""
    folder = tmp_path_factory.mktemp("vqa")
    for name in ("train2014", "test2015", "genome"):
        (folder / name).mkdir()
    for i, colour in enumerate(COLOURS):
        for place in (f"train2014/{i}.jpg", f"test2015/{i}.jpg", f"genome/{i}.jpg"):
            Image.new("RGB", (40, 30), colour).save(folder / place)
    train, test = [], []
    for i, colour in enumerate(COLOURS):
        image = {"image": f"train2014/{i}.jpg", "dataset": "vqa"}
        answers = [colour] * 6 + ["light blue"] * 3 + ["no"]
        train.append({"question_id": 10 * i, "question": "What color is this?", "answer": answers, **image})
        train.append({"question_id": 10 * i + 1, "question": "Is it (red)?", "answer": ["yes"] * 10, **image})
        test += [
            {
                "question_id": 100 + 7 * i + k,
                "question": question,
                "image": f"test2015/{i}.jpg",
                "dataset": "vqa",
            }
            for k, question in enumerate(
                ["What color?", "Is it red?", "Is this a picture of something?"][: 1 + i % 3]
            )
        ]
    genome = [
        {"question": "What color?", "answer": colour, "image": f"{i}.jpg", "dataset": "vg"}
        for i, colour in enumerate(COLOURS[:2])
    ]
    for name, entries in {
        "vqa_train": train,
        "vqa_val": train[:7],
        "vg_qa": genome,
        "vqa_test": test,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(entries, indent=1))
    (folder / "answer_list.json").write_text(json.dumps(ANSWERS))
    train_tokenizer([*ANSWERS, *(entry["question"] for entry in train)], 300).save(folder / "tokenizer.json")
    return folder


def settings(folder, output, **changes):
    """A config of a tiny model on the fixture; changes like data_test="..."."""
    data = {
        "train": [str(folder / "vqa_train.json"), str(folder / "vg_qa.json")],
        "vg_root": str(folder / "genome"),
        "val": str(folder / "vqa_val.json"),
        "test": str(folder / "vqa_test.json"),
        "answers": str(folder / "answer_list.json"),
        "max_words": 50,
    }
    return small_tasks.settings("vqa", folder, output, data, **changes)


@pytest.fixture(scope="module")
def weights(folder, tmp_path_factory):
    """They tell pictures and questions apart."""
    path = tmp_path_factory.mktemp("weights") / "vqa.safetensors"
    return random_weights(settings(folder, "unused"), path, seed=0, spread=0.1)


def result(output):
    return json.loads((Path(output) / "vqa_result.json").read_text())


def test_questions_come_with_their_distinct_answers_and_shares(folder):
    questions = VQADataset(
        [str(folder / "vqa_train.json"), str(folder / "vg_qa.json")], vg_root=str(folder / "genome")
    )
    assert len(questions) == 12 and questions.pictures == 7
    first = questions[0]
    assert first["question"] == "what color is this?" and first["image"].shape == (3, 30, 40)
    assert dict(zip(first["answers"], first["weights"])) == pytest.approx(
        {"red": 0.6, "light blue": 0.3, "no": 0.1}
    )
    assert questions.annotation(1) == {"question": "is it red?", "answers": ["yes"], "weights": [1.0]}
    assert questions.annotation(10) == {"question": "what color?", "answers": ["red"], "weights": [0.2]}
    # Visual Genome's have no id: their place
    assert [questions.question_id(i) for i in (0, 3, 11)] == [0, 11, 11]
    assert VQADataset(str(folder / "vqa_test.json"), split="test").answers(0) == []


def test_a_batch_lists_all_answers_with_the_number_of_each_question(folder):
    dataset = VQADataset(str(folder / "vqa_train.json"))
    for cache in (False, True):
        loader = TrainLoader(dataset, train_transform(32), 4, seed=1, cache_images=cache)
        batch = next(iter(loader.iterate(0)))
        assert batch["image"].shape == (4, 3, 32, 32) and len(batch["question"]) == len(batch["n"]) == 4
        assert sum(batch["n"]) == len(batch["answers"]) == len(batch["weights"])
        assert batch["weights"].sum().item() == pytest.approx(4)
        asked = [dataset.annotation(i) for i in batch["index"].tolist()]
        assert batch["question"] == [sample["question"] for sample in asked]
        assert batch["answers"] == [answer for sample in asked for answer in sample["answers"]]


def test_the_loss_weighs_every_answer_and_divides_by_the_questions(folder, weights):
    config = settings(folder, "unused")
    model = VQATask.load_model(config, weights, torch.device("cpu"))
    batch = {
        "image": torch.randn(2, 3, 32, 32),
        "question": ["what color?", "is it red?"],
        "answers": ["red", "light blue", "yes"],
        "weights": torch.tensor([0.7, 0.3, 1.0]),
        "n": [2, 1],
    }
    alone = []
    for question, answer in ((0, "red"), (0, "light blue"), (1, "yes")):
        image, text = batch["image"][question : question + 1], [batch["question"][question]]
        alone.append(BLIP_VQA.forward(model, image, text, [answer], n=[1], weights=torch.ones(1)))
    want = (0.7 * alone[0] + 0.3 * alone[1] + alone[2]) / 2
    assert model(batch, alpha=0.0)["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_training_ends_with_the_official_result_file_and_the_best_weights_figures(folder, tmp_path, capsys):
    config = settings(folder, tmp_path / "run", train_evaluate_every=1, train_epochs=2)
    save_config(config, tmp_path / "vqa.yaml")
    assert main(["--config", str(tmp_path / "vqa.yaml"), "--traceback"]) == 0
    run = tmp_path / "run"
    asked = {entry["question_id"] for entry in json.loads((folder / "vqa_test.json").read_text())}
    answered = result(run / "result" / "test")
    assert {row["question_id"] for row in answered} == asked and len(answered) == len(asked)
    assert all(row.keys() == {"question_id", "answer"} and row["answer"] in ANSWERS for row in answered)
    validated = result(run / "result" / "val_epoch_01")
    assert [row["question_id"] for row in validated] == [0, 1, 10, 11, 20, 21, 30]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"] == {"questions": 9} and 0 <= metrics["val"]["accuracy"] <= 100
    assert metrics["val"]["answerable"] == 100
    assert (run / "model.safetensors").stat().st_size > 0 and "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("inference", ["rank", "generate"])
def test_answers_do_not_depend_on_the_batch_and_are_those_of_one_question_at_a_time(
    folder, weights, tmp_path, inference
):
    config = settings(folder, "unused", evaluate_inference=inference)
    results = []
    for size in (1, 4, 50):
        config.evaluate.batch_size = size
        evaluate(config, weights, tmp_path)
        results.append(result(tmp_path))
    assert results[0] == results[1] == results[2]
    model = VQATask.load_model(config, weights, torch.device("cpu"))
    questions = VQADataset(str(folder / "vqa_test.json"), split="test")
    for i in range(len(questions)):
        image = eval_transform(32)(questions[i]["image"])[None]
        alone = BLIP_VQA.forward(
            model, image, [questions.question(i)], ANSWERS, train=False, inference=inference, k_test=5
        )
        alone = alone if inference == "generate" else [ANSWERS[alone]]
        assert {"question_id": questions.question_id(i), "answer": alone[0]} == results[0][i]
    assert len({row["answer"] for row in results[0]}) > 1  # or the comparison shows nothing


def test_two_ranks_give_the_figures_and_files_of_one(folder, weights, tmp_path):
    values = to_dict(settings(folder, "unused"))
    alone = evaluate_splits(values, weights, tmp_path / "one")
    both = on_ranks(2, evaluate_splits, values, weights, str(tmp_path / "two"))
    assert both[0] == both[1] == alone and alone[0]["questions"] == 9
    for split in ("test", "val"):
        assert result(tmp_path / "two" / split) == result(tmp_path / "one" / split)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_question_is_on_one_rank_beside_its_picture_also_with_more_ranks_than_pictures(
    folder, ranks, monkeypatch
):
    config = settings(folder, "unused")
    questions = VQADataset(str(folder / "vqa_test.json"), split="test")
    seen = []
    monkeypatch.setattr(gather, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(gather, "rank", lambda rank=rank: rank)
        for numbers, pictures, image_of in question_batches(config, questions):
            seen += numbers
            assert len(image_of) == len(numbers) and len(pictures) == max(image_of) + 1
            for number, place in zip(numbers, image_of):
                assert torch.equal(pictures[place], eval_transform(32)(questions[number]["image"]))
    assert sorted(seen) == list(range(len(questions)))


def test_the_large_models_config_allows_what_pre_training_cannot_give_and_nothing_else(folder, tmp_path):
    config = settings(folder, tmp_path)
    model = config.model
    pretrained = BLIP_Pretrain(
        med_config=model.med_config,
        image_size=32,
        vit=model.vit,
        queue_size=8,
        tokenizer=load_tokenizer(model.tokenizer),
    )  # its pictures are 32 wide, its texts 48: as with ViT-L, the decoder's keys and values do not fit
    model.init_from = str(save_weights(pretrained.state_dict(), tmp_path / "pretrained.pth"))
    with pytest.raises(ValueError, match="text_decoder"):
        VQATask(config)
    model.allow_random = load_config(CONFIGS / "vqa_large.yaml").model.allow_random
    state, start = VQATask(config).model.state_dict(), read_state_dict(model.init_from)
    name = "text_decoder.bert.encoder.layer.0.crossattention.self.query.weight"
    assert torch.equal(state[name], start[name])
    del start["text_decoder.cls.predictions.transform.dense.weight"]
    model.init_from = str(save_weights(start, tmp_path / "less.pth"))
    with pytest.raises(ValueError, match="text_decoder"):
        VQATask(config)


def test_without_a_list_the_most_frequent_training_answers_are_ranked_and_kept(folder, tmp_path):
    config = settings(folder, tmp_path / "run", data_answers="")
    task = VQATask(config)
    kept = json.loads((tmp_path / "run" / "answer_list.json").read_text())
    assert kept[0] == "yes" and set(kept) == {"yes", *COLOURS}  # each question counts its commonest answer
    assert task.config.data.answers == str(tmp_path / "run" / "answer_list.json")
    assert common_answers(VQADataset(str(folder / "vqa_train.json")), most=1) == ["yes"]


def test_a_question_asked_twice_is_answered_once_and_a_broken_picture_stops_nothing(
    folder, weights, tmp_path, caplog
):
    entries = json.loads((folder / "vqa_test.json").read_text())
    (folder / "damaged.jpg").write_bytes(b"no picture")
    broken = {"question_id": 999, "question": "what?", "image": "damaged.jpg"}
    (folder / "twice.json").write_text(json.dumps([*entries, entries[0], broken]))
    config = settings(folder, "unused", data_test=str(folder / "twice.json"))
    evaluate(config, weights, tmp_path)
    assert len(result(tmp_path)) == len(entries) + 1
    assert "damaged.jpg" in caplog.text and "repeat a question_id" in caplog.text


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"question": None}, r':4: "question" is missing'),
        ({"answer": None}, r':4: "answer" is missing'),
        ({"answer": ["red", ""]}, r':4: "answer" holds an empty text'),
        ({"answer": 3}, r':4: "answer" should be text'),
        ({"image": ""}, r':4: "image" is empty'),
        ({"dataset": "coco"}, r':4: "dataset" should be "vqa" or "vg"'),
    ],
)
def test_a_malformed_entry_is_named_by_file_line_and_key(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        VQADataset(changed(folder / "vqa_train.json", 2, keys))


def test_what_is_missing_is_named_with_what_to_set(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.vg_root is not set"):
        VQADataset(str(folder / "vg_qa.json"))
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        VQADataset(str(folder / "nothing.json"))
    with pytest.raises(FileNotFoundError, match="data.answers"):
        read_answers(str(folder / "nothing.json"))
    (tmp_path / "answers.json").write_text('{"yes": 0}')
    with pytest.raises(ValueError, match="a JSON list of answers"):
        read_answers(str(tmp_path / "answers.json"))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(folder, weights, tmp_path):
    config = settings(folder, "unused")
    same = dict(med_config=config.model.med_config, vit=config.model.vit, image_size=32)
    captioner = BLIP_Decoder(tokenizer=load_tokenizer(config.model.tokenizer), **same)
    captioner = save_weights(captioner.state_dict(), tmp_path / "caption.pth")
    with pytest.raises(ValueError, match="text_encoder"):
        evaluate(config, captioner, tmp_path / "out")
    short = tmp_path / "short.safetensors"
    short.write_bytes(Path(weights).read_bytes()[:1000])
    with pytest.raises(ValueError, match="short.safetensors"):
        evaluate(config, short, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_reads_the_questions_padding_only_with_the_official_quirks(folder):
    for quirks, compat in ((False, "masked"), (True, "official")):
        model = VQATask.build_model(settings(folder, "unused", evaluate_official_quirks=quirks))
        assert isinstance(model, VQAModel) and model.compat == compat


def test_validation_questions_without_answers_are_refused_before_training(folder, tmp_path):
    questions = json.loads((folder / "vqa_val.json").read_text())
    del questions[0]["answer"]
    (folder / "bare.json").write_text(json.dumps(questions))
    for bare, said in (("bare", "bare.json"), ("vqa_test", "9 of 9 questions have no answer")):
        with pytest.raises(ValueError, match=said):
            VQATask(settings(folder, tmp_path / "run", data_val=str(folder / f"{bare}.json")))
