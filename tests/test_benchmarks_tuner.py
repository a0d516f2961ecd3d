"""The tuner of kernels, without a GPU: what it times, keeps, refuses and leaves."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from benchmarks import tune_kernels
from benchmarks.cases import MODES, Case
from blipfast.kernels import aot, table
from tests.test_benchmarks import failing, nap


def test_the_tuner_tries_the_shipped_configuration_first_and_then_the_grid():
    shipped = {"BLOCK": 4096, "num_warps": 8, "num_stages": 2}
    found = tune_kernels.candidates("linear_cross_entropy", "softmax", shipped)
    assert found[0] == shipped and len(found) == 18
    assert {"BLOCK": 2048, "num_warps": 16, "num_stages": 3} in found
    text = tune_kernels.candidates("attention", "forward D=64 text", {"BM": 16, "BN": 16, "wins": False})
    assert all(config["BM"] < 64 and not config["wins"] for config in text), "few rows have tiles of few rows"


def test_the_tuner_passes_over_what_fails_or_gives_other_results():
    right = tune_kernels.right(
        {0: lambda: torch.ones(3), 1: lambda: torch.zeros(3), 2: failing, 3: lambda: torch.ones(3) + 1e-3}
    )
    assert list(right) == [0, 3]


def looking_up(op, *buckets):
    def run():
        for bucket in buckets:
            table.lookup(op, 90, bucket)
        return torch.ones(3)

    return run


def now(function, tasks, chunk=1):
    """In place of several processes."""
    return [] if function is tune_kernels.compile_one else [function(task) for task in tasks]


@pytest.fixture
def tuning(monkeypatch):
    """tuning(op, buckets, {label: ms of all but ours}, {number of a candidate: ms}): with times that are made up."""

    def build(op, buckets, peers=(), ours=()):
        def times(functions, device, seconds):
            ms = dict.fromkeys(functions, 1.0) | dict(peers) | dict(ours)
            return {label: [ms[label]] * 10 for label in functions}

        contenders = {"ours triton": looking_up(op, *buckets)} | dict.fromkeys(dict(peers), nap(0))
        cases = [Case(op, "N1", torch.bfloat16, lambda: contenders, 0, 0, mode) for mode in MODES]
        monkeypatch.setattr(tune_kernels, "all_cases", lambda: cases)
        monkeypatch.setattr(tune_kernels, "time_in_turn", times)
        monkeypatch.setattr(tune_kernels, "refusals", lambda task: [])
        return tune_kernels.Tuning(op, 90)

    return build


def test_the_tuner_times_what_a_bucket_is_used_for(tuning):
    found = tuning("contrastive", ("statistics", "small", "gradient"))
    assert found.of_bucket == {"statistics": [0], "small": [0, 1], "gradient": [1]}
    assert tuning("linear_cross_entropy", ("softmax",)).of_bucket == {"softmax": [0, 1]}
    assert tuning("layer_norm", ("forward",)).of_bucket == {"forward": [0]}


def test_the_tuner_compiles_every_candidate_for_every_case(tuning):
    compiled = []

    def ahead(function, tasks, chunk=1):
        compiled.extend(tasks if function is tune_kernels.compile_one else [])
        return now(function, tasks)

    found = tuning("linear_cross_entropy", ("softmax",))
    every = tune_kernels.candidates("linear_cross_entropy", "softmax", found.trial.buckets["softmax"])
    found.fastest("softmax", [0, 1], ahead)
    assert compiled == [(i, "softmax", config, 90) for i in (0, 1) for config in every]


@pytest.mark.parametrize(
    "peers, wins",
    [
        ({"ours torch": 1.8, "compiled": 0.5, "eager": 0.5}, True),
        ({"ours torch": 0.9, "compiled": 2}, False),
        ({"ours torch": 1.8, "sdpa": 0.9}, False),
    ],
)
def test_a_kernel_wins_that_is_faster_than_what_would_serve_in_its_place(tuning, peers, wins, tmp_path):
    found = tuning("mlp", ("forward",), peers)
    found.tune(now, tmp_path)
    assert json.loads((tmp_path / "mlp.json").read_text())["90"]["forward"].get("wins", True) == wins


def test_the_tuner_keeps_the_fastest_that_the_check_ahead_of_time_accepts(tuning, monkeypatch):
    found = tuning("mlp", ("forward",), ours={3: 0.2, 5: 0.5})
    every = tune_kernels.candidates("mlp", "forward", found.trial.buckets["forward"])
    assert found.fastest("forward", [0], now) == every[3]
    monkeypatch.setattr(tune_kernels, "refusals", lambda task: ["spills"] * (task[2] == every[3]))
    assert found.fastest("forward", [0], now) == every[5]


def test_what_the_tuner_has_no_time_for_stays_as_it_is_and_what_it_found_is_written(tuning, tmp_path, capsys):
    found = tuning("mlp", ("forward", "backward"), {"ours torch": 2.0}, ours={3: 0.2})
    shipped = {bucket: dict(config) for bucket, config in found.trial.buckets.items()}

    def ahead(function, tasks, chunk=1):
        return None if tasks[0][1] == "backward" else now(function, tasks)

    found.tune(ahead, tmp_path)
    assert "mlp backward: left as it is, the time is up" in capsys.readouterr().out
    written = json.loads((tmp_path / "mlp.json").read_text())["90"]
    assert written["backward"] == shipped["backward"] and written["forward"] != shipped["forward"]


def test_processes_of_the_tuner_are_replaced_when_one_dies_and_stop_when_the_time_is_up():
    ahead = tune_kernels.Ahead(1, time.monotonic() + 60)
    with pytest.raises(BrokenProcessPool):
        ahead(os._exit, [1])
    assert ahead(abs, [-1, 2]) == [1, 2]
    ahead.until = time.monotonic() + 0.5
    assert ahead(time.sleep, [3]) is None and ahead(abs, [-1]) is None
    ahead.pool.shutdown()


def test_the_check_ahead_of_time_is_of_the_candidate(monkeypatch):
    def compile_case(case, arch):
        spills = 500 if case.num_warps == 1 else 0
        return aot.Resources(registers=0, shared=0, spills=spills, hmma=0, wgmma=0)

    monkeypatch.setattr(aot, "compile_case", compile_case)
    spilling, other = ({"BLOCK": 4096, "num_warps": warps} for warps in (1, 8))
    assert tune_kernels.refusals(("beam_search", "default", other, 90, "beam_search", 0)) == []
    (why,) = tune_kernels.refusals(("beam_search", "default", spilling, 90, "beam_search", 0))
    assert why == "500 bytes of spills"
    monkeypatch.setattr(aot, "compile_case", lambda *_: failing())
    (why,) = tune_kernels.refusals(("beam_search", "default", other, 90, "beam_search", 0))
    assert why == "ZeroDivisionError: no such kernel"


def test_the_tuner_serves_candidates_from_memory_and_writes_a_table_that_reads_back(tmp_path):
    shipped = dict(table.lookup("mlp", 90, "forward"))
    candidate = {**shipped, "BM": 64}
    with tune_kernels.Trial("mlp", 100) as trial:
        look = lambda: dict(table.lookup("mlp", 100, "forward"))  # noqa: E731
        assert trial.buckets_of(look) == {"forward"}
        assert trial.using("forward", candidate, look)() == candidate
        assert look() == shipped
        trial.buckets["forward"] = {**candidate, "wins": False}
        trial.save(tmp_path)
    assert dict(table.lookup("mlp", 90, "forward")) == shipped
    written = json.loads((tmp_path / "mlp.json").read_text())
    assert written["100"]["forward"] == {**candidate, "wins": False}
    assert written["90"] == json.loads((table.FOLDER / "mlp.json").read_text())["90"]
