"""Retrieval from official annotation files: training, scores by the published protocol, clips, ranks, bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from blipfast.config import load_config
from blipfast.data.transforms import eval_transform
from blipfast.data.video import VideoView, find_clip, read_frames, uniform
from blipfast.metrics import ranks
from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.checkpoint import save_weights
from blipfast.tasks import build
from blipfast.tasks.finetune import evaluate_checkpoint
from blipfast.tasks.retrieval import RetrievalTask, open_view, score
from blipfast.train import main
from tests import caption_sets
from tests.launch import TESTS, records
from tests.ranks import on_ranks

CPU = torch.device("cpu")
CONFIG = TESTS / "data" / "retrieval.yaml"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return caption_sets.coco(tmp_path_factory.mktemp("sets"))


def settings(sets, output, *more):
    annotations = sets / "annotations"
    data = [f"data.train=[{annotations}]", f"data.val={annotations}", f"data.test={annotations}"]
    data += [f"data.image_root={sets / 'images'}", f"model.tokenizer={sets / 'tokenizer.json'}"]
    return [f"output={output}", *data, *more]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A model that has learnt which text goes with which picture."""
    output = tmp_path_factory.mktemp("runs") / "retrieval"
    set_ = settings(sets, output, "train.epochs=30", "train.evaluate_every=15", "evaluate.k_test=7")
    assert main(["--config", str(CONFIG), "--set", *set_, "--traceback"]) == 0
    return output


def test_training_learns_and_leaves_figures_results_and_weights_for_the_official_factory(run, sets):
    metrics = read(run / "metrics.json")["test"]
    names = "txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean".split()
    assert list(metrics)[:9] == names
    assert metrics["txt_r1"] > 40 and metrics["img_r1"] > 40, metrics  # chance is 14
    rows = read(run / "result" / "test" / "retrieval.json")
    assert len(rows["image_to_text"]) == 7 and len(rows["text_to_image"]) == 14
    first = rows["text_to_image"][0]
    assert first["query"] == "a red square on a white table" and len(first["found"]) == 7
    truth = next(place for place, (name, _) in enumerate(first["found"]) if name.endswith("000000000016.jpg"))
    assert first["rank"] == truth + 1
    assert "<html" in (run / "result" / "test" / "gallery.html").read_text()
    evaluations = [record for record in records(run) if record.get("event") == "evaluate"]
    assert [record["selected"] for record in evaluations] == [record["r_mean"] for record in evaluations]
    config = load_config(run / "config.yaml")
    official = blip_retrieval(
        str(run / "model.safetensors"),
        vit=config.model.vit,
        image_size=32,
        med_config=config.model.med_config,
        embed_dim=16,
        queue_size=8,
        tokenizer=RetrievalTask.build_model(config).tokenizer,
    )
    assert {"idx_queue", "ptr_queue", "temp", "text_encoder_m.embeddings.word_embeddings.weight"} <= set(
        official.state_dict()
    )


@pytest.fixture(scope="module")
def config(sets, tmp_path_factory):
    """The config of a model that is not trained, and its weights, whose scores have no ties."""
    config = load_config(CONFIG, settings(sets, tmp_path_factory.mktemp("untrained")))
    torch.manual_seed(0)
    model = RetrievalTask.build_model(config)
    return config, save_weights(model.state_dict(), tmp_path_factory.mktemp("weights") / "model.safetensors")


def every_score(config, weights):
    """ITM logits and cosines of all pairs, one at a time, by the public forward of BLIP_ITM."""
    model, view = RetrievalTask.load_model(config, weights, CPU), open_view(config, "test")
    itm, itc = torch.zeros(len(view), len(view.text)), torch.zeros(len(view), len(view.text))
    with torch.no_grad():
        for i in range(len(view)):
            for t, text in enumerate(view.text):
                itm[i, t] = model(view[i][0][None], [text], "itm")[0, 1]
                itc[i, t] = model(view[i][0][None], [text], "itc")
    return view, itm, itc


def test_evaluation_is_done_in_the_precision_asked_for(config, tmp_path, monkeypatch):
    config, weights = config
    config = replace(config, evaluate=replace(config.evaluate, precision="bf16"))
    seen = []
    match = BLIP_ITM.match

    def watched(self, images, *rest):
        seen.append(images.layers[0][0].dtype)
        return match(self, images, *rest)

    monkeypatch.setattr(BLIP_ITM, "match", watched)
    assert "r_mean" in RetrievalTask.evaluate_checkpoint(config, weights, "test", tmp_path, CPU)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("k", [1, 4, 1000])
def test_figures_equal_a_count_over_pairs_scored_one_by_one(config, tmp_path, k):
    """Also with k above the number of pictures (7) and texts (14), where official BLIP fails."""
    config, weights = config
    config.evaluate.k_test = k
    metrics = evaluate_checkpoint(RetrievalTask, config, weights, "test", tmp_path, CPU)
    view, itm, itc = every_score(config, weights)
    texts_found, images_found = [], []
    for i in range(len(view)):
        kept = itc[i].argsort(descending=True)[:k].tolist()
        order = sorted(kept, key=lambda t: -float(itm[i, t] + itc[i, t]))
        texts_found.append(min((order.index(t) for t in view.img2txt[i] if t in order), default=13))
    for t in range(len(view.text)):
        kept = itc[:, t].argsort(descending=True)[:k].tolist()
        order = sorted(kept, key=lambda i: -float(itm[i, t] + itc[i, t]))
        images_found.append(order.index(view.txt2img[t]) if view.txt2img[t] in order else 6)
    for name, found in (("txt", texts_found), ("img", images_found)):
        for n in (1, 5, 10):
            expected = 100 * sum(place < n for place in found) / len(found)
            assert metrics[f"{name}_r{n}"] == pytest.approx(expected), (name, n)
    assert read(tmp_path / "metrics.json")["split"] == "test"


@pytest.mark.parametrize("rule", ["itm+itc", "itm", "itc"])
def test_the_score_can_be_each_part_of_the_official_one(config, rule):
    config, weights = config
    config.evaluate.k_test, config.evaluate.score = 1000, rule
    view, itm, itc = every_score(config, weights)
    with torch.no_grad():
        scores = score(RetrievalTask.load_model(config, weights, CPU), view, config, CPU)
    config.evaluate.score = "itm+itc"
    expected = {"itm+itc": itm + itc, "itm": itm, "itc": itc}[rule]
    torch.testing.assert_close(scores.i2t, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.t2i, expected.t(), rtol=1e-4, atol=1e-5)


def evaluated(runs, weights, output):
    """The figures of several evaluations, {name: overrides of the config}."""
    return {
        name: evaluate_checkpoint(
            RetrievalTask, load_config(CONFIG, overrides), weights, "test", output / name, CPU
        )
        for name, overrides in runs.items()
    }


def test_two_ranks_give_the_figures_and_results_of_one(sets, config, clips, tmp_path):
    """7 pictures, 5 clips, and 1 clip for two ranks."""
    folder = clips[1].removeprefix("data.test=")
    single = tmp_path / "single.jsonl"
    single.write_text('{"clip_name": "video2", "caption": "blue"}')
    runs = {
        "pictures": [],
        "clips": clips,
        "one clip": [*clips, f"data.test={single}", f"data.image_root={folder}"],
    }
    runs = {name: settings(sets, tmp_path, "evaluate.k_test=3", *more) for name, more in runs.items()}
    alone = evaluated(runs, config[1], tmp_path / "one")
    for figures in on_ranks(2, evaluated, runs, config[1], tmp_path / "two"):
        assert figures == alone
    for name in runs:
        one, two = (read(tmp_path / ranks / name / "retrieval.json") for ranks in ("one", "two"))
        for direction in ("image_to_text", "text_to_image"):
            for row, other in zip(one[direction], two[direction], strict=True):
                assert (row["query"], row["rank"]) == (other["query"], other["rank"])
                found, others = (dict(map(tuple, r["found"])) for r in (row, other))
                assert found.keys() == others.keys() and found == pytest.approx(others, rel=1e-4, abs=1e-5)


def test_ranks_of_the_truth_are_exact_on_ties():
    """Against a count: a wrong entry with the same score stands before the truth, whatever the order of sorting."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 30), generator=generator).float()
    truths = [torch.randperm(30, generator=generator)[: 1 + i % 3].tolist() for i in range(50)]
    for row, truth, rank in zip(scores.tolist(), truths, ranks(scores, truths).tolist()):
        best = max(row[t] for t in truth)
        assert rank == sum(s > best for s in row) + sum(s == best for s in row) - 1


def test_a_run_starts_from_a_matcher_with_copied_momentum_and_an_empty_queue(sets, config, tmp_path):
    model = RetrievalTask.load_model(*config, CPU)
    source = save_weights(model.state_dict(), tmp_path / "itm.safetensors")
    task = build(load_config(CONFIG, settings(sets, tmp_path, f"model.init_from={source}")))
    for online, momentum in task.model.momentum_pairs():
        assert torch.equal(online, momentum) and not momentum.requires_grad
    assert torch.equal(task.model.visual_encoder.cls_token, model.visual_encoder.cls_token)
    whole = load_file(config[1]) | {"idx_queue": torch.arange(8)[None], "ptr_queue": torch.tensor([5])}
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, tmp_path / "other.safetensors")
    source = f"model.init_from={tmp_path / 'other.safetensors'}"
    task = build(load_config(CONFIG, settings(sets, tmp_path, source)))
    assert (task.model.idx_queue == -100).all() and task.model.ptr_queue == 0


# ---- clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Overrides for five clips in MSR-VTT's schema, folders of 3 to 11 frames; one clip has two captions."""
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for clip, length in enumerate((3, 4, 8, 9, 11)):
        (folder / f"video{clip}").mkdir()
        for frame in range(length):
            pixels = torch.randint(0, 256, (10, 12, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"video{clip}" / f"frame_{frame}.png")
    lines = [
        {"clip_name": f"video{i % 5}", "caption": text}
        for i, text in enumerate(["red", "a circle", "blue", "on", "there", "yellow"])
    ]
    (folder / "msrvtt_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["data.format=msrvtt", f"data.test={folder}", f"data.image_root={folder}", "evaluate.frames=4"]


def test_frames_are_those_of_the_official_sampling(clips, tmp_path):
    assert uniform(100, 8) == [0, 12, 24, 36, 48, 60, 72, 84]  # official: the stride is cut to 12
    assert uniform(8, 8) == list(range(8)) and uniform(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    for i in range(12):
        Image.new("RGB", (4, 4), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    assert [int(frame[0, 0, 0]) for frame in read_frames(tmp_path, 4)] == [0, 60, 120, 180]  # 9 before 10
    (tmp_path / "video1.mp4").touch()
    assert find_clip(tmp_path, "video1") == tmp_path / "video1.mp4" and find_clip(tmp_path, "video2") is None


def test_clips_are_scored_by_the_mean_of_their_frames_and_matched_on_all_their_tokens(
    sets, config, clips, tmp_path
):
    setup = load_config(CONFIG, settings(sets, tmp_path, *clips, "evaluate.k_test=100"))
    model = BLIP_ITM(
        vit=setup.model.vit, image_size=32, med_config=setup.model.med_config, embed_dim=16,
        tokenizer=RetrievalTask.build_model(setup).tokenizer,
    )  # fmt: skip
    model.load_state_dict({k: v for k, v in load_file(config[1]).items() if k in model.state_dict()})
    model.eval()
    view = open_view(setup, "test")
    assert isinstance(view, VideoView) and len(view) == 5 and len(view.text) == 6
    assert view.img2txt[0] == [0, 5] and view[2][0].shape == (4, 3, 32, 32)
    expected, itc = torch.zeros(5, 6), torch.zeros(5, 6)
    with torch.no_grad():
        texts = model.encode_text(view.text)
        for v in range(5):
            frames = model.visual_encoder(view[v][0])  # [4, N, D]
            feature = F.normalize(model.vision_proj(frames[:, 0]).mean(0), dim=0)
            itc[v] = model.text_features(texts) @ feature
            states = model.image_states(frames.flatten(0, 1)[None])
            itm = model.match(states, texts, [0] * len(texts))
            expected[v] = itm[:, 1] + itc[v]
        found = score(RetrievalTask.load_model(setup, config[1], CPU), view, setup, CPU)
    torch.testing.assert_close(found.similarity, itc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.i2t, expected, rtol=1e-4, atol=1e-5)
    metrics = evaluate_checkpoint(RetrievalTask, setup, config[1], "test", tmp_path, CPU)
    assert {"vid_r1", "vid_r5", "vid_r10", "vid_r_mean", "vid_mdR", "txt_r1", "r_mean"} <= metrics.keys()
    places = [
        1 + sum(s >= row[t] for s in row) - 1
        for row, t in zip(expected.t(), [view.txt2img[t] for t in range(6)])
    ]
    assert metrics["vid_mdR"] == float(torch.tensor(places).double().quantile(0.5))


def test_a_clip_that_cannot_be_read_is_named_and_counts_as_grey(clips, tmp_path, caplog):
    folder = tmp_path / "clips"
    shutil.copytree(clips[1].removeprefix("data.test="), folder)
    (folder / "video1" / "frame_0.png").write_bytes(b"no picture")
    shutil.rmtree(folder / "video3")
    view = VideoView(str(folder), "", eval_transform(32), frames=4)
    assert (view[1][0] == view[1][0][0, :, :1, :1]).all() and (view[3][0][0] == view[1][0][0]).all()
    assert "video1" in caplog.text and "video3: there is no such clip" in caplog.text


def test_videos_need_a_reader_and_the_message_says_which(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"video")
    monkeypatch.setattr("blipfast.data.video.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'blipfast\[video\]'.*folder of frames"):
        read_frames(tmp_path / "a.mp4", 2)


def test_frames_of_a_video_file_are_those_of_its_numbers(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for i in range(60):
            frame = torch.full((48, 64, 3), 4 * i, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    shades = [float(frame.float().mean()) / 4 for frame in read_frames(tmp_path / "a.mp4", 8)]
    assert shades == pytest.approx(uniform(60, 8), abs=1.5)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.mp4: the video cannot be read"):
        read_frames(tmp_path / "cut.mp4", 8)


# ---- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (["data.format=msrvtt"], "MSR-VTT is retrieved zero-shot"),
        (["data.val=nothing.json"], "nothing.json"),
        (["model.init_from=nothing.pth"], "nothing.pth"),
        (["data.image_root="], "none of"),
    ],
)
def test_a_mistake_is_one_message_before_any_training(sets, clips, tmp_path, change, message, capsys):
    more = [*(clips if change[0].endswith("msrvtt") else []), "data.val=", *change]
    more = more if change[0].startswith(("data.format", "data.val")) else change
    assert main(["--config", str(CONFIG), "--set", *settings(sets, tmp_path / "run", *more)]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("error:") == 1 and "Traceback" not in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_written(sets, config, tmp_path):
    config, weights = config
    state = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("itm_head")}
    save_file(state, tmp_path / "headless.safetensors")
    with pytest.raises(ValueError, match="headless.safetensors.*itm_head"):
        evaluate_checkpoint(
            RetrievalTask, config, tmp_path / "headless.safetensors", "test", tmp_path / "out", CPU
        )
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.safetensors"):
        evaluate_checkpoint(
            RetrievalTask, config, tmp_path / "cut.safetensors", "test", tmp_path / "out", CPU
        )
    assert not (tmp_path / "out").exists()
