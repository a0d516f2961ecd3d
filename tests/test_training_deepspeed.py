"""DeepSpeed against plain torch: the same curve from every ZeRO stage, and the same losses after a kill.

One launch runs many configurations, because starting two ranks costs more than training them. To test another task,
give `SCRIPT`, `CONFIG` and `SETTINGS` of a script like toy_run.py.
"""

import pytest
from safetensors.torch import load_file

from tests import launch
from tests.launch import losses

pytest.importorskip("deepspeed")

SCRIPT, CONFIG = launch.TOY, launch.TOY_CONFIG
SETTINGS = [
    "train.max_steps=9",
    "train.save_every=4",
    "train.keep_checkpoints=9",
    "model.momentum=0.2",
]  # 0.2: dropout
STEPS = range(1, 10)


def arguments(output, *settings, stage=None, bf16=False, resume=None):
    """Command line of one run; a stage asks for two ranks without accumulation instead of one with 2."""
    set_ = [f"output={output}", *SETTINGS, *settings]
    if stage is not None:
        zero = f"stage: {stage}, stage3_param_persistence_threshold: 100"  # some parameters whole, some in shards
        set_ += [
            "train.accumulation=1",
            f"deepspeed={{zero_optimization: {{{zero}}}, bf16: {{enabled: {str(bf16).lower()}}}}}",
        ]
    return [
        "--config",
        str(CONFIG),
        "--set",
        *set_,
        *(["--resume", str(resume)] if resume else []),
        "--traceback",
    ]


def checkpoint(output, step, file="weight"):
    return load_file(output / "checkpoints" / f"step_{step:07d}" / f"{file}.safetensors")


def assert_same_state(one, other, tolerance):
    """Equal weights, momentum encoders, moments and queue; tolerance is relative to the largest entry of a tensor."""
    for file in ("weight", "exp_avg", "exp_avg_sq", "buffers"):
        a, b = checkpoint(one, 8, file), checkpoint(other, 8, file)
        assert a.keys() == b.keys()
        for name in a:
            difference = (a[name].double() - b[name].double()).abs().max().item()
            assert difference <= tolerance * max(1e-3, b[name].double().abs().max().item()), (
                file,
                name,
                difference,
            )


def assert_same_curve(one, other, tolerance, steps=STEPS):
    for key in ("loss", "grad_norm", "temperature"):
        a, b = losses(one, key), losses(other, key)
        for step in steps:
            assert a[step] == pytest.approx(b[step], rel=tolerance, abs=0), (key, step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every configuration in one launch of two ranks, and the same by plain torch in one process."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {f"zero{stage}": arguments(folder / f"zero{stage}", stage=stage) for stage in (0, 1, 2, 3)}
    for stage in (1, 3):
        commands[f"bf16_zero{stage}"] = arguments(folder / f"bf16_zero{stage}", stage=stage, bf16=True)
    commands["muon"] = arguments(folder / "muon", "train.optimizer=muon", stage=0)
    halfway = {name: folder / name / "checkpoints" / "step_0000004" for name in [*commands, "plain"]}
    for stage in (1, 3):
        name = f"bf16_zero{stage}"
        commands[f"{name}_resumed"] = arguments(
            folder / f"{name}_resumed", stage=stage, bf16=True, resume=halfway[name]
        )
    commands["zero3_to_2"] = arguments(folder / "zero3_to_2", stage=2, resume=halfway["zero3"])
    commands["plain_to_zero3"] = arguments(folder / "plain_to_zero3", stage=3, resume=halfway["plain"])
    launch.run(SCRIPT, *arguments(folder / "plain"))
    launch.run(SCRIPT, *arguments(folder / "plain_muon", "train.optimizer=muon"))
    together = [part for command in commands.values() for part in (*command, "--then")][:-1]
    printed = launch.run(SCRIPT, *together, ranks=2)
    launch.run(SCRIPT, *arguments(folder / "zero3_to_plain", resume=halfway["zero3"]))
    return folder, printed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_follow_the_curve_of_one_rank_with_accumulation(runs, stage):
    """Tolerance 1e-5 relative on loss, gradient norm and temperature in each of 9 steps, with dropout."""
    folder, _ = runs
    assert_same_curve(folder / f"zero{stage}", folder / "plain", 1e-5)
    assert_same_state(folder / f"zero{stage}", folder / "plain", 1e-4)


def test_two_ranks_follow_the_curve_of_one_rank_under_muon(runs):
    """Tolerance 1e-3: where bf16 is fast, Muon rounds to it, and a last bit of the gradient may turn its rounding."""
    folder, _ = runs
    assert_same_curve(folder / "muon", folder / "plain_muon", 1e-3)
    assert not set(checkpoint(folder / "muon", 8, "exp_avg_sq")) & {"blocks.0.weight", "blocks.3.weight"}


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_weights_follow_the_fp32_curve_roughly_and_keep_fp32_masters(runs, stage):
    folder, _ = runs
    assert_same_curve(folder / f"bf16_zero{stage}", folder / "plain", 0.05)
    weights = checkpoint(folder / f"bf16_zero{stage}", 8)
    for name in ("embed.weight", "blocks.0.weight", "blocks_m.0.weight"):
        assert (weights[name] != weights[name].bfloat16().float()).any(), f"{name} holds more than bf16"
    assert_same_state(folder / "bf16_zero1", folder / "bf16_zero3", 1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bf16_run_resumes_bit_for_bit(runs, stage):
    folder, _ = runs
    assert_same_curve(
        folder / f"bf16_zero{stage}_resumed", folder / f"bf16_zero{stage}", 0, steps=range(5, 10)
    )
    assert_same_state(folder / f"bf16_zero{stage}_resumed", folder / f"bf16_zero{stage}", 0)


@pytest.mark.parametrize("name", ["zero3_to_2", "zero3_to_plain", "plain_to_zero3"])
def test_a_checkpoint_resumes_under_another_stage_or_without_deepspeed(runs, name):
    folder, _ = runs
    assert_same_curve(folder / name, folder / "plain", 1e-5, steps=range(5, 10))
    assert_same_state(folder / name, folder / "plain", 1e-4)


def test_the_momentum_encoders_moved_and_the_frozen_part_did_not(runs):
    folder, _ = runs
    early, late = (checkpoint(folder / "zero3", step) for step in (4, 8))
    assert (early["blocks_m.0.weight"] != late["blocks_m.0.weight"]).any()
    assert (early["frozen.weight"] == late["frozen.weight"]).all()


def test_evaluation_sees_whole_weights_under_every_stage(runs):
    folder, _ = runs
    whole = {
        name: launch.records(folder / name)[-2]["whole"]
        for name in ("plain", "zero0", "zero1", "zero2", "zero3")
    }
    assert whole == pytest.approx(dict.fromkeys(whole, whole["plain"]), rel=1e-6)


def test_deepspeed_does_not_fill_the_screen_or_compile(runs):
    _, printed = runs
    assert "FutureWarning" not in printed and "shm_comm" not in printed and "[INFO]" not in printed, printed


def test_after_kill_9_in_the_middle_two_ranks_under_zero_3_repeat_the_same_losses(runs, tmp_path):
    folder, _ = runs
    output = tmp_path / "killed"
    killed = launch.start(SCRIPT, *arguments(output, stage=3), ranks=2, TOY_SLEEP="0.3")
    launch.wait_for_step(killed, output, 6)
    launch.kill(killed)
    assert launch.finish(killed) is not None and 9 not in losses(output)
    (output / "checkpoints" / "step_0000008.tmp").mkdir()  # a save that the kill interrupted
    printed = launch.run(SCRIPT, *arguments(output, stage=3), ranks=2)
    assert "step_0000004" in printed
    assert_same_curve(output, folder / "zero3", 0)
    assert_same_state(output, folder / "zero3", 0)


def test_a_gradient_that_is_not_finite_stops_every_stage_with_one_message(tmp_path):
    kinds = [(0, False), (1, False), (2, False), (3, False), (1, True), (3, True)]
    commands = [arguments(tmp_path / f"{stage}{bf16}", stage=stage, bf16=bf16)[:-1] for stage, bf16 in kinds]
    together = [part for command in commands for part in (*command, "--then")][:-1]
    printed = launch.run(SCRIPT, *together, ranks=1, status=1, TOY_INFINITE_GRADIENT="1")
    assert printed.count("error: step 1 (rank 0): the gradient's norm is") == len(kinds), printed
    assert not list(tmp_path.rglob("*.safetensors")), "nothing was saved"
