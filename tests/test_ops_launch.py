"""Every operation finds a configuration for whatever tensor `backends.choose` gives its kernels."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from blipfast import backends
from blipfast.kernels import table
from blipfast.ops.launch import tuned

BUCKETS = [
    (path.stem, bucket)
    for path in sorted(table.FOLDER.glob("*.json"))
    for bucket in json.loads(path.read_text())["90"]
]


@pytest.mark.parametrize("dtype", backends.FLOATS, ids=str)
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
@pytest.mark.parametrize("op, bucket", BUCKETS)
def test_there_is_a_configuration_for_every_dtype(op, bucket, arch, dtype, monkeypatch):
    monkeypatch.setattr(backends, "arch", lambda device: arch)
    tensor = SimpleNamespace(is_cuda=True, dtype=dtype, device=SimpleNamespace(index=0))
    config = tuned(op, bucket, tensor, {})
    shipped = json.loads((table.FOLDER / f"{op}.json").read_text())["80" if arch < 90 else "90"]
    own = "float32" if dtype == torch.float32 and "float32" in shipped else bucket
    assert dict(config) == {key: value for key, value in shipped[own].items() if key != "wins"}
