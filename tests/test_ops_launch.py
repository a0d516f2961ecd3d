"""Every operation finds a configuration for whatever tensor `backends.choose` gives its kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blipfast import backends
from blipfast.kernels import table
from blipfast.ops.launch import tuned

ROOT = Path(__file__).parents[1]
BUCKETS = [
    (path.stem, bucket)
    for path in sorted(table.FOLDER.glob("*.json"))
    for bucket in json.loads(path.read_text())["90"]
]


@pytest.mark.parametrize("dtype", backends.FLOATS, ids=str)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("op, bucket", BUCKETS)
def test_there_is_a_configuration_for_every_dtype(op, bucket, arch, dtype, monkeypatch):
    monkeypatch.setattr(backends, "arch", lambda device: arch)
    tensor = SimpleNamespace(is_cuda=True, dtype=dtype, device=SimpleNamespace(index=0))
    config = tuned(op, bucket, tensor, {})
    shipped = json.loads((table.FOLDER / f"{op}.json").read_text())
    shipped = shipped[str(max(known for known in map(int, shipped) if known <= arch))]
    own = "float32" if dtype == torch.float32 and "float32" in shipped else bucket
    assert dict(config) == {key: value for key, value in shipped[own].items() if key != "wins"}


def test_tf32_is_read_from_torchs_old_setting_and_from_its_new_one():
    code = """if True:
        import torch
        from blipfast.ops.launch import input_precision
        said = [input_precision()]
        torch.set_float32_matmul_precision("high")
        said.append(input_precision())
        torch.set_float32_matmul_precision("highest")
        said.append(input_precision())
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            said.append(input_precision())
        print(*said)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[:3] == ["ieee", "tf32", "ieee"], done.stderr
    assert set(done.stdout.split()[3:]) <= {"tf32"}
