"""The loop on one process without DeepSpeed: schedules, EMA, resume, signals, and what it says to bad input."""

import json
import math
import resource
import shutil
import signal
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from blipfast import backends
from blipfast import train as train_command
from blipfast.config import Config, TrainConfig
from blipfast.ops.adamw import AdamWEma
from blipfast.training import checkpoint, deepspeed_engine, distributed, loop, optimizer
from blipfast.training.ema import MomentumEncoders
from blipfast.training.engine import Engine
from blipfast.training.errors import CheckpointError, NotFinite, TrainingError
from blipfast.training.schedule import learning_rate
from tests import launch, toy_run
from tests.launch import losses
from tests.toy_run import train

CPU = distributed.World(rank=0, size=1, device=torch.device("cpu"), launched=False)


# ---------------------------------------------------------------------------------------------------- schedules


def test_step_schedule_is_official_warmup_in_the_first_epoch_then_decay_to_a_floor():
    settings = TrainConfig(
        lr=3e-4, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=3000, lr_decay_rate=0.9, schedule="step"
    )
    for step in (0, 1, 1500, 2999, 3000, 4000):
        expected = min(3e-4, 1e-6 + (3e-4 - 1e-6) * step / 3000)
        assert learning_rate(settings, step, 0, 10**6) == pytest.approx(expected, rel=1e-12)
    for epoch in (1, 2, 19, 60):
        assert learning_rate(settings, 5, epoch, 10**6) == pytest.approx(
            max(1e-6, 3e-4 * 0.9**epoch), rel=1e-12
        )


def test_cosine_schedule_is_constant_within_an_epoch_and_official():
    settings = TrainConfig(lr=1e-5, min_lr=0.0, epochs=6, schedule="cosine", warmup_steps=3000)
    for epoch in range(6):
        expected = 1e-5 * 0.5 * (1 + math.cos(math.pi * epoch / 6))
        assert (
            learning_rate(settings, 0, epoch, 600)
            == learning_rate(settings, 99, epoch, 600)
            == pytest.approx(expected)
        )


def test_warmup_cosine_rises_to_lr_and_falls_to_min_lr_at_every_step():
    settings = TrainConfig(lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_steps=10, schedule="warmup_cosine")
    rates = [learning_rate(settings, step, 0, 110) for step in range(111)]
    assert rates[0] == 0.2 and rates[5] == pytest.approx(0.6) and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_no_warmup_steps_start_at_the_full_rate():
    assert learning_rate(TrainConfig(lr=0.5, warmup_steps=0, schedule="step"), 0, 0, 10) == 0.5


# ---------------------------------------------------------------------------------------------------- optimizer


def test_decay_all_decays_everything_and_its_opposite_spares_biases_norms_and_scalars():
    model = toy_run.ToyModel(0.0)
    (everything,) = optimizer.parameter_groups(model, 0.05, decay_all=True)
    assert len(everything["params"]) == sum(p.requires_grad for p in model.parameters())
    decayed, spared = optimizer.parameter_groups(model, 0.05, decay_all=False)
    assert decayed["weight_decay"] == 0.05 and all(p.ndim >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and any(p is model.temp for p in spared["params"])


def test_the_apex_of_pypi_is_told_apart_from_nvidias(monkeypatch):
    fake = types.ModuleType("apex")
    fake.__path__ = ["/somewhere/site-packages/apex"]
    monkeypatch.setitem(sys.modules, "apex", fake)
    with pytest.raises(TrainingError, match="/somewhere/site-packages/apex is not NVIDIA's"):
        optimizer.build_optimizer(TrainConfig(optimizer="apex"), toy_run.ToyModel(0.0), CPU.device)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(TrainingError, match="apex is not installed"):
        optimizer.build_optimizer(TrainConfig(optimizer="apex"), toy_run.ToyModel(0.0), CPU.device)


def test_the_plain_engine_steps_as_torch_adamw_with_accumulation_clipping_and_averages():
    config = Config(train=TrainConfig(accumulation=2, grad_clip=0.5, weight_decay=0.1, lr=1e-2))
    torch.manual_seed(0)
    model, reference = toy_run.ToyModel(0.0), toy_run.ToyModel(0.0)
    reference.load_state_dict(model.state_dict())
    engine = Engine(config, model, CPU)
    trained = [p for p in reference.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        batches = [{"index": torch.arange(4) + 8 * step + 4 * micro} for micro in range(2)]
        for batch in batches:
            engine.forward_backward(batch, alpha=0.0)
        norm = engine.step(1e-2, momentum=0.75)
        sum(reference(batch, alpha=0.0)["loss"] / 2 for batch in batches).backward()
        reference.unused.weight.grad, reference.unused.bias.grad = torch.zeros(1, 3), torch.zeros(1)
        want = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        adamw.step()
        adamw.zero_grad()
        with torch.no_grad():
            for p, average in reference.momentum_pairs():
                average.lerp_(p, 0.25)
        assert norm.item() == pytest.approx(want.item(), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_of_adamw_has_no_number_of_the_gpus_read_by_the_host(clip):
    """On tensors that hold no numbers reading one raises. Such a tensor has no address, which the kernel needs."""
    with FakeTensorMode(), backends.use(adamw="torch"):
        weights = [torch.nn.Parameter(torch.empty(3, device="cuda")) for _ in range(4)]
        engine = Engine.__new__(Engine)
        engine.trained, engine.clip = weights, clip
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        engine.optimizer = AdamWEma(groups, [(p, torch.empty_like(p)) for p in weights])
        optimizer.init_state(engine.optimizer, weights)
        for p in weights:
            p.grad = torch.empty_like(p)
        assert engine.step(1e-3, momentum=0.9).is_cuda


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(name, clip):
    settings = TrainConfig(optimizer=name, grad_clip=clip, lr=1e-2)
    engine = Engine(Config(train=settings), toy_run.ToyModel(0.0), CPU)
    engine.forward_backward({"index": torch.arange(4)}, alpha=0.0)
    engine.model.temp.grad.fill_(math.inf)
    before = [p.detach().clone() for p in engine.trained]
    assert not engine.step(1e-2, momentum=0.9).isfinite()
    assert all(map(torch.equal, engine.trained, before))


# ---------------------------------------------------------------------------------------------------- momentum


@pytest.mark.parametrize(
    "name", ["adamw", "muon"]
)  # one averages in the optimizer's pass, the other after it
def test_momentum_encoders_follow_optimizer_steps_not_micro_batches(tmp_path, name):
    """After n steps with accumulation 2 the average has moved n times, with the weights after each step."""
    averages, online = [], []

    class Task(toy_run.ToyTask):
        def __init__(self, *args):
            super().__init__(*args)
            averages.append(self.model.blocks_m[0].weight.clone())
            self.model.end_step = self.after_step

        def after_step(self):
            online.append(self.model.blocks[0].weight.detach().clone())
            averages.append(self.model.blocks_m[0].weight.clone())

    train(tmp_path, f"train.optimizer={name}", build=Task)
    assert len(online) == 6
    for before, weight, after in zip(averages, online, averages[1:]):
        torch.testing.assert_close(after, 0.9 * before + (1 - 0.9) * weight)


def test_a_bf16_average_keeps_moving_because_its_master_is_fp32():
    model = toy_run.ToyModel(0.0).bfloat16()
    engine = Engine.__new__(Engine)  # only what the momentum encoders ask of an engine
    engine.model = model
    momentum = MomentumEncoders(engine)
    with torch.no_grad():
        for online, average in model.momentum_pairs():
            online.fill_(1.01)
            average.fill_(1.0)
        for master in momentum.masters.values():
            master.fill_(1.0)
    for _ in range(2000):
        momentum.update(0.999)
    for online, average in model.momentum_pairs():
        assert (average == online).all(), "0.001 * 0.01 is far below the resolution of bf16 at 1"


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_truncated_checkpoint_is_named_and_auto_takes_the_one_before(finished, capsys):
    newest, older = (finished / "checkpoints" / f"step_000000{step}" for step in (6, 4))
    damaged = newest / "weight.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(
        CheckpointError, match=r"step_0000006/weight.safetensors is damaged: \d+ bytes, expected \d+"
    ):
        train(finished, "train.max_steps=8", resume=str(newest))
    assert train(finished, "train.max_steps=8") == 0
    printed = capsys.readouterr().out
    assert "weight.safetensors is damaged" in printed and f"resuming from {older}" in printed


def test_if_every_checkpoint_is_damaged_nothing_starts(finished):
    for path in checkpoint.checkpoints(finished / "checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
        train(finished, "train.max_steps=8")


def test_a_checkpoint_of_another_shape_is_refused_by_tensor_name(finished, monkeypatch):
    monkeypatch.setenv("TOY_WIDTH", "17")
    message = r"weight.safetensors is of another model: blocks.0.weight is \(41, 15\) there, \(41, 17\) here"
    with pytest.raises(CheckpointError, match=message):
        train(finished, "train.max_steps=8")
    assert len(losses(finished)) == 6


def test_another_global_batch_is_refused_with_what_to_set(finished):
    with pytest.raises(CheckpointError, match="global batch of 8 .* now it is 4"):
        train(finished, "train.max_steps=8", "train.accumulation=1")


@pytest.mark.parametrize("what", ["missing", "a file", "a folder of something else"])
def test_a_foreign_checkpoint_is_refused_before_training(tmp_path, what):
    path = tmp_path / "thing"
    if what == "a file":
        path.write_bytes(b"PK\x03\x04")
    elif what != "missing":
        path.mkdir()
        (path / "state.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match=f"{path} is not a checkpoint of blipfast"):
        train(tmp_path / "run", resume=str(path))
    assert not losses(tmp_path / "run")


def test_a_disk_that_fills_up_while_saving_stops_nothing_and_damages_nothing(tmp_path, capsys):
    """The limit on file sizes makes a real write fail part of the way, as a full disk does."""
    output = tmp_path / "run"
    assert train(output, "train.max_steps=2") == 0
    good = {path.name: path.read_bytes() for path in (output / "checkpoints/step_0000002").iterdir()}
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, free[1]))
    try:
        status = train(output, "train.max_steps=6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        signal.signal(signal.SIGXFSZ, ignored)
    printed = capsys.readouterr().out
    assert status == 1 and "could not be written" in printed and "Older checkpoints are untouched" in printed
    assert {path.name: path.read_bytes() for path in (output / "checkpoints/step_0000002").iterdir()} == good
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_0000002"]
    assert 6 in losses(output), "training went on"
    assert train(output, "train.max_steps=6") == 0, "and the same command finishes it once there is room"


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_samples(tmp_path, monkeypatch):
    batches = list(toy_run.ToyLoader(101, 4, 42, 0, 1, 2).iterate(0))
    bad = int(batches[2 * 3]["index"][1])  # in the fourth step
    monkeypatch.setenv("TOY_NAN_AT", str(bad))
    with pytest.raises(NotFinite, match=rf"step 4 .*nan.*samples \[.*\b{bad}\b.*step_0000002"):
        train(tmp_path)
    assert max(losses(tmp_path)) == 3
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step_0000002"]


# ---------------------------------------------------------------------------------------------------- late flags


@pytest.fixture
def late(monkeypatch):
    """The host reads a step's flags after it has enqueued the next, as on a GPU."""
    begin = loop._Trainer.__init__

    def lagging(self, *arguments):
        begin(self, *arguments)
        self.lag = 1

    monkeypatch.setattr(loop._Trainer, "__init__", lagging)


@pytest.mark.parametrize(
    "log_every, save_every, recorded, saved",
    [(1, 2, [1, 2, 3], ["step_0000002"]), (100, 4, [], []), (100, 5, [], []), (3, 3, [3], ["step_0000003"])],
)
def test_a_loss_read_late_is_of_the_right_step_and_nothing_of_it_is_kept(
    tmp_path, monkeypatch, late, log_every, save_every, recorded, saved
):
    batches = list(toy_run.ToyLoader(101, 4, 42, 0, 1, 2).iterate(0))
    samples = [int(i) for batch in batches[6:8] for i in batch["index"]]  # of the fourth step
    monkeypatch.setenv("TOY_NAN_AT", str(samples[1]))
    with pytest.raises(NotFinite, match="step 4 .*the loss is .*nan") as error:
        train(tmp_path, f"train.log_every={log_every}", f"train.save_every={save_every}")
    assert f"samples {samples}" in str(error.value)
    assert sorted(losses(tmp_path)) == recorded
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == saved


def test_a_gradient_read_late_stops_before_the_checkpoint(tmp_path, monkeypatch, late):
    monkeypatch.setenv("TOY_INFINITE_GRADIENT", "1")
    with pytest.raises(NotFinite, match=r"step 1 \(rank 0\): the gradient's norm is"):
        train(tmp_path, "train.log_every=100")
    assert not list(tmp_path.rglob("*.safetensors")) and not losses(tmp_path)


def test_a_loss_read_late_stops_before_the_evaluation(tmp_path, monkeypatch, late):
    *_, last = toy_run.ToyLoader(101, 4, 42, 0, 1, 2).iterate(0)
    monkeypatch.setenv("TOY_NAN_AT", str(int(last["index"][0])))
    with pytest.raises(NotFinite, match="step 12 "):
        train(
            tmp_path,
            "train.max_steps=15",
            "train.evaluate_every=1",
            "train.save_every=100",
            "train.log_every=5",
        )
    assert not [record for record in launch.records(tmp_path) if "event" in record]


def test_flags_read_late_change_nothing_of_a_run(tmp_path, finished, late):
    assert train(tmp_path / "late", "train.log_every=2") == 0
    kept = losses(tmp_path / "late", "grad_norm")
    assert kept == {step: norm for step, norm in losses(finished, "grad_norm").items() if step % 2 == 0}
    for name in ("weight", "exp_avg", "buffers"):
        one, other = (
            load_file(run / f"checkpoints/step_0000006/{name}.safetensors")
            for run in (tmp_path / "late", finished)
        )
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_signal_read_late_stops_one_step_later_with_a_checkpoint(tmp_path, late):
    class Task(toy_run.ToyTask):
        def alpha(self, step, steps_per_epoch):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().alpha(step, steps_per_epoch)

    settings = ["train.save_every=0", "train.log_every=100"]
    assert train(tmp_path, *settings, build=Task) == 0
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step_0000004"]
    assert train(tmp_path, *settings) == 0
    assert max(losses(tmp_path)) == 6


def test_deepspeed_settings_that_contradict_the_train_section_name_both():
    config = Config(deepspeed={"gradient_accumulation_steps": 4}, train=TrainConfig(accumulation=2))
    with pytest.raises(
        ValueError, match="deepspeed.gradient_accumulation_steps is 4 but train.accumulation is 2"
    ):
        deepspeed_engine.deepspeed_config(config, 1)
    config = Config(deepspeed={"train_batch_size": 64}, train=TrainConfig(batch_size=8, accumulation=2))
    assert deepspeed_engine.deepspeed_config(config, 4)["train_batch_size"] == 64
    with pytest.raises(ValueError, match="train.batch_size \\* train.accumulation \\* ranks is 32"):
        deepspeed_engine.deepspeed_config(config, 2)


@pytest.mark.parametrize(
    "section, name",
    [
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device=nvme"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
    ],
)
def test_deepspeed_settings_that_cannot_work_are_refused_by_name(section, name):
    with pytest.raises(ValueError, match=name):
        deepspeed_engine.deepspeed_config(Config(deepspeed=section), 1)


def test_the_deepspeed_section_is_handed_on_as_it_is_and_completed():
    section = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": True}}
    ds = deepspeed_engine.deepspeed_config(Config(deepspeed=section, train=TrainConfig(grad_clip=1.0)), 2)
    assert ds["zero_optimization"] == section["zero_optimization"] and ds["bf16"] == section["bf16"]
    assert ds["gradient_clipping"] == 1.0 and ds["zero_force_ds_cpu_optimizer"] is False
    assert "gradient_clipping" not in section, "the config itself is not changed"
    assert ds["timers"] == {"throughput": {"enabled": False}}, "it would stop the GPU twice a micro-batch"
    timers = {"throughput": {"enabled": True}}
    assert deepspeed_engine.deepspeed_config(Config(deepspeed={"timers": timers}), 1)["timers"] == timers


def test_several_processes_without_deepspeed_are_told_to_install_it(monkeypatch):
    monkeypatch.setattr(deepspeed_engine, "available", lambda: False)
    world = distributed.World(rank=0, size=2, device=torch.device("cpu"), launched=True)
    with pytest.raises(TrainingError, match="2 processes need DeepSpeed: pip install deepspeed"):
        loop._engine(Config(), toy_run.ToyModel(0.0), world)
    world = distributed.World(rank=0, size=1, device=torch.device("cpu"), launched=True)
    assert type(loop._engine(Config(), toy_run.ToyModel(0.0), world)) is Engine


def test_a_taken_port_says_so_and_which_option_chooses_another(monkeypatch):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainingError, match=f"127.0.0.1:{port} is taken.*--master_port"):
            distributed.connect()


def test_the_command_prints_one_line_for_a_mistake_in_the_config(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("train: {batch_sise: 4}\n")
    assert train_command.main(["--config", str(path)], build=toy_run.ToyTask) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "batch_sise" in message and "Traceback" not in message


def test_checkpoints_hold_no_pickle(finished):
    names = {path.suffix for path in (finished / "checkpoints").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json"}


def test_seeds_differ_between_steps_slots_and_runs():
    seeds = {loop.seed_of(seed, step, slot) for seed in (1, 42) for step in range(50) for slot in range(8)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)


def test_moving_a_checkpoint_elsewhere_keeps_it_usable(finished, tmp_path):
    moved = shutil.copytree(finished / "checkpoints/step_0000004", tmp_path / "elsewhere")
    assert train(tmp_path / "again", resume=str(moved)) == 0
    assert losses(tmp_path / "again") == {step: loss for step, loss in losses(finished).items() if step > 4}
