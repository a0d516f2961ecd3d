"""`blipfast evaluate`: figures and files of a checkpoint, the same on one process and on two, odd sizes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from blipfast import cli
from blipfast.config import load_config, save_config
from blipfast.models.checkpoint import save_weights
from blipfast.tasks.caption import CaptionTask
from blipfast.text import load_tokenizer
from tests import caption_sets
from tests.launch import TESTS, free_port


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with random weights, and sets of 7 (COCO) and 5 (NoCaps) pictures to evaluate on."""
    folder = caption_sets.nocaps(caption_sets.coco(tmp_path_factory.mktemp("sets")))
    output = folder / "run"
    config = load_config(caption_sets.config(folder, output))
    torch.manual_seed(0)
    save_weights(CaptionTask.build_model(config).state_dict(), output / "model.safetensors")
    save_config(config, output / "config.yaml")
    load_tokenizer(config.model.tokenizer).save(output / "tokenizer.json")
    return output


def evaluate(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def evaluate_on_two_ranks(*arguments):
    """The same command under torchrun, with gloo between the ranks."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, *launcher, "-m", "blipfast", "evaluate", *map(str, arguments)]
    environment = {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )


def read(path):
    return json.loads(path.read_text())


def figures(output):
    metrics = read(output / "metrics.json")
    metrics.pop("seconds")
    return metrics


def test_a_run_folder_is_evaluated_by_its_own_config(run, tmp_path, capsys):
    assert evaluate("--checkpoint", run, "--split", "val", "--output", tmp_path) == 0
    printed = capsys.readouterr()
    metrics = figures(tmp_path)
    assert metrics["split"] == "val" and metrics["task"] == "caption" and metrics["images"] == 7
    assert "CIDEr" in printed.out and str(tmp_path) in printed.err
    assert [row["image_id"] for row in read(tmp_path / "val.json")] == list(range(9, 16))


def test_a_weights_file_is_evaluated_by_a_config_into_a_folder_named_after_both(run, capsys):
    weights = run / "epoch_3.safetensors"
    weights.write_bytes((run / "model.safetensors").read_bytes())
    assert (
        evaluate("--config", run / "config.yaml", "--checkpoint", weights, "--set", "evaluate.num_beams=1")
        == 0
    )
    assert figures(run / "evaluate" / "epoch_3_test")["images"] == 7


def test_two_ranks_give_the_figures_and_files_of_one_with_odd_numbers_of_pictures(run, tmp_path):
    """7 pictures in one run of two ranks (4 + 3), 5 of NoCaps in another; every picture exactly once."""
    nocaps = [
        "data.format=nocaps",
        f"data.val={run.parent / 'annotations' / 'nocaps_val_captions.json'}",
        f"data.image_root={run.parent / 'nocaps'}",
    ]
    for name, options in {"coco": [], "nocaps": ["--set", *nocaps]}.items():
        arguments = ["--checkpoint", run, "--split", "val", "--output"]
        assert evaluate(*arguments, tmp_path / "one", *options) == 0
        done = evaluate_on_two_ranks(*arguments, tmp_path / "two", *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("CIDEr ") >= 1 and done.stdout.count("Bleu_1 ") == (
            4 if name == "nocaps" else 1
        )
        assert figures(tmp_path / "two") == figures(tmp_path / "one")
        assert read(tmp_path / "two" / "val.json") == read(tmp_path / "one" / "val.json")
        assert len({row["caption"] for row in read(tmp_path / "one" / "val.json")}) > 2, (
            "an order to get wrong"
        )
        assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--checkpoint", "nothing.pth"], "--config is missing"),
        (["--config", "{run}/config.yaml", "--checkpoint", "nothing.pth"], "nothing.pth"),
        (["--checkpoint", "{run}", "--set", "data.test="], "data.test is empty"),
        (["--checkpoint", "{run}", "--set", "task=json:JSONDecoder"], "has no evaluation of its own"),
        (["--checkpoint", "{run}", "--set", "model.image_size=33"], "model.image_size 33"),
        (["--checkpoint", "{run}", "--set", "model.vit={width: 64, depth: 2, heads: 4}"], "in the model"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_leaves_no_results(run, tmp_path, options, message, capsys):
    options = [option.format(run=run) if "{run}" in option else option for option in options]
    assert evaluate(*options, "--output", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not (tmp_path / "out").exists() and not printed.out


def test_a_truncated_checkpoint_is_named(run, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((run / "model.safetensors").read_bytes()[:5000])
    assert (
        evaluate("--config", run / "config.yaml", "--checkpoint", broken, "--output", tmp_path / "out") == 2
    )
    assert "broken.safetensors" in capsys.readouterr().err and not (tmp_path / "out").exists()
