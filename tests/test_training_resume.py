"""Runs that go back, go on with other data, share a folder, stop early, or are told to end while workers load."""

from __future__ import annotations

import json
import signal
import stat

import numpy as np
import pytest
from PIL import Image

from blipfast.training import checkpoint
from blipfast.training.log import read_records, rewind
from tests import launch, toy_run
from tests.launch import losses
from tests.toy_run import train


@pytest.fixture
def twelve(tmp_path):
    """A run of twelve steps, an epoch, with checkpoints at 8 and 10 and 12."""
    settings = ["train.max_steps=12", "train.keep_checkpoints=3"]
    assert train(tmp_path / "twelve", *settings) == 0
    return tmp_path / "twelve"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_after_kill_9_the_same_command_repeats_the_same_losses(tmp_path):
    settings = ["train.max_steps=9", "train.save_every=4", "model.momentum=0.2"]
    assert train(tmp_path / "whole", *settings) == 0
    output = tmp_path / "killed"
    command = ["--config", str(launch.TOY_CONFIG), "--set", f"output={output}", *settings]
    killed = launch.start(launch.TOY, *command, TOY_SLEEP="0.2")
    launch.wait_for_step(killed, output, 6)
    launch.kill(killed)
    launch.finish(killed)
    assert 9 not in losses(output)
    launch.run(launch.TOY, *command)
    assert losses(output) == losses(tmp_path / "whole"), "all nine, each once, bit for bit"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_next_run_goes_on(tmp_path, number):
    assert train(tmp_path / "whole", "train.save_every=0") == 0

    class Task(toy_run.ToyTask):
        def alpha(self, step, steps_per_epoch):
            if step == 2:
                signal.raise_signal(number)
            return super().alpha(step, steps_per_epoch)

    output = tmp_path / "stopped"
    assert train(output, "train.save_every=0", build=Task) == 0
    assert max(losses(output)) == 3 and not (output / "metrics.json").exists()
    assert [path.name for path in checkpoint.checkpoints(output / "checkpoints")] == ["step_0000003"]
    assert train(output, "train.save_every=0") == 0
    assert losses(output) == losses(tmp_path / "whole") and (output / "metrics.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_resume_across_the_end_of_an_epoch_takes_the_next_order(tmp_path):
    settings = ["train.max_steps=15", "train.save_every=0", "train.schedule=step"]  # an epoch is 12 steps
    assert train(tmp_path / "whole", *settings) == 0
    assert train(tmp_path / "parts", *settings, "train.max_steps=12") == 0
    assert train(tmp_path / "parts", *settings) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_finished_run_is_left_alone_until_overwrite(finished, capsys):
    before = (finished / "log.jsonl").read_text()
    assert train(finished) == 0
    assert "is complete (6 steps)" in capsys.readouterr().out
    assert (finished / "log.jsonl").read_text() == before
    with pytest.raises(ValueError, match="--overwrite"):
        train(finished, resume="none")
    assert train(finished, overwrite=True) == 0
    assert len(losses(finished)) == 6


def test_only_the_newest_checkpoints_are_kept(finished):
    assert [path.name for path in checkpoint.checkpoints(finished / "checkpoints")] == [
        "step_0000004",
        "step_0000006",
    ]


def test_changed_settings_are_named_at_a_resume(finished, capsys):
    train(finished, "train.max_steps=8", "train.lr=0.02")
    assert "train.lr was 0.01 and is 0.02 now" in capsys.readouterr().out


def test_a_run_that_goes_back_does_not_go_on_from_what_it_left(twelve, capsys):
    start = twelve / "checkpoints" / "step_0000008"
    again = ["train.max_steps=10", "train.lr=0.001", "train.keep_checkpoints=3"]
    assert train(twelve, *again, resume=str(start)) == 0
    assert "abandoned_step_0000012 is of the run as it went on before" in capsys.readouterr().out
    assert names(twelve) == [
        "abandoned_step_0000010",
        "abandoned_step_0000012",
        "step_0000008",
        "step_0000010",
    ]
    state = checkpoint.read_state(checkpoint.newest(twelve / "checkpoints")[0])
    assert state["step"] == 10 and state["config"]["train"]["lr"] == 0.001
    assert max(losses(twelve)) == 10


def test_a_checkpoint_of_another_run_starts_an_empty_folder_only(twelve, finished, tmp_path):
    start = str(twelve / "checkpoints" / "step_0000012")
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(finished, "train.max_steps=14", resume=start)
    assert train(tmp_path / "third", "train.max_steps=14", resume=start) == 0
    assert min(losses(tmp_path / "third")) == 13
    assert train(finished, "train.max_steps=14", resume=start, overwrite=True) == 0
    assert sorted(losses(finished)) == [13, 14], "of the other run nothing is left"


def test_overwrite_deletes_nothing_before_the_run_can_start(finished):
    def build(*_):
        raise ValueError("a typo in data.train")

    before = names(finished), losses(finished)
    with pytest.raises(ValueError, match="a typo"):
        train(finished, build=build, overwrite=True)
    with pytest.raises(ValueError, match="--overwrite would delete .*step_0000004, which --resume names"):
        train(finished, resume=str(finished / "checkpoints/step_0000004"), overwrite=True)
    assert (names(finished), losses(finished)) == before


def test_a_finished_run_without_checkpoints_is_not_lost(finished):
    for path in checkpoint.checkpoints(finished / "checkpoints"):
        path.rename(finished / path.name)
    with pytest.raises(ValueError, match="holds a finished run without its checkpoints"):
        train(finished)
    assert train(finished, overwrite=True) == 0


def test_fewer_data_than_the_epoch_had_begin_the_next_one(tmp_path):
    """12 steps an epoch, saved after 10; then 6."""
    assert train(tmp_path / "run", "train.max_steps=10", "train.save_every=5") == 0

    class Smaller(toy_run.ToyTask):
        def __init__(self, config, rank, world_size):
            super().__init__(config, rank, world_size)
            self.loader.size = 50

    assert train(tmp_path / "run", "train.max_steps=0", "train.epochs=3", build=Smaller) == 0
    epochs = {r["step"]: r["epoch"] for r in read_records(tmp_path / "run" / "log.jsonl") if "loss" in r}
    assert epochs == {step: 0 if step <= 10 else 1 if step <= 16 else 2 for step in range(1, 19)}


def test_one_training_at_a_time_in_a_folder(tmp_path):
    output = tmp_path / "run"
    command = ["--config", str(launch.TOY_CONFIG), "--set", f"output={output}", "train.save_every=2"]
    first = launch.start(launch.TOY, *command, TOY_SLEEP="0.2")
    try:
        launch.wait_for_step(first, output, 1)
        said = launch.run(launch.TOY, *command, status=1)
        assert f"a training runs in this folder (process {first.pid})" in said
    finally:
        launch.kill(first)
        launch.finish(first)
    launch.run(launch.TOY, *command)
    assert (output / "training.lock").read_text() == ""


def test_a_run_that_stops_early_is_complete(tmp_path, capsys):
    class Task(toy_run.ToyTask):
        evaluations = 0

        def evaluate(self, model, epoch):
            Task.evaluations += 1
            return super().evaluate(model, epoch)

        @property
        def stop(self):
            return Task.evaluations == 1

    settings = ["train.max_steps=0", "train.save_every=5", "train.evaluate_every=1"]  # an epoch is 12 steps
    assert train(tmp_path / "run", *settings, build=Task) == 0
    assert names(tmp_path / "run")[-1] == "step_0000012"
    assert train(tmp_path / "run", *settings, build=Task) == 0
    assert "is complete (12 steps)" in capsys.readouterr().out


def test_another_number_of_steps_is_named_where_the_rate_depends_on_it(finished, capsys):
    train(finished, "train.max_steps=8")
    assert "train.max_steps was 6 and is 8 now" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_workers_to_finish_the_step(tmp_path, number):
    """As a terminal, Slurm and the launchers send it; torch would end a run whose workers die."""
    for i in range(8):
        Image.fromarray(np.full((32, 32, 3), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")
    pairs = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(8)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    output = tmp_path / "run"
    bert = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    settings = {
        "task": "caption", "output": output, "data.train": [str(tmp_path / "pairs.json")], "data.workers": 2,
        "model.vit": {"width": 24, "depth": 1, "heads": 2}, "model.image_size": 32, "model.med_config": bert,
        "train.batch_size": 4, "train.epochs": 5000, "train.save_every": 10**6, "train.log_every": 1,
        "train.schedule": "cosine",
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text("task: caption\n")
    command = ["--config", str(tmp_path / "config.yaml"), "--set"]
    command += [f"{name}={json.dumps(value, default=str)}" for name, value in settings.items()]
    running = launch.start(launch.TESTS.parent / "blipfast" / "train.py", *command)
    launch.wait_for_step(running, output, 3)
    launch.kill(running, number)
    printed = launch.finish(running, 60)
    assert running.returncode == 0, printed
    assert f"stopped by {signal.Signals(number).name}" in printed
    assert names(output) == [f"step_{max(losses(output)):07d}"]


def test_weights_and_checkpoints_may_be_read_by_whom_other_files_may(finished):
    usual = finished / "log.jsonl"
    for path in finished.glob("checkpoints/*/*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_a_log_that_was_cut_short_goes_on_in_a_line_of_its_own(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    rewind(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_a_checkpoint_whose_state_is_no_text_is_damaged_like_any_other(finished, capsys):
    (finished / "checkpoints/step_0000006/state.json").write_bytes(b"\xff\xfe\x00")
    assert train(finished, "train.max_steps=8") == 0
    assert "step_0000006 is not a checkpoint" in capsys.readouterr().out
