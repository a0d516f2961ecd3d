"""Every shipped kernel configuration compiles for GPUs that are not here, and fits them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blipfast.kernels import aot, table

ROOT = Path(__file__).parents[1]


def without_interpreter() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Everything that ships, compiled in one other process and its workers."""
    command = [sys.executable, "-m", "blipfast.kernels.aot", "--json"]
    run = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("op", aot.operations())
def test_shipped_configurations_compile_and_fit(op, rows):
    """No spills, shared memory within the chip's, tensor-core instructions where meant; sm_80 and sm_90."""
    own = [row for row in rows if row["op"] == op]
    assert {f"sm_{row['arch']} {row['case']}": row["problems"] for row in own if row["problems"]} == {}


@pytest.mark.aot
@pytest.mark.slow
def test_the_contrastive_loss_fits_smaller_chips():
    """sm_86 and 89 take sm_80's configurations, sm_120 takes sm_90's, where they have none of their own."""
    command = [sys.executable, "-m", "blipfast.kernels.aot", "--op", "contrastive", "--arch", "86", "120"]
    run = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.aot
def test_every_operation_with_a_kernel_ships_for_both_chips(rows):
    shipped = {(row["op"], row["arch"]) for row in rows}
    ops = {path.stem for path in table.FOLDER.glob("*.json")}
    assert ops <= set(aot.operations())
    assert {(op, arch) for op in ops for arch in aot.ARCHES} <= shipped


@pytest.mark.aot
def test_every_row_of_the_tables_is_compiled(monkeypatch):
    asked = set()

    def look(op, arch, *buckets):
        config = table.lookup(op, arch, *buckets)
        shipped = json.loads((table.FOLDER / f"{op}.json").read_text())[str(arch)]
        asked.add((op, str(arch), next((name for name in buckets if name in shipped), "default")))
        return config

    for op in aot.operations():
        module = importlib.import_module(f"blipfast.kernels.{op}")
        if hasattr(module, "lookup"):
            monkeypatch.setattr(module, "lookup", look)
    for op, arch in itertools.product(aot.operations(), aot.ARCHES):
        aot.cases(op, arch)
    shipped = {
        (path.stem, arch, bucket)
        for path in table.FOLDER.glob("*.json")
        for arch, rows in json.loads(path.read_text()).items()
        if int(arch) in aot.ARCHES
        for bucket in rows
    }
    assert shipped <= asked


@pytest.mark.aot
def test_a_problem_fails_the_table():
    """The check itself: a kernel that wants tensor cores and has no dot product is found out."""
    code = """
import dataclasses, sys
from blipfast.kernels import aot
cases = aot.cases
aot.cases = lambda op, arch: [dataclasses.replace(cases(op, arch)[0], tensor_cores=True)]
sys.exit(aot.main(["--op", "layer_norm", "--arch", "90", "--jobs", "1"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=without_interpreter(), capture_output=True, text=True
    )
    assert run.returncode == 1, run.stderr
    assert "no wgmma instruction" in run.stdout


CASE = aot.AotCase("case", None, {}, {}, num_warps=4, num_stages=2)
FINE = aot.Resources(registers=64, shared=166912, spills=0, hmma=0, wgmma=0)


@pytest.mark.parametrize(
    "arch, tensor_cores, change, message",
    [
        (80, False, {}, None),
        (80, False, dict(shared=166913), "chip has 166912"),
        (90, False, dict(shared=232449), "chip has 232448"),
        (90, False, dict(spills=72), "72 bytes of spills"),
        (80, True, dict(hmma=4), None),
        (80, True, {}, "no mma"),
        (90, True, dict(hmma=4), "no wgmma"),
        (90, True, dict(wgmma=4), None),
        (90, "mma", dict(hmma=4), None),
    ],
)
def test_what_does_not_fit_is_named(arch, tensor_cores, change, message):
    case = dataclasses.replace(CASE, tensor_cores=tensor_cores)
    found = aot.problems(case, arch, dataclasses.replace(FINE, **change))
    assert not found if message is None else [message in text for text in found] == [True]


def test_an_interpreting_process_cannot_compile(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main(["--op", "layer_norm"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
