"""Pre-training end to end: real pairs, the real task, the real launcher, and what a run leaves behind."""

from __future__ import annotations

import json

import pytest

from blipfast import cli
from blipfast.data.emoji import unpack
from blipfast.text import train_tokenizer
from blipfast.train import main
from tests import launch
from tests.launch import TESTS, losses

TRAIN = TESTS.parent / "blipfast" / "train.py"
CONFIG = TESTS / "data" / "pretrain.yaml"
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm", "loss_mlm", "grad_norm", "temperature", "itm_accuracy")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Forty real pairs to train on, twelve to test on, and a tokenizer made from their captions."""
    folder = unpack(tmp_path_factory.mktemp("emoji") / "emoji")
    lines = (folder / "train.jsonl").read_text().splitlines()[::90][:40]
    (folder / "few.jsonl").write_text("\n".join(lines))
    (folder / "few_test.jsonl").write_text("\n".join((folder / "test.jsonl").read_text().splitlines()[:12]))
    train_tokenizer([json.loads(line)["caption"] for line in lines], 300).save(folder / "tokenizer.json")
    return folder


def arguments(emoji, output, *settings, test=False):
    data = [f"data.train=[{emoji / 'few.jsonl'}]", f"model.tokenizer={emoji / 'tokenizer.json'}"]
    if test:
        data.append(f"data.test={emoji / 'few_test.jsonl'}")
    return ["--config", str(CONFIG), "--set", f"output={output}", *data, *settings, "--traceback"]


@pytest.fixture(scope="module")
def whole_run(emoji, tmp_path_factory):
    """One run that was never stopped, on one process without DeepSpeed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, launch.run(TRAIN, *arguments(emoji, output, test=True))


def test_two_ranks_under_zero_1_2_3_follow_the_curve_of_one_rank(emoji, whole_run, tmp_path):
    """The same global batch cut over two ranks instead of two micro-batches; 1e-5 relative on every loss and step.

    Dropout, drop-path, augmentation and hard negatives are functions of (seed, step, micro-batch): they agree too.
    """
    pytest.importorskip("deepspeed")
    commands = [
        arguments(
            emoji,
            tmp_path / f"zero{stage}",
            "train.accumulation=1",
            f"deepspeed.zero_optimization.stage={stage}",
        )
        for stage in (1, 2, 3)
    ]
    together = [part for command in commands for part in (*command, "--then")][:-1]
    launch.run(TESTS / "pretrain_run.py", *together, ranks=2)
    for key in LOSSES:
        expected = losses(whole_run[0], key)
        assert list(expected) == list(range(1, 10))
        for stage in (1, 2, 3):
            assert losses(tmp_path / f"zero{stage}", key) == pytest.approx(expected, rel=1e-5, abs=1e-6), (
                stage,
                key,
            )


def test_after_kill_9_the_losses_are_those_of_a_run_that_was_never_stopped(emoji, whole_run, tmp_path):
    killed = launch.start(TRAIN, *arguments(emoji, tmp_path, "train.max_steps=900", "train.epochs=300"))
    launch.wait_for_step(killed, tmp_path, 6)
    launch.kill(killed)
    launch.finish(killed)
    for later in sorted((tmp_path / "checkpoints").glob("step_*"))[1:]:
        later.rename(later.with_suffix(".away"))  # however far it came: go on from step 4
    printed = launch.run(TRAIN, *arguments(emoji, tmp_path))
    assert "step_0000004" in printed
    for key in LOSSES:
        resumed, expected = losses(tmp_path, key), losses(whole_run[0], key)
        assert {s: resumed[s] for s in range(5, 10)} == {s: expected[s] for s in range(5, 10)}, key


def test_a_run_leaves_weights_figures_gallery_and_curves_that_are_usable_at_once(emoji, whole_run, capsys):
    output, printed = whole_run
    metrics = json.loads((output / "metrics.json").read_text())
    for name in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "itm_accuracy", "itm_prior"):
        assert 0 <= metrics[name] <= 100
    assert metrics["images"] == 12 and metrics["seconds"] > 0 and 0 <= metrics["caption_exact"] <= 100
    assert "<html" in (output / "gallery.html").read_text() and "gallery.html" in printed
    for name in ("model.safetensors", "config.yaml", "tokenizer.json", "curves.png"):
        assert (output / name).stat().st_size > 0
    pictures = [str(path) for path in sorted((emoji / "fluent").glob("*.png"))[:2]]
    assert cli.main(["caption", "--model", str(output), "--json", *pictures]) == 0
    assert [row["path"] for row in json.loads(capsys.readouterr().out)] == pictures
    assert cli.main(["match", "--model", str(output), "--json", pictures[0], "a cat", "a red apple"]) == 0
    assert "a red apple" in capsys.readouterr().out
    assert cli.main(["evaluate", "--checkpoint", str(output), "--output", str(output / "again")]) == 0
    again = json.loads((output / "again" / "metrics.json").read_text())
    assert all(again[name] == metrics[name] for name in ("txt_r10", "img_r_mean", "caption_exact"))
    exported = output / "weights.pth"
    assert cli.main(["convert", str(output), "--to", "official", "--output", str(exported)]) == 0
    assert exported.stat().st_size > 0


def test_a_run_in_bf16_is_evaluated_in_fp32(emoji, tmp_path):
    settings = ("train.precision=bf16", "train.max_steps=2", "train.accumulation=1")
    assert main(arguments(emoji, tmp_path, *settings, test=True)) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 12


@pytest.mark.parametrize(
    "settings, message",
    [
        (["train.batch_sise=3"], "Did you mean train.batch_size?"),
        (["data.train=[nothing.jsonl]"], "nothing.jsonl"),
        (["train.batch_size=64"], "More ranks than data"),
        (["model.init_from=nothing.pth"], "nothing.pth: no such checkpoint"),
        (["model.image_size=33"], "multiple of the patch size"),
    ],
)
def test_a_mistake_is_one_message_before_any_training(emoji, tmp_path, settings, message, capsys):
    assert main(arguments(emoji, tmp_path / "run", *settings)[:-1]) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed and printed.count("error:") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
