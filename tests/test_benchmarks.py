"""The benchmark programs, without a GPU: what they write, what they survive, what the tuner tries."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, report, tune_kernels
from benchmarks import measure as measuring
from benchmarks.cases import MODES, Case, built_late, modes
from benchmarks.measure import Ceiling, Row, measure, time_in_turn
from benchmarks.models import precision, pretrain
from benchmarks.models.encoder import flops
from benchmarks.targets import Target
from benchmarks.worker import Lost, Title, Worker, collect
from blipfast.models.vit import create_vit
from tests.flops import flop

CEILING = Ceiling(tflops=1.0, gbps=10.0)


def case_of(contenders, flops=2e6, moved=0.0) -> Case:
    return Case("op", "N1000", torch.float32, lambda: contenders, flops, moved)


def nap(milliseconds):
    return lambda: time.sleep(milliseconds / 1000)


def failing():
    raise ZeroDivisionError("no\nsuch kernel")


def test_a_slower_contender_has_a_ratio_above_one_and_ours_is_the_measure():
    ours, eager = measure(case_of({"ours torch": nap(2), "eager": nap(6)}), "cpu", CEILING, 0.05)
    assert ours.ratio_p50 == 1 and 2 < eager.ratio_p50 < 4
    assert ours.ms_p20 <= ours.ms_p50 <= ours.ms_p80 and ours.rounds >= 10
    assert ours.tflops == pytest.approx(2e6 / (ours.ms_p50 * 1e-3) / 1e12)
    assert ours.ceiling == pytest.approx(ours.tflops / CEILING.tflops)


def test_the_ceiling_is_the_nearer_of_flops_and_bytes():
    (row,) = measure(case_of({"ours torch": nap(2)}, flops=1e6, moved=1e7), "cpu", CEILING, 0.05)
    assert row.ceiling == pytest.approx(row.gbps / CEILING.gbps)
    assert row.gbps == pytest.approx(1e7 / (row.ms_p50 * 1e-3) / 1e9)


def test_a_contender_that_fails_is_told_in_one_line_and_costs_no_other():
    rows = measure(
        case_of({"ours triton": failing, "ours torch": nap(1), "eager": nap(1)}), "cpu", CEILING, 0.02
    )
    assert rows[0].ms_p50 is None and rows[0].note == "ZeroDivisionError: no such kernel"
    assert rows[1].ratio_p50 == 1 and rows[2].ms_p50 > 0


def row(contender, **figures) -> Row:
    return Row("op", "N1", "float32", "forward", contender, **figures)


@pytest.mark.parametrize(
    "target, verdict",
    [
        (Target("speed", 2.0, ("sdpa",)), "at least 2x the speed of sdpa: 2.5, met"),
        (Target("speed", 2.0, ("sdpa", "eager")), "at least 2x the speed of sdpa, eager: 1.5, not met"),
        (Target("speed", 2.0, ("apex",)), "at least 2x the speed of apex: not measured"),
        (Target("memory", 0.2, ("eager",)), "at most 0.2x the memory of eager: 0.1, met"),
        (Target("ceiling", 0.55), "at least 55% of the ceiling: 40%, not met"),
        (Target("seconds", 120), "all of it in at most 120 s: 100, met"),
    ],
)
def test_a_target_is_judged_by_the_fastest_of_those_it_names(target, verdict):
    ours = row("ours", ms_p50=1000.0, ratio_p50=1.0, ceiling=0.4, peak_mib=10.0)
    others = [
        row("sdpa flash", ms_p50=3000.0, ratio_p50=3.0),
        row("sdpa cudnn", ms_p50=2500.0, ratio_p50=2.5),
        row("sdpa efficient", note="RuntimeError"),
        row("eager", ms_p50=1500.0, ratio_p50=1.5, peak_mib=100.0),
    ]
    assert target.judge(ours, [ours, *others], parts=100) == verdict


def test_targets_stand_beside_the_figures_and_are_counted(tmp_path):
    targets = (Target("speed", 2.0, ("eager",)), Target("speed", 9.0, ("eager",)))
    case = replace(case_of({"ours": nap(2), "eager": nap(8)}), items=10, targets=targets, remark="As it is.")
    rows = measure(case, "cpu", CEILING, 0.02)
    both = replace(case, shape="N2", setup=lambda: {"ours triton": failing, "ours torch": nap(1)})
    assert [bool(row.targets) for row in measure(both, "cpu", CEILING, 0.02)] == [False, True]
    lost = replace(
        case, shape="N2", setup=lambda: {"ours": failing}, targets=(Target("seconds", 1), *targets)
    )
    lost = measure(lost, "cpu", CEILING, 0.02)
    assert rows[0].per_second == pytest.approx(10 / (rows[0].ms_p50 / 1e3))
    report.write_markdown(tmp_path, rows + lost, {"gpu": "none"})
    text = (tmp_path / "results.md").read_text()
    assert "- Targets: 1 met, 1 not met, 3 not measured" in text
    assert ", met; at least 9x" in text and "| a second |" in text and text.count("As it is.") == 1


def test_a_contender_whose_first_call_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(measuring, "PATIENCE", 0.05)
    slow, ours = measure(case_of({"transformers": nap(5000), "ours": nap(1)}), "cpu", CEILING, 0.02)
    assert slow.note == "TimeoutError: not done after 0.05 s" and ours.ms_p50 > 0


def test_those_that_would_leave_too_little_of_a_cases_time_are_passed_over_and_the_others_timed():
    contenders = {"ours": nap(1), "long": nap(200), "eager": nap(1), "hangs": nap(9000), "late": nap(1)}
    start = time.monotonic()
    rows = {row.contender: row for row in measure(case_of(contenders), "cpu", CEILING, 0.01, limit=1.2)}
    assert time.monotonic() - start < 2
    assert [label for label, row in rows.items() if row.ms_p50] == ["ours", "eager"]
    assert rows["long"].note == rows["late"].note == "TimeoutError: the case's time is up"
    assert rows["hangs"].note.startswith("TimeoutError: not done after 0.")


def test_what_takes_long_is_called_a_few_times_only(monkeypatch):
    monkeypatch.setattr(measuring, "LONG", 0.0)
    calls = []

    def slow():
        calls.append(time.sleep(1.1))

    assert len(time_in_turn({"ours": slow}, "cpu", 0.01)["ours"]) == len(calls) - 1 == 3


def test_a_contender_is_built_once_and_not_before_it_is_called():
    built = []
    contender = built_late(lambda: built.append(1) or (lambda: len(built)))
    assert not built and (contender(), contender()) == (1, 1)


def test_the_flops_of_the_encoder_are_those_that_are_counted():
    with torch.device("meta"):
        encoder, image = create_vit("base", 384)[0].eval(), torch.zeros(2, 3, 384, 384)
    assert flop(lambda: encoder(image)) == pytest.approx(2 * flops(384), rel=0.005)


def test_mode_full_differentiates_and_mode_forward_does_not():
    x = torch.ones(3, requires_grad=True)
    seen = []

    def function(x):
        seen.append(torch.is_grad_enabled())
        return (2 * x, x.detach())

    forward, full = modes(
        "op", "N3", torch.float32, lambda: ({"eager": function}, (x,)), forward=(1, 1), full=(2, 2)
    )
    assert forward.setup()["eager"]()[0].requires_grad is False
    (grad,) = full.setup()["eager"]()
    assert seen == [False, True]
    assert grad.abs().min() > 0 and (forward.mode, full.mode, full.flops) == ("forward", "full", 2)


def test_every_operation_has_cases_that_run_on_a_cpu():
    cases, failed = collect("cpu")
    assert not failed
    folders = (Path(gpu.ROOT) / "benchmarks" / name for name in ("models", "ops"))
    files = {path.stem for folder in folders for path in folder.glob("*.py")} - {"__init__"}
    assert len({case.op for case in cases}) >= len(files)
    assert all(case.rank in (0, 1, 2) and case.mode in ("forward", "full") for case in cases)


@pytest.mark.parametrize("gigabytes, batch", [(141, 384), (80, 192)])
def test_pre_training_is_compared_with_as_many_pairs_as_fit(gigabytes, batch, monkeypatch):
    properties = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert [case.items for case in pretrain.cases("cuda")] == [batch, 768, 128]


def test_low_precisions_are_measured_beside_ours():
    (case,) = precision.cases("cpu")
    rows = {row.contender: row for row in measure(case, "cpu", CEILING, 0.01)}
    assert list(rows) == ["ours", "int8", "fp8"]
    assert rows["ours"].ratio_p50 == 1 and case.items == 2


def test_a_process_that_dies_or_hangs_is_lost_and_says_so():
    worker = Worker("cpu")
    with pytest.raises(Lost, match="IndexError: "):  # what is wrong with a case costs the process nothing
        worker.ask("measure", 10**6, CEILING, 0.01, 1.0, seconds=60)
    assert worker.process.is_alive()
    with pytest.raises(Lost, match="no answer in 0 s"):
        worker.ask("ceiling", seconds=0)
    with pytest.raises(Lost, match="died"):
        worker.ask("ceiling", seconds=1)


def test_the_dry_run_measures_every_operation_and_writes_all_files(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--seconds", "0.01"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.csv",
        "results.md",
        "speed.png",
        "ceiling.png",
    }
    rows, about = report.read_csv(tmp_path)
    assert {row.op for row in rows} == {case.op for case in collect("cpu")[0]}
    # one that transformers refuses or fails in says so
    assert all((row.ms_p50 or 0) > 0 for row in rows if row.contender.startswith("ours"))
    assert all(bool(row.ms_p50) != bool(row.note) for row in rows)
    assert about["torch"] == version("torch") and float(about["ceiling_tflops"]) > 0
    text = (tmp_path / "results.md").read_text()
    assert "GPU tests: not run" in text
    assert "Written to" in capsys.readouterr().out


def test_processes_that_compile_ahead_finish_and_are_gone_after(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=20e9))
    run = gpu.Run("cpu", tmp_path, math.inf, ["mlp"], MODES, 0.01)
    (warmer,) = warmers = run.start_warmers()
    assert warmer.answer(60) is None
    run.wait_for(warmers, time.monotonic())
    assert not warmer.process.is_alive()
    run.worker.close()


def test_gpu_tests_are_run_and_cut_off_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_one.py"
    file.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 0\n")
    assert gpu.gpu_tests(tmp_path / "log", 60).startswith("GPU tests: passed, 1 passed, 1 deselected")
    file.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): assert 0\n")
    assert gpu.gpu_tests(tmp_path / "log", 60).startswith("GPU tests: failed, 1 failed")
    assert gpu.gpu_tests(tmp_path / "log", 0.1) == "GPU tests: failed, not done after 0 s; see log"


def test_when_time_is_up_the_report_says_what_was_not_run(tmp_path):
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--budget", "0", "--ops", "mlp"]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "2 of 2 cases were not run, for lack of time" in text
    rows, _ = report.read_csv(tmp_path)
    assert [(row.shape, row.note) for row in rows] == [("B4 N37 D192", "not run: out of time")] * 2


def test_the_modes_that_are_asked_for_are_measured(tmp_path):
    arguments = ["--dry-run", "--output", str(tmp_path), "--budget", "0", "--modes", "full"]
    assert gpu.main(arguments) == 0
    assert {row.mode for row in report.read_csv(tmp_path)[0]} == {"full"}


def test_what_has_no_figure_yet_is_measured_before_the_rest_of_its_rank(tmp_path, monkeypatch):
    def title(op, mode, rank, place):
        return Title(op, "N1", "torch.bfloat16", mode, rank, (), 60, place)

    titles = [title("mlp", "forward", 0, 0), title("mlp", "full", 0, 1), title("vqa", "forward", 0, 0)]
    titles += [title("adamw", "forward", 1, 0), title("caption", "forward", 0, 0)]
    rows = [replace(row(label, ms_p50=ms), op=op) for op, label, ms in [
        ("mlp", "ours triton", 1.0), ("caption", "ours", None), ("caption", "transformers", 1.0),
    ]]  # fmt: skip
    report.write_csv(tmp_path / "NVIDIA_H200" / "abc", rows, {"gpu": "none"})
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.known() == {("mlp", "N1", "forward")}
    assert gpu.in_order(titles, range(5), gpu.known()) == [2, 4, 1, 0, 3]
    assert gpu.in_order(titles, [0, 1, 3], set()) == [0, 1, 3]


def test_processes_lost_at_the_start_are_started_again(tmp_path, monkeypatch):
    ask, lost = Worker.ask, []

    def start(device):
        if not lost:
            lost.append("start")
            raise Lost("no answer in 120 s")
        return Worker(device)

    def ask_again(self, verb, *arguments, seconds):
        if verb == "ceiling" and "ceiling" not in lost:
            lost.append("ceiling")
            self.close()
            raise Lost("no answer in 60 s")
        return ask(self, verb, *arguments, seconds=seconds)

    monkeypatch.setattr(gpu, "Worker", start)
    monkeypatch.setattr(Worker, "ask", ask_again)
    arguments = ["--dry-run", "--output", str(tmp_path), "--ops", "mlp", "--seconds", "0.01"]
    assert gpu.main(arguments) == 0 and lost == ["start", "ceiling"]


def test_without_git_the_environment_says_which_commit_it_is(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert report.commit() == "unknown"
    monkeypatch.setenv("BLIPFAST_COMMIT", "abc")
    assert report.commit() == "abc"
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert "BLIPFAST_COMMIT" in capsys.readouterr().out


def test_a_failing_case_is_reported_and_the_exit_status_tells(tmp_path, monkeypatch):
    ask, asked = Worker.ask, []

    def lost_once(self, verb, *arguments, seconds):
        asked.append(verb)
        if asked.count("measure") == 1 and verb == "measure":
            self.close()
            raise Lost("the process died (exit code -11)")
        return ask(self, verb, *arguments, seconds=seconds)

    monkeypatch.setattr(Worker, "ask", lost_once)
    arguments = ["--dry-run", "--output", str(tmp_path), "--ops", "mlp", "--seconds", "0.01"]
    assert gpu.main(arguments) == 1
    rows, _ = report.read_csv(tmp_path)
    assert rows[0].note == "the case was given up: the process died (exit code -11)"
    assert rows[1].ms_p50 > 0  # by a new process


def test_without_a_gpu_the_gpu_programs_say_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2 and tune_kernels.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_the_csv_reads_back_as_it_was_written(tmp_path):
    rows = [
        Row("mlp", "B4, N37", "bfloat16", "full", "eager", 1.0, 2.0, 3.0, ratio_p50=0.5, rounds=12),
        Row("mlp", "B4, N37", "bfloat16", "full", "compiled", note='said "no"'),
    ]
    report.write_csv(tmp_path, rows, {"gpu": "none", "commit": "abc"})
    assert report.read_csv(tmp_path) == (rows, {"gpu": "none", "commit": "abc"})
